"""Drawing the phantom: one slice of a procedural head, its bleed, and how a scanner shows them in HU.

A class is told by the place and the shape of its bleed, not by brightness: every slice shows an area of blood drawn
from one and the same distribution. What the bleed does not cover (in `normal`: all of it) is blood of the scalp.
Sizes, scalp, falx, dark scars, chalk, pose and scanner vary alike in all classes.

`phantom_head` has the heads and their words, `phantom_shapes` what is drawn into them, `phantom_fields` how a shape is held.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from medsd.data.phantom_fields import OUTSIDE, Rng, capsule, mix, smooth_noise, soft
from medsd.data.phantom_head import Anatomy, Patient, anatomy_of, draw_patient, stream_of
from medsd.data.phantom_shapes import BLEEDS, bruise, falx, rim, scalp_bleeds, scar
from medsd.errors import InputError

CLASSES: tuple[str, ...] = ("normal", "epidural", "subdural", "subarachnoid", "intraparenchymal", "intraventricular")
MAX_SLICES = 12
BLEED_AREA = (580.0, 980.0)
"""Range of the area of the bleed, mm2; in `normal` a second bleed of the scalp covers it."""
SCALP_BLEED_AREA = (100.0, 1150.0)
BLOOD_HU = (57.0, 75.0)
FADING_AREA = (200.0, 600.0)
"""Range of the area over which a bleed fades into its surroundings, mm2: short outlines are softer than long ones."""


def slice_image(seed: int, patient: int, index: int, label: str, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Slice `index` (0 to 11, from below upwards) of a patient with a bleed of class `label`, or bleeds of several (`"epidural|subdural"`).

    Returns the image `(1, size, size)`, float32, whole HU within [-1000, 3000], and the bleeds' mask
    `(1, size, size)`, uint8, 0 or 1, all 0 for `normal`. The same arguments give the same slice; another label
    gives the same head with other bleeds, which share one area. Raises InputError for an unknown label and for numbers out of range.
    """
    check_numbers(seed, patient, index, size)
    labels = label.split("|")
    if unknown := [name for name in labels if name not in CLASSES]:
        raise InputError(f'no class "{unknown[0]}" in the phantom; it has {", ".join(CLASSES)}')
    head = draw_patient(seed, patient)
    areas = stream_of(seed, patient, index + 1, 0).uniform(*zip(SCALP_BLEED_AREA, BLEED_AREA, strict=True))
    share = areas[1] / len(labels)
    anatomy = anatomy_of(head, index, size, share if "intraventricular" in labels else 0.0, stream_of(seed, patient, index + 1, 1))
    rng = stream_of(seed, patient, index + 1, 2)
    bleeds = {name: BLEEDS[name](anatomy, share, rng) for name in labels if name in BLEEDS}
    bleed = np.max([*bleeds.values()] or [np.full((size, size), OUTSIDE)], axis=0)
    below_skin = scalp_bleeds(anatomy, areas[:1] if bleeds else areas, rng)
    oedema = rim(anatomy, bleeds["intraparenchymal"], rng) if "intraparenchymal" in bleeds else scar(anatomy, rng)
    interior = _interior(head, anatomy, bleed, oedema, stream_of(seed, patient, index + 1, 3))
    image = _scan(head, anatomy, interior, below_skin, stream_of(seed, patient, index + 1, 4))
    return image[None], (bleed > 0)[None].astype(np.uint8)


def check_numbers(seed: int, patient: int, index: int, size: int) -> None:
    """Raise InputError for numbers out of range."""
    if seed < 0 or patient < 0 or not 0 <= index < MAX_SLICES:
        raise InputError(f"seed {seed}, patient {patient}, slice {index}: expected are two numbers >= 0 and 0 to {MAX_SLICES - 1}")
    if not 32 <= size <= 1024:
        raise InputError(f"a phantom of {size} x {size} pixels; 32 to 1024 are possible")


def _interior(head: Patient, anatomy: Anatomy, bleed: np.ndarray, oedema: np.ndarray, rng: Rng) -> np.ndarray:
    """HU inside the skull, before noise."""
    size, pixel = len(anatomy.x), anatomy.pixel
    hu = head.white_hu + (head.grey_hu - head.white_hu) * _grey(head, anatomy) + 0.8 * smooth_noise(rng, size, 12)
    hu = mix(hu, rng.uniform(14, 22), soft(oedema, 5.0))
    hu = mix(hu, head.csf_hu, soft(_csf(head, anatomy), pixel))
    hu = mix(hu, rng.uniform(42, 72), soft(falx(anatomy, rng), pixel))
    hu = mix(hu, rng.uniform(60, 120), soft(_chalk(anatomy, rng), pixel))
    hu = _bleed_into(hu, bleed, pixel, rng)
    hu = hu + 1.2 * smooth_noise(rng, size, 3) + 2 * np.exp(-np.maximum(anatomy.depth, 0) / 9)
    return gaussian_filter(hu, head.scanner.blur / pixel, truncate=3.0)


