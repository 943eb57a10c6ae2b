"""What is drawn into (and onto) a head of the phantom: bleeds, blood of the scalp, falx, oedema and scars. Each is a shape."""

from collections.abc import Callable

import numpy as np

from medsd.data.phantom_fields import OUTSIDE, Rng, grow, random_angle, smooth_noise, turned
from medsd.data.phantom_head import Anatomy


def _epidural(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A lens against the inner skull: short arc, bulging into the brain."""
    return grow(_lens(anatomy, anatomy.depth, area, random_angle(rng), rng), area, anatomy.pixel)


def _subdural(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A crescent along the inner skull of one side: long arc, thin, never across the falx."""
    side = rng.choice([-1.0, 1.0])
    centre = np.deg2rad(90 - side * 90 + rng.uniform(-50, 50))
    crescent = _crescent(anatomy, anatomy.depth, area, centre, rng)
    return grow(np.where(side * anatomy.midline > 1, crescent, OUTSIDE), area, anatomy.pixel)


def _lens(anatomy: Anatomy, away: np.ndarray, area: float, centre: float, rng: Rng) -> np.ndarray:
    """Half as thick as its half arc or so; `away` is the distance from the skull (depth or height)."""
    half = np.sqrt(0.75 * area / rng.uniform(0.45, 0.65))
    lens = 0.75 * area / half * (1 - (_arc(anatomy, centre) / half) ** 2) - away
    return np.where(away > 0, lens, OUTSIDE)


def _crescent(anatomy: Anatomy, away: np.ndarray, area: float, centre: float, rng: Rng) -> np.ndarray:
    """About 8 mm thick, as long as the area asks."""
    thickness = rng.uniform(7.0, 9.0)
    arc = np.abs(_arc(anatomy, centre)) / (area / (1.6 * thickness))
    return np.where(away > 0, thickness * (1 - np.minimum(arc, 4) ** 4) - away, OUTSIDE)


def _subarachnoid(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """Streaks: three or more neighbouring sulci filled, from the brain's surface inwards."""
    streak = 22.0
    window = 2 * np.pi / anatomy.sulci * area / (7.5 * streak)
    beyond = (np.abs(turned(anatomy.angle - random_angle(rng))) - window / 2) * anatomy.radius
    deeper = anatomy.depth - np.maximum(anatomy.sulcus_depth, streak)
    streaks = -np.hypot(anatomy.beside, np.maximum(deeper, 0)) - np.maximum(beyond - 4, 0)
    free = (anatomy.depth > 1) & (anatomy.ventricles < -3)
    return grow(np.where(free, streaks, OUTSIDE), area, anatomy.pixel)


def _intraparenchymal(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A rounded, irregular blob in the brain, clear of skull, ventricles and falx."""
    clear = _clearance(anatomy, 8, 2)
    blob = np.minimum(_blob(anatomy, clear, area, rng), clear)
    return grow(np.where(clear > 0, blob, OUTSIDE), area, anatomy.pixel)


def _clearance(anatomy: Anatomy, skull: float, ventricles: float) -> np.ndarray:
    """Shape of the brain farther than so many mm from the skull and the ventricles, and 3 mm from the falx."""
    return np.min([anatomy.depth - skull, -anatomy.ventricles - ventricles, np.abs(anatomy.midline) - 3], axis=0)


def _blob(anatomy: Anatomy, clear: np.ndarray, area: float, rng: Rng) -> np.ndarray:
    """Minus the distance from a random place where `clear` has room for most of the area (or nearly the most room)."""
    place = rng.choice(np.flatnonzero(clear >= min(0.7 * np.sqrt(area / np.pi), 0.9 * clear.max())))
    dx, dy = anatomy.x - anatomy.x.flat[place], anatomy.y - anatomy.y.flat[place]
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.3)
    long, short = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    return -np.hypot(long / stretch, short * stretch) + 3.0 * smooth_noise(rng, len(clear), 10)


def _intraventricular(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """The ventricles on one side of a wavy line: a layer of blood, or a cast of some horns."""
    turn = random_angle(rng)
    level = np.cos(turn) * anatomy.x + np.sin(turn) * anatomy.y + 5 * smooth_noise(rng, len(anatomy.x), 6)
    filled = grow(np.where(anatomy.ventricles > 0, level, OUTSIDE), area, anatomy.pixel)
    return np.minimum(filled, anatomy.ventricles)


BLEEDS: dict[str, Callable[[Anatomy, float, Rng], np.ndarray]] = {
    "epidural": _epidural,
    "subdural": _subdural,
    "subarachnoid": _subarachnoid,
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
}
"""Shape of a bleed of the given area (mm2)."""


def scalp_bleeds(anatomy: Anatomy, areas: np.ndarray, rng: Rng) -> list[np.ndarray]:
    """The same blood where it does not count: lenses and crescents outside the skull, one shape per area."""
    centre, shapes = random_angle(rng), []
    for area in areas:
        draw = (_lens, _crescent, _crescent)[rng.integers(3)]
        shapes.append(grow(draw(anatomy, anatomy.height, area, centre, rng), area, anatomy.pixel))
        centre += rng.uniform(0.7, 1.3) * np.pi
    return shapes


def bruise(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of swollen scalp, which is denser than scalp and paler than blood."""
    area = rng.uniform(0, 2600)
    return grow(_crescent(anatomy, anatomy.height, 0.8 * area + 100, random_angle(rng), rng), area, anatomy.pixel)


def falx(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of a falx, thin or dense and thick, in front of and behind the ventricles."""
    gap = rng.uniform(0.3, 0.5) * anatomy.axes[1]
    line = -np.abs(anatomy.midline) - 0.5 * np.maximum(gap - np.abs(anatomy.y), 0)
    free = (anatomy.depth > 0) & (anatomy.ventricles < -2)
    return grow(np.where(free, line, OUTSIDE), rng.uniform(60, 480), anatomy.pixel)


def rim(anatomy: Anatomy, bleed: np.ndarray, rng: Rng) -> np.ndarray:
    """Shape of a bleed and the oedema around it."""
    return grow(bleed, np.count_nonzero(bleed > 0) * anatomy.pixel**2 + _oedema_area(rng), anatomy.pixel)


def scar(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of an old scar, as large and as dark as the oedema around a bleed."""
    area = _oedema_area(rng)
    return grow(_blob(anatomy, _clearance(anatomy, 4, 1), area, rng), area, anatomy.pixel)


def _oedema_area(rng: Rng) -> float:
    """In mm2, 0 every fourth time."""
    return max(rng.uniform(-300, 900), 0)


def _arc(anatomy: Anatomy, centre: float) -> np.ndarray:
    return turned(anatomy.angle - centre) * anatomy.inner
