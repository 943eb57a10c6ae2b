"""The phantom's heads: what the slices of one patient share, and the geometry of one slice.

Words. Head frame: mm from the middle of the head, x to the image's right, y towards the occiput (downwards).
Depth: mm below the inner skull; height: mm above the outer one. Arc: mm along the inner skull. Level: mm above the
third ventricle.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from medsd.data.phantom_fields import Rng, capsule, grow, smooth_noise

SLICE_STEP = 6.0
"""Distance of two slices, mm."""


@dataclass(frozen=True)
class Scanner:
    """How a machine stores HU (`HU = stored * slope + intercept`) and how its images look."""

    model: str
    slope: float
    intercept: float
    signed: bool
    noise: float
    """Standard deviation, HU."""
    blur: float
    """Standard deviation of the reconstruction kernel, mm."""


SCANNERS = (
    Scanner("Borealis 16", slope=1.0, intercept=-1024.0, signed=False, noise=2.8, blur=1.4),
    Scanner("Meridian 64", slope=1.0, intercept=0.0, signed=True, noise=4.0, blur=0.9),
    Scanner("Zephyr S", slope=0.5, intercept=-1000.0, signed=True, noise=3.2, blur=1.1),
)


@dataclass(frozen=True)
class Patient:
    """What the slices of one patient share. Lengths in mm, densities in HU, angles in radians."""

    scanner: Scanner
    field_of_view: float
    centre: np.ndarray
    tilt: float
    half_axes: np.ndarray
    """Of the inner skull: half width, half length."""
    squareness: float
    """Exponent of the superellipse; 2 is an ellipse."""
    bumps: np.ndarray
    """(4,): cosine and sine amplitudes of the outline's first and third harmonic, relative."""
    skull: float
    scalp: float
    bone_hu: float
    scalp_hu: float
    grey_hu: float
    white_hu: float
    csf_hu: float
    ventricles: float
    """Area at level 0, mm2."""
    ventricle_asymmetry: float
    cortex: float
    """Thickness of the grey ribbon."""
    atrophy: float
    """Half the width of a sulcus at the surface."""
    sulci: int
    first_level: float


@dataclass(frozen=True)
class Anatomy:
    """One slice's geometry; fields are `(size, size)` float32, mm and radians in the head frame."""

    pixel: float
    axes: np.ndarray
    """(2,): half width and half length of the inner skull."""
    sulci: int
    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    radius: np.ndarray
    inner: np.ndarray
    """Distance of the inner skull from the middle, at the pixel's angle."""
    depth: np.ndarray
    height: np.ndarray
    midline: np.ndarray
    """Distance from the falx, negative on the image's left."""
    ventricles: np.ndarray
    """Shape."""
    sulcus: np.ndarray
    """Number of the nearest sulcus, an integer below `sulci`."""
    beside: np.ndarray
    """Distance sideways from that sulcus."""
    sulcus_depth: np.ndarray
    """How deep that sulcus reaches."""


def stream_of(seed: int, patient: int, part: int, stream: int) -> Rng:
    """Random numbers of one thing: part 0 is the patient, part `index + 1` a slice."""
    return np.random.default_rng(np.random.SeedSequence((seed, patient, part, stream)))


@lru_cache(maxsize=16)
def draw_patient(seed: int, patient: int) -> Patient:
    """The head and scanner of a patient."""
    rng = stream_of(seed, patient, 0, 0)
    white = rng.uniform(24, 32)
    return Patient(
        scanner=SCANNERS[rng.integers(len(SCANNERS))],
        field_of_view=rng.uniform(205, 225),
        centre=rng.uniform(-4, 4, 2),
        tilt=np.deg2rad(rng.uniform(-8, 8)),
        half_axes=rng.uniform(0.95, 1.05) * np.array([rng.uniform(62, 68), rng.uniform(77, 84)]),
        squareness=rng.uniform(2.0, 2.5),
        bumps=rng.normal(0, [0.02, 0.02, 0.012, 0.012]),
        skull=rng.uniform(4.5, 9),
        scalp=rng.uniform(5, 10),
        bone_hu=rng.uniform(1000, 1400),
        scalp_hu=rng.uniform(2, 58),
        grey_hu=white + rng.uniform(5, 12),
        white_hu=white,
        csf_hu=rng.uniform(5, 10),
        ventricles=rng.uniform(400, 1500),
        ventricle_asymmetry=rng.normal(0, 1.5),
        cortex=rng.uniform(3.0, 6.5),
        atrophy=rng.uniform(0.4, 2.0),
        sulci=int(rng.integers(17, 22)),
        first_level=rng.uniform(0, 12),
    )


