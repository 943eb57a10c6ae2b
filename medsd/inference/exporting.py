"""A generated image -> a file in the format that was asked for, and what a manifest says of the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.data.dataset import DataInfo
from medsd.data.export import SYNTHETIC, Origin, display_range, to_16_bits, write_dicom, write_nifti, write_png
from medsd.data.intensity import label_channels, nominal_ranges
from medsd.errors import InputError
from medsd.inference.animation import write_animation
from medsd.inference.pictures import picture

Writer = Callable[[DataInfo, torch.Tensor, Path, Origin, int], dict[str, Any]]
"""Writes an image `(C, H, W)` in `[-1, 1]`, number n of its class, and returns what the manifest says of the file."""


def view_png(data: DataInfo, unit: torch.Tensor, file: Path, origin: Origin, number: int) -> dict[str, Any]:
    """8 bits: grey, colour, or other channels side by side."""
    write_png(file, np.asarray(picture(unit)), origin.texts())
    return {"bits": 8}


def grey_png(data: DataInfo, unit: torch.Tensor, file: Path, origin: Origin, number: int) -> dict[str, Any]:
    """16 bits: the one channel of the source, linear from low to high."""
    low, high = nominal_ranges(data.intensity_map, data.image_channels)[0]
    told = {"low": low, "high": high, "unit": data.unit}
    texts = origin.texts() | {name.capitalize(): str(value) for name, value in told.items()}
    write_png(file, to_16_bits(in_source_unit(data, unit)[0], low, high), texts)
    return {"bits": 16} | told


def nifti(data: DataInfo, unit: torch.Tensor, file: Path, origin: Origin, number: int) -> dict[str, Any]:
    """All channels of the source in its unit, masks as label values."""
    image = in_source_unit(data, unit)
    write_nifti(file, image, f"synthetic, shows nobody: medsd, seed {origin.seed}, {origin.model}, {origin.class_name}")
    return {"unit": data.unit, "channels": len(image), "label_channels": label_channels(data.intensity_map, data.image_channels)}


def dicom(data: DataInfo, unit: torch.Tensor, file: Path, origin: Origin, number: int) -> dict[str, Any]:
    """The one channel of the source in its unit, HU for CT."""
    extent, shown = nominal_ranges(data.intensity_map, data.image_channels)[0], display_range(data.intensity_map, data.image_channels)
    return {"unit": data.unit} | write_dicom(file, in_source_unit(data, unit)[0], data.unit, extent, shown, origin, number + 1)


WRITERS: dict[tuple[str, int], tuple[str, Writer]] = {
    ("png", 8): (".png", view_png),
    ("png", 16): (".png", grey_png),
    ("nifti", 8): (".nii.gz", nifti),
    ("dicom", 8): (".dcm", dicom),
}
"""(`--format`, `--bits`) -> how its names end, and what writes it."""


def in_source_unit(data: DataInfo, unit: torch.Tensor) -> np.ndarray:
    """`(C, H, W)` in `[-1, 1]` -> float32 in the source's unit, with the source's channels."""
    return data.intensity_map.from_unit(unit).float().numpy()


def check_format(data: DataInfo, kind: str, bits: int) -> None:
    """Raise InputError where files of a kind could not hold the images' values."""
    wanted = {(16, "png"): "--bits 16", (8, "dicom"): "--format dicom"}.get((bits, kind))
    if wanted and data.image_channels != 1:
        raise InputError(f"{wanted} holds one channel, and this pipeline's images have {data.image_channels}: take --format nifti")


def write_film(frames: torch.Tensor | None, folder: Path, name: str, origin: Origin) -> dict[str, str]:
    """The animation of an image's frames `(F, C, H, W)`; nothing for an image that was not filmed."""
    if frames is None:
        return {}
    write_animation(folder / name, frames, f"{SYNTHETIC} {origin.described()}")
    return {"animation": name}
