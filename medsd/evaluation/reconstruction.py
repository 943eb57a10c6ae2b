"""How well images survive a codec: arrays in, numbers out.

Images are `(B, C, H, W)` in `[-1, 1]`, a range of 2, clipped to it; each measure of similarity returns one number per image `(B,)`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, conv2d, fold, unfold

RANGE = 2.0
WINDOW, SIGMA = 11, 1.5
"""Side (less for smaller images) and standard deviation, in pixels, of SSIM's Gaussian window (Wang et al., 2004)."""
K1, K2 = 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM (Wang et al., 2003, section 3.2)."""
TISSUES: dict[str, tuple[float, float]] = {
    "air and lung": (-np.inf, -200.0),
    "fat": (-200.0, -20.0),
    "fluid": (-20.0, 20.0),
    "soft tissue": (20.0, 60.0),
    "fresh blood": (60.0, 100.0),
    "dense": (100.0, 300.0),
    "bone": (300.0, np.inf),
}
"""Ranges of CT in HU, the lower end included."""
LESION_SIZES = (0.0, 30.0, 100.0, 300.0, 1000.0, np.inf)
"""Ends of the ranges that lesions are sorted into, in mm2."""
RIM = 3
"""Width in pixels of the rim around a lesion that its contrast is taken against."""


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, `(B,)`; infinite for equal images."""
    return 10 * torch.log10(RANGE**2 / (reconstruction - images).square().flatten(1).mean(1))


def ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004, eq. 13), `(B,)`, over places where the whole window fits."""
    return _similarity(reconstruction, images)[0]


def ms_ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity (Wang et al., 2003, eq. 7), `(B,)`.

    Five scales need 176 pixels; smaller images have as many as the window fits into, with weights that add up to one again.
    """
    levels = [level for level in range(len(SCALE_WEIGHTS)) if level == 0 or min(images.shape[-2:]) // 2**level >= WINDOW]
    weights, product = np.array(SCALE_WEIGHTS[: len(levels)]), 1.0
    for level, weight in zip(levels, weights / weights.sum(), strict=True):
        whole, structure = _similarity(reconstruction, images)
        product = product * (whole if level == levels[-1] else structure).clamp(min=0) ** weight
        reconstruction, images = avg_pool2d(reconstruction, 2), avg_pool2d(images, 2)
    return product


def _similarity(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM, and its contrast and structure term alone, each `(B,)`."""
    channels, one, other = one.shape[1], one.double(), other.double()
    window = min(WINDOW, *one.shape[-2:])
    x = torch.arange(window, dtype=one.dtype) - (window - 1) / 2
    bell = torch.exp(-(x**2) / (2 * SIGMA**2))
    kernel = (bell[:, None] * bell / bell.sum() ** 2).expand(channels, 1, window, window)

    def local(values: torch.Tensor) -> torch.Tensor:
        return conv2d(values, kernel, groups=channels)

    mean, other_mean = local(one), local(other)
    variances = local(one * one) - mean**2 + local(other * other) - other_mean**2
    covariance = local(one * other) - mean * other_mean
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    structure = (2 * covariance + c2) / (variances + c2)
    whole = structure * (2 * mean * other_mean + c1) / (mean**2 + other_mean**2 + c1)
    return whole.flatten(1).mean(1), structure.flatten(1).mean(1)


def sharpness(reconstruction: torch.Tensor, images: torch.Tensor) -> float:
    """Energy of the finest detail (the Laplacian's) over that of the images: 1 is as sharp, less is blurred, more is noisy."""
    laplacian = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    energies = [conv2d(planes.float().flatten(0, 1)[:, None], laplacian).square().mean() for planes in (reconstruction, images)]
    return (energies[0] / energies[1]).item()


def patch_pca(train: torch.Tensor, images: torch.Tensor, factor: int, components: int) -> torch.Tensor:
    """Images coded by the first principal components of `factor` x `factor` patches of `train`: the best linear codec of that size."""
    mean = torch.stack([_patches(image[None], factor).mean(0) for image in train]).mean(0)
    centred = ((_patches(image[None], factor) - mean) for image in train)
    scatter = sum(patches.T @ patches for patches in centred)
    basis = torch.linalg.eigh(scatter).eigenvectors[:, -components:]
    coded = [((_patches(image[None], factor) - mean) @ basis @ basis.T + mean).T[None] for image in images]
    return torch.cat([fold(patches, images.shape[-2:], factor, stride=factor) for patches in coded]).clamp(-1, 1).float()


def _patches(images: torch.Tensor, factor: int) -> torch.Tensor:
    """`(B, C, H, W)` -> `(patches, C factor^2)` float64."""
    return unfold(images, factor, stride=factor).movedim(1, 2).flatten(0, 1).double()


def tissue_errors(reconstruction: np.ndarray, images: np.ndarray, window: tuple[float, float]) -> dict[str, float]:
    """Mean absolute error in HU of the pixels of each tissue within `window` (low, high); both arrays in HU, of any shape.

    `all` is that of every pixel within the window. A tissue without a pixel is left out.
    """
    errors, inside = np.abs(reconstruction - images), (images >= window[0]) & (images <= window[1])
    chosen = {"all": inside} | {name: inside & (images >= low) & (images < high) for name, (low, high) in TISSUES.items()}
    return {name: float(errors[where].mean()) for name, where in chosen.items() if where.any()}


@dataclass(frozen=True)
class Lesion:
    """A connected region of a mask."""

    area: float
    """mm2 (pixels, where the spacing is not known)."""
    contrast: float
    """Mean inside minus mean of the rim, in the unit of the image."""
    kept: float
    """The reconstruction's contrast over this one."""
    error: float
    """Mean absolute error inside, in the unit of the image."""


def lesions(reconstruction: np.ndarray, image: np.ndarray, mask: np.ndarray, pixel_area: float) -> list[Lesion]:
    """Of one image `(H, W)`: its lesions, the connected regions where `mask` `(H, W)` is not 0. A region without contrast is left out."""
    from scipy.ndimage import binary_dilation, label

    regions, count = label(mask != 0)
    found = []
    for number in range(1, count + 1):
        inside = regions == number
        rim = binary_dilation(inside, iterations=RIM) & (regions == 0)
        contrast = image[inside].mean() - image[rim].mean() if rim.any() else 0.0
        if contrast:
            kept = (reconstruction[inside].mean() - reconstruction[rim].mean()) / contrast
            error = np.abs(reconstruction[inside] - image[inside]).mean()
            found.append(Lesion(float(inside.sum() * pixel_area), float(contrast), float(kept), float(error)))
    return found


def lesions_by_size(found: list[Lesion]) -> dict[str, dict[str, float]]:
    """For each range of `LESION_SIZES` with lesions: `n`, `half_kept` (share with half the contrast or more), `kept` (median), `error`."""
    table = {}
    for low, high in zip(LESION_SIZES, LESION_SIZES[1:], strict=False):
        chosen = [lesion for lesion in found if low <= lesion.area < high]
        if chosen:
            kept = np.array([lesion.kept for lesion in chosen])
            name = f"{low:.0f}-{high:.0f} mm2" if np.isfinite(high) else f"{low:.0f} mm2 and more"
            table[name] = {
                "n": len(chosen),
                "half_kept": float((kept >= 0.5).mean()),
                "kept": float(np.median(kept)),
                "error": float(np.mean([lesion.error for lesion in chosen])),
            }
    return table
