"""Shapes of the phantom: signed fields `(size, size)` in mm, positive inside, zero on their edge; and smooth random fields."""

from functools import lru_cache

import numpy as np

OUTSIDE = np.float32(-1000.0)
"""Value of a shape where it may not grow; also the HU of air."""
Rng = np.random.Generator


def grow(field: np.ndarray, area: float, pixel: float) -> np.ndarray:
    """The field shifted so that it is positive on `area` mm2, or wherever it may grow if that is less."""
    free = field > OUTSIDE
    count = min(int(area / pixel**2), np.count_nonzero(free))
    if count < 1:
        return np.full(field.shape, OUTSIDE)
    edge = np.partition(field.ravel(), -count)[-count]
    return np.where(free, field - edge + 0.01, OUTSIDE).astype(np.float32)


def soft(field: np.ndarray, width: float) -> np.ndarray:
    """A shape as coverage, 0 to 1, over an edge of `width` mm."""
    return np.clip(field / np.float32(width) + np.float32(0.5), 0, 1)


def mix(below: np.ndarray, above: np.ndarray | float, share: np.ndarray) -> np.ndarray:
    """`above` over `below` where `share` is 1."""
    return (below + (above - below) * share).astype(np.float32)


def capsule(
    u: np.ndarray,
    v: np.ndarray,
    axes: np.ndarray,
    start: tuple[float, float],
    end: tuple[float, float],
    first: float,
    last: float,
    bow: float = 0.0,
) -> np.ndarray:
    """Shape of a thick line between two points, which are in units of the half axes.

    Its half width (mm) goes from `first` to `last`; its middle is bowed sideways by `bow` half widths of the head.
    """
    du, dv = end[0] - start[0], end[1] - start[1]
    along = np.clip(((u - start[0]) * du + (v - start[1]) * dv) / (du * du + dv * dv), 0, 1)
    across = u - start[0] - along * du - 4 * bow * along * (1 - along)
    distance = np.hypot(across * axes[0], (v - start[1] - along * dv) * axes[1])
    return (first + (last - first) * along - distance).astype(np.float32)


def random_angle(rng: Rng) -> float:
    """In radians, anywhere around the head."""
    return rng.uniform(-np.pi, np.pi)


def turned(angle: np.ndarray) -> np.ndarray:
    """Into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def smooth_noise(rng: Rng, size: int, cells: int) -> np.ndarray:
    """Smooth random field `(size, size)` of mean 0 and variance 1, about `cells` hills across."""
    basis = _bumps(size, cells)
    return basis @ rng.standard_normal((basis.shape[1], basis.shape[1]), np.float32) @ basis.T


@lru_cache(maxsize=64)
def _bumps(size: int, cells: int) -> np.ndarray:
    """`(size, cells + 4)`: Gaussian bumps along one axis, the squares of each row summing to 1."""
    centres = np.arange(-2, cells + 2) + 0.5
    rows = np.exp(-(((np.arange(size)[:, None] + 0.5) * cells / size - centres) ** 2)).astype(np.float32)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))