def _bleed_into(hu: np.ndarray, bleed: np.ndarray, pixel: float, rng: Rng) -> np.ndarray:
    """Mottled blood over `hu`, its edge as wide as its outline needs to fade over an area drawn from FADING_AREA."""
    outline = np.count_nonzero(np.abs(bleed) < pixel) * pixel / 2
    edge = np.clip(rng.uniform(*FADING_AREA) / (outline + 1), pixel, 4.0)
    return mix(hu, rng.uniform(*BLOOD_HU) + rng.uniform(1, 5) * smooth_noise(rng, len(hu), 16), soft(bleed, edge))


def _grey(head: Patient, anatomy: Anatomy) -> np.ndarray:
    """Share of grey matter, 0 to 1: a ribbon along the surface and the sulci, and the deep nuclei."""
    deeper = np.maximum(anatomy.depth - anatomy.sulcus_depth, 0)
    cortex = head.cortex - np.minimum(anatomy.depth - head.atrophy, np.hypot(anatomy.beside, deeper))
    u, v = _folded(anatomy)
    lentiform = capsule(u, v, anatomy.axes, (0.30, -0.22), (0.38, 0.02), 3, 6)
    thalamus = capsule(u, v, anatomy.axes, (0.12, 0.02), (0.20, 0.14), 6, 6)
    return np.maximum(soft(cortex, 2.0), soft(np.maximum(lentiform, thalamus), 2.0))


def _folded(anatomy: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    """Position in units of the half axes, both hemispheres folded into one."""
    return np.abs(anatomy.midline) / anatomy.axes[0], anatomy.y / anatomy.axes[1]


def _csf(head: Patient, anatomy: Anatomy) -> np.ndarray:
    """Shape of the ventricles, the sulci (narrowing inwards), the Sylvian fissures and the rim below the skull."""
    sulci = head.atrophy * (1 - anatomy.depth / anatomy.sulcus_depth) - anatomy.beside
    sulci = np.where(anatomy.depth < anatomy.sulcus_depth, sulci, OUTSIDE)
    sylvian = capsule(*_folded(anatomy), anatomy.axes, (0.58, -0.16), (1.0, -0.04), 0.8 * head.atrophy, 2 * head.atrophy, 0.05)
    return np.max([anatomy.ventricles, sulci, sylvian, head.atrophy - anatomy.depth], axis=0)


def _chalk(anatomy: Anatomy, rng: Rng) -> np.ndarray:
    """Shape of a calcified pineal gland, choroid plexus or pallidum; none every other time."""
    u, v = ((0.0, 0.17), (0.22, 0.32), (0.32, -0.08))[rng.integers(3)]
    distance = np.hypot(np.abs(anatomy.midline) - u * anatomy.axes[0], anatomy.y - v * anatomy.axes[1])
    return max(rng.uniform(-4, 4), -1) - distance


def _scan(head: Patient, anatomy: Anatomy, interior: np.ndarray, bleeds: list[np.ndarray], rng: Rng) -> np.ndarray:
    """The whole slice in whole HU: air, scalp, skull, interior, and the scanner's noise."""
    pixel = anatomy.pixel
    hu = _scalp(head, anatomy, bleeds, rng)
    diploe = 450 * np.exp(-(((anatomy.depth + head.skull / 2) / (0.25 * head.skull)) ** 2))
    hu = mix(hu, head.bone_hu - diploe, soft(-anatomy.height, pixel))
    hu = mix(hu, interior, soft(anatomy.depth, pixel))
    grain = gaussian_filter(rng.standard_normal(hu.shape, np.float32), 0.5 * head.scanner.blur / pixel, truncate=3.0)
    hu += head.scanner.noise * rng.uniform(0.8, 1.3) / grain.std() * grain
    return np.clip(np.rint(hu), -1000, 3000).astype(np.float32)


def _scalp(head: Patient, anatomy: Anatomy, bleeds: list[np.ndarray], rng: Rng) -> np.ndarray:
    """HU of air and scalp; bruise and bleeds lift the skin."""
    size, swollen = len(anatomy.x), bruise(anatomy, rng)
    skin = np.max([head.scalp + 0.6 * smooth_noise(rng, size, 8) - anatomy.height, *(shape + 3 for shape in (swollen, *bleeds))], axis=0)
    tissue = mix(head.scalp_hu + 7 * smooth_noise(rng, size, 6), rng.uniform(36, 58), soft(swollen, 3.0))
    hu = mix(np.full_like(tissue, OUTSIDE), tissue, soft(skin, anatomy.pixel))
    for bleed in bleeds:
        hu = _bleed_into(hu, bleed, anatomy.pixel, rng)
    return hu
