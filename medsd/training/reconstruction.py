"""Held-out images through a codec: numbers, and a sheet to look at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from medsd.data.dataset import DataInfo, available_splits, load_dataset
from medsd.data.intensity import label_channels
from medsd.data.transforms import TrainingRows, column, shrink_batch
from medsd.evaluation.reconstruction import (
    Lesion,
    lesions,
    lesions_by_size,
    ms_ssim,
    patch_pca,
    psnr,
    sharpness,
    ssim,
    tissue_errors,
)
from medsd.inference.pictures import captioned, grid
from medsd.models.autoencoders import codebook_perplexity
from medsd.models.codec import LearnedCodec, VQCodec, reconstruct
from medsd.objectives.perceptual import PerceptualDistance, RandomFeatures

OTHER_FILTERS = 1
"""Seed of the features that held-out images are compared in: not those that a codec is trained in."""
SHEET_COLUMNS = 8
FEW = 16
"""Images that are compared at a time."""


@dataclass(frozen=True)
class HeldOutImages:
    """Images of a split that the codec did not learn from, and what is known of them."""

    split: str
    data: DataInfo
    source: torch.Tensor
    """`(N, C, H, W)` in the source's unit."""
    unit: torch.Tensor
    """`(N, C, H, W)` in `[-1, 1]`."""
    masks: np.ndarray | None
    """`(N, H, W)`, whether a pixel lies in a lesion."""
    pixel_area: np.ndarray
    """`(N,)` mm2 (1 where the spacing is not known)."""

    @classmethod
    def load(cls, dataset_name: str, data: DataInfo, limit: int, split: str | None = None) -> "HeldOutImages":
        """About `limit` images, evenly picked, of `split`; by default of validation, of train where there is no such split."""
        split = split or ("validation" if "validation" in available_splits(dataset_name) else "train")
        rows = load_dataset(dataset_name, split)
        rows = rows.select(range(0, len(rows), max(1, len(rows) // limit)))
        batch = TrainingRows(rows, with_masks=True)[list(range(len(rows)))]
        labels = label_channels(data.intensity_map, data.image_channels)
        source = shrink_batch(batch["images"], data.resolution, labels)
        unit = data.intensity_map.to_unit(source, batch.get("ranges")).float()
        masks = source[:, -1] != 0 if labels else _small_masks(batch.get("masks"), data.resolution)
        areas = _pixel_areas(rows, batch["images"].shape[-1] / data.resolution)
        return cls(split, data, source, unit, None if masks is None else masks.numpy(), areas)

    def reconstructed(self, codec: LearnedCodec) -> torch.Tensor:
        """`(N, C, H, W)` in `[-1, 1]`."""
        return reconstruct(codec, self.unit, codec.vae.device)


def quick_numbers(held_out: HeldOutImages, again: torch.Tensor) -> dict[str, float | None]:
    """Mean absolute error of a range of 2, PSNR in dB and SSIM of reconstructions."""
    error = (again - held_out.unit).abs().mean().item()
    return {"l1": error, "psnr": mean_psnr(again, held_out.unit), "ssim": mean_of(ssim, again, held_out.unit)}


@torch.no_grad()
def mean_of(measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], again: torch.Tensor, images: torch.Tensor) -> float:
    """Mean over images of a measure `(B,)`, taken a few images at a time."""
    parts = zip(again.split(FEW), images.split(FEW), strict=True)
    return torch.cat([measure(ours, theirs) for ours, theirs in parts]).mean().item()


def mean_psnr(again: torch.Tensor, images: torch.Tensor) -> float | None:
    """In dB, over images that are not reproduced exactly (an empty slice may be, which is infinitely good); None without any."""
    values = psnr(again, images)
    return values[values.isfinite()].mean().item() if values.isfinite().any() else None


def full_numbers(held_out: HeldOutImages, again: torch.Tensor, codec: LearnedCodec, train: torch.Tensor) -> dict[str, Any]:
    """What `metrics.json` of an autoencoder says.

    `linear_psnr` and `linear_ssim` are those of the best linear codec of the same size, fitted on `train` `(M, C, H, W)` in `[-1, 1]`.
    """
    unit, linear = held_out.unit, patch_pca(train, held_out.unit, codec.factor, codec.latent_channels)
    distance = PerceptualDistance(RandomFeatures(OTHER_FILTERS))
    numbers = {"split": held_out.split, "n": len(unit)} | quick_numbers(held_out, again)
    numbers |= {
        "ms_ssim": mean_of(ms_ssim, again, unit),
        "linear_psnr": mean_psnr(linear, unit),
        "linear_ssim": mean_of(ssim, linear, unit),
        "perceptual": mean_of(distance, again, unit),
        "sharpness": sharpness(again, unit),
        "latent_std": latent_std(codec, unit),
    }
    if isinstance(codec, VQCodec):
        numbers["codebook_perplexity"] = codebook_perplexity(codec, unit)
    if held_out.data.unit == "HU" and held_out.data.image_channels == 1:
        numbers["error_hu"] = hounsfield_errors(held_out, again)
        numbers["error_hu_without_codec"] = hounsfield_errors(held_out, unit)["all"]
    if held_out.masks is not None:
        numbers["lesions"] = lesions_by_size(found_lesions(held_out, again))
        numbers["linear_lesions"] = lesions_by_size(found_lesions(held_out, linear))
    return numbers


@torch.no_grad()
def latent_std(codec: LearnedCodec, images: torch.Tensor) -> float:
    """Standard deviation of latents that are drawn for images `(N, C, H, W)` in `[-1, 1]`; 1 is what the UNet expects."""
    generator, device = torch.Generator().manual_seed(0), codec.vae.device
    return torch.cat([codec.encode(part.to(device), generator).cpu() for part in images.split(FEW)]).std().item()


def hounsfield_errors(held_out: HeldOutImages, again: torch.Tensor) -> dict[str, float]:
    """Mean absolute error in HU by tissue, of pixels within the window, after the way back from `[-1, 1]`."""
    intensity, channels = held_out.data.intensity_map, held_out.unit.shape[1]
    low, high = (intensity.from_unit(torch.full((1, channels, 1, 1), end)).item() for end in (-1.0, 1.0))
    return tissue_errors(intensity.from_unit(again).numpy(), held_out.source.numpy(), (low, high))


def found_lesions(held_out: HeldOutImages, again: torch.Tensor) -> list[Lesion]:
    """Every lesion of the masks, in the first channel."""
    planes = zip(again[:, 0].numpy(), held_out.unit[:, 0].numpy(), held_out.masks, held_out.pixel_area, strict=True)
    return [lesion for plane in planes for lesion in lesions(*plane)]


def sheet(held_out: HeldOutImages, again: torch.Tensor, numbers: dict[str, Any] | None = None) -> Image.Image:
    """Images above their reconstructions (those with the largest lesions, where there are masks), under what `numbers` say."""
    count = SHEET_COLUMNS
    if held_out.masks is not None:
        chosen = np.argsort(-held_out.masks.reshape(len(held_out.unit), -1).sum(1), kind="stable")[:count]
    else:
        chosen = np.arange(0, len(held_out.unit), max(1, len(held_out.unit) // count))[:count]
    pictures = grid(torch.stack([held_out.unit[chosen], again[chosen]]))
    return captioned(pictures, described(numbers)) if numbers else pictures


def decibel(value: float | None) -> str:
    """`"31.20 dB"`; None is an image that comes back exactly."""
    return "infinite" if value is None else f"{value:.2f} dB"


def described(numbers: dict[str, Any]) -> list[str]:
    """Lines of text for a reader."""
    lines = [
        f"{numbers['n']} {numbers['split']} images: "
        f"PSNR {decibel(numbers['psnr'])}, SSIM {numbers['ssim']:.4f}, MS-SSIM {numbers['ms_ssim']:.4f}",
        f"linear codec (patch PCA) of the same size: PSNR {decibel(numbers['linear_psnr'])}, SSIM {numbers['linear_ssim']:.4f}",
        f"sharpness {numbers['sharpness']:.2f}, standard deviation of latents {numbers['latent_std']:.3f}",
    ]
    if "codebook_perplexity" in numbers:
        lines.append(f"codebook perplexity {numbers['codebook_perplexity']:.0f}")
    if "error_hu" in numbers:
        tissues = ", ".join(f"{name} {error:.1f}" for name, error in numbers["error_hu"].items())
        lines.append(f"mean error in HU: {tissues}; without the codec {numbers['error_hu_without_codec']:.2f}")
    for size, row in numbers.get("lesions", {}).items():
        linear = numbers["linear_lesions"][size]["half_kept"]
        kept = f"half of the contrast kept in {row['half_kept']:.0%} (linear codec {linear:.0%}), median {row['kept']:.0%}"
        lines.append(f"lesions of {size}: {row['n']}, {kept}")
    return lines


def _small_masks(masks: torch.Tensor | None, resolution: int) -> torch.Tensor | None:
    """`(N, 1, H, H)` -> `(N, R, R)` bool; None where no image has a lesion."""
    if masks is None or not masks.any():
        return None
    return shrink_batch(masks, resolution, 1)[:, 0] != 0


def _pixel_areas(rows: Any, zoom: float) -> np.ndarray:
    """mm2 of a pixel of each row, once `zoom` x `zoom` of them are one; `zoom` squared where the spacing is not known."""
    spacings = column(rows, "pixel_spacing").to_pylist()
    return np.array([np.prod(spacing) if spacing else 1.0 for spacing in spacings]) * zoom**2
