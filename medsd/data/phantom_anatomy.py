"""Drawing the phantom: one slice of a procedural head, its bleed, and how a scanner shows them in HU.

A class is told by the place and the shape of its bleed, not by brightness: every slice shows an area of blood drawn
from one and the same distribution. What the bleed does not cover (in `normal`: all of it) is blood of the scalp.
Sizes, scalp, falx, dark scars, chalk, pose and scanner vary alike in all classes.

Words. Head frame: mm from the middle of the head, x to the image's right, y towards the occiput (downwards).
Depth: mm below the inner skull; height: mm above the outer one. Arc: mm along the inner skull. Level: mm above the
third ventricle. A shape is a signed field `(size, size)` in mm: positive inside, zero on its edge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

from medsd.errors import InputError

CLASSES: tuple[str, ...] = ("normal", "epidural", "subdural", "subarachnoid", "intraparenchymal", "intraventricular")
MAX_SLICES = 12
SLICE_STEP = 6.0
"""Distance of two slices, mm."""
BLEED_AREA = (580.0, 980.0)
"""Range of the area of the bleed, mm2; in `normal` a second bleed of the scalp covers it."""
SCALP_BLEED_AREA = (100.0, 1150.0)
BLOOD_HU = (57.0, 75.0)
FADING_AREA = (200.0, 600.0)
"""Range of the area over which a bleed fades into its surroundings, mm2: short outlines are softer than long ones."""
OUTSIDE = np.float32(-1000.0)
"""Value of a shape where it may not grow; also the HU of air."""

Rng = np.random.Generator


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


def slice_image(seed: int, patient: int, index: int, label: str, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Slice `index` (0 to 11, from below upwards) of a patient with a bleed of class `label`.

    Returns the image `(1, size, size)`, float32, whole HU within [-1000, 3000], and the bleed's mask
    `(1, size, size)`, uint8, 0 or 1, all 0 for `normal`. The same arguments give the same slice; another label
    gives the same head with another bleed. Raises InputError for an unknown label and for numbers out of range.
    """
    check_numbers(seed, patient, index, size)
    if label not in CLASSES:
        raise InputError(f'no class "{label}" in the phantom; it has {", ".join(CLASSES)}')
    head = draw_patient(seed, patient)
    areas = stream_of(seed, patient, index + 1, 0).uniform(*zip(SCALP_BLEED_AREA, BLEED_AREA, strict=True))
    anatomy = _anatomy(head, index, size, areas[1] if label == "intraventricular" else 0.0, stream_of(seed, patient, index + 1, 1))
    rng = stream_of(seed, patient, index + 1, 2)
    bleed = BLEEDS[label](anatomy, areas[1], rng) if label in BLEEDS else np.full((size, size), OUTSIDE)
    scalp_bleeds = _scalp_bleeds(anatomy, areas[:1] if label in BLEEDS else areas, rng)
    oedema = _rim(anatomy, bleed, rng) if label == "intraparenchymal" else _scar(anatomy, rng)
    interior = _interior(head, anatomy, bleed, oedema, stream_of(seed, patient, index + 1, 3))
    image = _scan(head, anatomy, interior, scalp_bleeds, stream_of(seed, patient, index + 1, 4))
    return image[None], (bleed > 0)[None].astype(np.uint8)


def check_numbers(seed: int, patient: int, index: int, size: int) -> None:
    """Raise InputError for numbers out of range."""
    if seed < 0 or patient < 0 or not 0 <= index < MAX_SLICES:
        raise InputError(f"seed {seed}, patient {patient}, slice {index}: expected are two numbers >= 0 and 0 to {MAX_SLICES - 1}")
    if not 32 <= size <= 1024:
        raise InputError(f"a phantom of {size} x {size} pixels; 32 to 1024 are possible")


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


def _anatomy(head: Patient, index: int, size: int, swelling: float, rng: Rng) -> Anatomy:
    """Slice `index` of a head, its ventricles widened by `swelling` mm2."""
    level = head.first_level + SLICE_STEP * index
    axes = head.half_axes * np.sqrt(1 - (level / 105) ** 2)
    pixel = head.field_of_view / size
    x, y = _head_frame(head, size)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    inner = _outline(head, axes, angle)
    midline = x + 2.0 * _noise(rng, size, 4)
    ventricles = _ventricles(head, axes, midline, y + 1.5 * _noise(rng, size, 5), level)
    area = head.ventricles * rng.uniform(0.6, 1.3) * (1 - level / 140) + swelling
    turns = head.sulci * angle / (2 * np.pi) + 0.28 * _noise(rng, size, 10) * (0.5 + np.maximum(inner - radius, 0) / 18)
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
        ventricles=_grow(ventricles, area, pixel),
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
    field = np.max([_capsule(u, v, axes, *horn) for horn in horns], axis=0)
    return field + head.ventricle_asymmetry * np.tanh(midline / 8)