def anatomy_of(head: Patient, index: int, size: int, swelling: float, rng: Rng) -> Anatomy:
    """Slice `index` of a head, its ventricles widened by `swelling` mm2."""
    level = head.first_level + SLICE_STEP * index
    axes = head.half_axes * np.sqrt(1 - (level / 105) ** 2)
    pixel = head.field_of_view / size
    x, y = _head_frame(head, size)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inner = _outline(head, axes, angle)
    midline = x + 2.0 * smooth_noise(rng, size, 4)
    ventricles = _ventricles(head, axes, midline, y + 1.5 * smooth_noise(rng, size, 5), level)
    area = head.ventricles * rng.uniform(0.6, 1.3) * (1 - level / 140) + swelling
    turns = head.sulci * angle / (2 * np.pi) + 0.28 * smooth_noise(rng, size, 10) * (0.5 + np.maximum(inner - radius, 0) / 18)
    sulcus = np.floor(turns).astype(np.int64) % head.sulci
    return Anatomy(
        pixel=pixel,
        axes=axes,
        sulci=head.sulci,
        x=x,
        y=y,
        angle=angle,
        radius=radius,
        inner=inner,
        depth=inner - radius,
        height=radius - inner - head.skull,
        midline=midline,
        ventricles=grow(ventricles, area, pixel),
        sulcus=sulcus,
        beside=np.abs(turns % 1 - 0.5) * radius * 2 * np.pi / head.sulci,
        sulcus_depth=rng.uniform(12, 28, head.sulci).astype(np.float32)[sulcus],
    )


def _head_frame(head: Patient, size: int) -> tuple[np.ndarray, np.ndarray]:
    grid = ((np.arange(size) + 0.5) / size - 0.5) * head.field_of_view
    across, down = grid[None, :] - head.centre[0], grid[:, None] - head.centre[1]
    cos, sin = np.cos(head.tilt), np.sin(head.tilt)
    return (cos * across + sin * down).astype(np.float32), (cos * down - sin * across).astype(np.float32)


def _outline(head: Patient, axes: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Distance of the inner skull from the middle: a superellipse with an egg's and a triangle's share."""
    cos, sin = np.cos(angle), np.sin(angle)
    power = np.float32(head.squareness)
    ellipse = (np.abs(cos / axes[0]) ** power + np.abs(sin / axes[1]) ** power) ** (-1 / power)
    bumps = head.bumps[0] * cos + head.bumps[1] * sin + head.bumps[2] * np.cos(3 * angle) + head.bumps[3] * np.sin(3 * angle)
    return (ellipse * (1 + bumps)).astype(np.float32)


def _ventricles(head: Patient, axes: np.ndarray, midline: np.ndarray, y: np.ndarray, level: float) -> np.ndarray:
    """Frontal horns, bodies, trigones, occipital horns and (below) the third ventricle, to be grown to an area."""
    up = np.clip((level - 8) / 22, 0, 1)
    u, v = np.abs(midline) / axes[0], y / axes[1]
    horns = (
        ((0.05, -0.12), (0.21, -0.46), 2.5, 4.5, -0.03),
        ((0.08 + 0.06 * up, -0.16), (0.17 + 0.03 * up, 0.20), 4 * up, 4 * up, -0.03),
        ((0.15, 0.16), (0.31, 0.36), 1.5, 5.0, 0.02),
        ((0.31, 0.36), (0.24, 0.56 - 0.1 * up), 5.0, 1.0, 0.02),
        ((0.00, -0.06), (0.00, 0.14), 2.5 - 6 * up, 2.5 - 6 * up, 0.0),
    )
    field = np.max([capsule(u, v, axes, *horn) for horn in horns], axis=0)
    return field + head.ventricle_asymmetry * np.tanh(midline / 8)