def _capsule(
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


def _epidural(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A lens against the inner skull: short arc, bulging into the brain."""
    return _grow(_lens(anatomy, anatomy.depth, area, _angle(rng), rng), area, anatomy.pixel)


def _subdural(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A crescent along the inner skull of one side: long arc, thin, never across the falx."""
    side = rng.choice([-1.0, 1.0])
    centre = np.deg2rad(90 - side * 90 + rng.uniform(-50, 50))
    crescent = _crescent(anatomy, anatomy.depth, area, centre, rng)
    return _grow(np.where(side * anatomy.midline > 1, crescent, OUTSIDE), area, anatomy.pixel)


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
    beyond = (np.abs(_turn(anatomy.angle - _angle(rng))) - window / 2) * anatomy.radius
    deeper = anatomy.depth - np.maximum(anatomy.sulcus_depth, streak)
    streaks = -np.hypot(anatomy.beside, np.maximum(deeper, 0)) - np.maximum(beyond - 4, 0)
    free = (anatomy.depth > 1) & (anatomy.ventricles < -3)
    return _grow(np.where(free, streaks, OUTSIDE), area, anatomy.pixel)


def _intraparenchymal(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """A rounded, irregular blob in the brain, clear of skull, ventricles and falx."""
    clear = _clearance(anatomy, 8, 2)
    blob = np.minimum(_blob(anatomy, clear, area, rng), clear)
    return _grow(np.where(clear > 0, blob, OUTSIDE), area, anatomy.pixel)


def _clearance(anatomy: Anatomy, skull: float, ventricles: float) -> np.ndarray:
    """Shape of the brain farther than so many mm from the skull and the ventricles, and 3 mm from the falx."""
    return np.min([anatomy.depth - skull, -anatomy.ventricles - ventricles, np.abs(anatomy.midline) - 3], axis=0)


def _blob(anatomy: Anatomy, clear: np.ndarray, area: float, rng: Rng) -> np.ndarray:
    """Minus the distance from a random place where `clear` has room for most of the area (or nearly the most room)."""
    place = rng.choice(np.flatnonzero(clear >= min(0.7 * np.sqrt(area / np.pi), 0.9 * clear.max())))
    dx, dy = anatomy.x - anatomy.x.flat[place], anatomy.y - anatomy.y.flat[place]
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.3)
    long, short = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    return -np.hypot(long / stretch, short * stretch) + 3.0 * _noise(rng, len(clear), 10)


def _intraventricular(anatomy: Anatomy, area: float, rng: Rng) -> np.ndarray:
    """The ventricles on one side of a wavy line: a layer of blood, or a cast of some horns."""
    turn = _angle(rng)
    level = np.cos(turn) * anatomy.x + np.sin(turn) * anatomy.y + 5 * _noise(rng, len(anatomy.x), 6)
    filled = _grow(np.where(anatomy.ventricles > 0, level, OUTSIDE), area, anatomy.pixel)
    return np.minimum(filled, anatomy.ventricles)


BLEEDS: dict[str, Callable[[Anatomy, float, Rng], np.ndarray]] = {
    "epidural": _epidural,
    "subdural": _subdural,
    "subarachnoid": _subarachnoid,
    "intraparenchymal": _intraparenchymal,
    "intraventricular": _intraventricular,
}
"""Shape of a bleed of the given area (mm2)."""


def _scalp_bleeds(anatomy: Anatomy, areas: np.ndarray, rng: Rng) -> list[np.ndarray]:
    """The same blood where it does not count: lenses and crescents outside the skull, one shape per area."""
    centre, shapes = _angle(rng), []
    for area in areas:
        draw = (_lens, _crescent, _crescent)[rng.integers(3)]
        shapes.append(_grow(draw(anatomy, anatomy.height, area, centre, rng), area, anatomy.pixel))
        centre += rng.uniform(0.7, 1.3) * np.pi
    return shapes


def _bruise(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of swollen scalp, which is denser than scalp and paler than blood."""
    area = rng.uniform(0, 2600)
    return _grow(_crescent(anatomy, anatomy.height, 0.8 * area + 100, _angle(rng), rng), area, anatomy.pixel)


def _falx(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of a falx, thin or dense and thick, in front of and behind the ventricles."""
    gap = rng.uniform(0.3, 0.5) * anatomy.axes[1]
    line = -np.abs(anatomy.midline) - 0.5 * np.maximum(gap - np.abs(anatomy.y), 0)
    free = (anatomy.depth > 0) & (anatomy.ventricles < -2)
    return _grow(np.where(free, line, OUTSIDE), rng.uniform(60, 480), anatomy.pixel)


def _rim(anatomy: Anatomy, bleed: np.ndarray, rng: Rng) -> np.ndarray:
    """Shape of a bleed and the oedema around it."""
    return _grow(bleed, np.count_nonzero(bleed > 0) * anatomy.pixel**2 + _oedema_area(rng), anatomy.pixel)


def _scar(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of an old scar, as large and as dark as the oedema around a bleed."""
    area = _oedema_area(rng)
    return _grow(_blob(anatomy, _clearance(anatomy, 4, 1), area, rng), area, anatomy.pixel)


def _oedema_area(rng: Rng) -> float:
    """In mm2, 0 every fourth time."""
    return max(rng.uniform(-300, 900), 0)


def _interior(head: Patient, anatomy: Anatomy, bleed: np.ndarray, oedema: np.ndarray, rng: Rng) -> np.ndarray:
    """HU inside the skull, before noise."""
    size, pixel = len(anatomy.x), anatomy.pixel
    hu = head.white_hu + (head.grey_hu - head.white_hu) * _grey(head, anatomy) + 0.8 * _noise(rng, size, 12)
    hu = _mix(hu, rng.uniform(14, 22), _soft(oedema, 5.0))
    hu = _mix(hu, head.csf_hu, _soft(_csf(head, anatomy), pixel))
    hu = _mix(hu, rng.uniform(42, 72), _soft(_falx(anatomy, rng), pixel))
    hu = _mix(hu, rng.uniform(60, 120), _soft(_chalk(anatomy, rng), pixel))
    hu = _bleed_into(hu, bleed, pixel, rng)
    hu = hu + 1.2 * _noise(rng, size, 3) + 2 * np.exp(-np.maximum(anatomy.depth, 0) / 9)
    return gaussian_filter(hu, head.scanner.blur / pixel, truncate=3.0)


def _bleed_into(hu: np.ndarray, bleed: np.ndarray, pixel: float, rng: Rng) -> np.ndarray:
    """Mottled blood over `hu`, its edge as wide as its outline needs to fade over an area drawn from FADING_AREA."""
    outline = np.count_nonzero(np.abs(bleed) < pixel) * pixel / 2
    edge = np.clip(rng.uniform(*FADING_AREA) / (outline + 1), pixel, 4.0)
    return _mix(hu, rng.uniform(*BLOOD_HU) + rng.uniform(1, 5) * _noise(rng, len(hu), 16), _soft(bleed, edge))


def _grey(head: Patient, anatomy: Anatomy) -> np.ndarray:
    """Share of grey matter, 0 to 1: a ribbon along the surface and the sulci, and the deep nuclei."""
    deeper = np.maximum(anatomy.depth - anatomy.sulcus_depth, 0)
    cortex = head.cortex - np.minimum(anatomy.depth - head.atrophy, np.hypot(anatomy.beside, deeper))
    u, v = _folded(anatomy)
    lentiform = _capsule(u, v, anatomy.axes, (0.30, -0.22), (0.38, 0.02), 3, 6)
    thalamus = _capsule(u, v, anatomy.axes, (0.12, 0.02), (0.20, 0.14), 6, 6)
    return np.maximum(_soft(cortex, 2.0), _soft(np.maximum(lentiform, thalamus), 2.0))


def _folded(anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Position in units of the half axes, both hemispheres folded into one."""
    return np.abs(anatomy.midline) / anatomy.axes[0], anatomy.y / anatomy.axes[1]


def _csf(head: Patient, anatomy: Anatomy) -> np.ndarray:
    """Shape of the ventricles, the sulci (narrowing inwards), the Sylvian fissures and the rim below the skull."""
    sulci = head.atrophy * (1 - anatomy.depth / anatomy.sulcus_depth) - anatomy.beside
    sulci = np.where(anatomy.depth < anatomy.sulcus_depth, sulci, OUTSIDE)
    sylvian = _capsule(*_folded(anatomy), anatomy.axes, (0.58, -0.16), (1.0, -0.04), 0.8 * head.atrophy, 2 * head.atrophy, 0.05)
    return np.max([anatomy.ventricles, sulci, sylvian, head.atrophy - anatomy.depth], axis=0)


def _chalk(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of a calcified pineal gland, choroid plexus or pallidum; none every other time."""
    u, v = ((0.0, 0.17), (0.22, 0.32), (0.32, -0.08))[rng.integers(3)]
    distance = np.hypot(np.abs(anatomy.midline) - u * anatomy.axes[0], anatomy.y - v * anatomy.axes[1])
    return max(rng.uniform(-4, 4), -1) - distance


def _scan(head: Patient, anatomy: Anatomy, interior: np.ndarray, scalp_bleeds: list[np.ndarray], rng: Rng) -> np.ndarray:
    """The whole slice in whole HU: air, scalp, skull, interior, and the scanner's noise."""
    pixel = anatomy.pixel
    hu = _scalp(head, anatomy, scalp_bleeds, rng)
    diploe = 450 * np.exp(-(((anatomy.depth + head.skull / 2) / (0.25 * head.skull)) ** 2))
    hu = _mix(hu, head.bone_hu - diploe, _soft(-anatomy.height, pixel))
    hu = _mix(hu, interior, _soft(anatomy.depth, pixel))
    grain = gaussian_filter(rng.standard_normal(hu.shape, np.float32), 0.5 * head.scanner.blur / pixel, truncate=3.0)
    hu += head.scanner.noise * rng.uniform(0.8, 1.3) / grain.std() * grain
    return np.clip(np.rint(hu), -1000, 3000).astype(np.float32)


def _scalp(head: Patient, anatomy: Anatomy, bleeds: list[np.ndarray], rng: Rng) -> np.ndarray:
    """HU of air and scalp; bruise and bleeds lift the skin."""
    size, bruise = len(anatomy.x), _bruise(anatomy, rng)
    skin = np.max([head.scalp + 0.6 * _noise(rng, size, 8) - anatomy.height, *(shape + 3 for shape in (bruise, *bleeds))], axis=0)
    tissue = _mix(head.scalp_hu + 7 * _noise(rng, size, 6), rng.uniform(36, 58), _soft(bruise, 3.0))
    hu = _mix(np.full_like(tissue, OUTSIDE), tissue, _soft(skin, anatomy.pixel))
    for bleed in bleeds:
        hu = _bleed_into(hu, bleed, anatomy.pixel, rng)
    return hu


def _grow(field: np.ndarray, area: float, pixel: float) -> np.ndarray:
    """The field shifted so that it is positive on `area` mm2, or wherever it may grow if that is less."""
    free = field > OUTSIDE
    count = min(int(area / pixel**2), np.count_nonzero(free))
    if count < 1:
        return np.full(field.shape, OUTSIDE)
    edge = np.partition(field.ravel(), -count)[-count]
    return np.where(free, field - edge + 0.01, OUTSIDE).astype(np.float32)


def _soft(field: np.ndarray, width: float) -> np.ndarray:
    """A shape as coverage, 0 to 1, over an edge of `width` mm."""
    return np.clip(field / np.float32(width) + np.float32(0.5), 0, 1)


def _mix(below: np.ndarray, above: np.ndarray | float, share: np.ndarray) -> np.ndarray:
    return (below + (above - below) * share).astype(np.float32)


def _angle(rng: Rng) -> float:
    return rng.uniform(-np.pi, np.pi)


def _turn(angle: np.ndarray) -> np.ndarray:
    """Into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def _arc(anatomy: Anatomy, centre: float) -> np.ndarray:
    return _turn(anatomy.angle - centre) * anatomy.inner


def _noise(rng: Rng, size: int, cells: int) -> np.ndarray:
    """Smooth random field `(size, size)` of mean 0 and variance 1, about `cells` hills across."""
    basis = _bumps(size, cells)
    return basis @ rng.standard_normal((basis.shape[1], basis.shape[1]), np.float32) @ basis.T


@lru_cache(maxsize=64)
def _bumps(size: int, cells: int) -> np.ndarray:
    """`(size, cells + 4)`: Gaussian bumps along one axis, the squares of each row summing to 1."""
    centres = np.arange(-2, cells + 2) + 0.5
    rows = np.exp(-(((np.arange(size)[:, None] + 0.5) * cells / size - centres) ** 2)).astype(np.float32)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))
