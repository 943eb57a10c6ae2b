"""One row of a collection -> its images at their final size, with what is known of each. Runs where a crash costs one file.

A row is an image, all frames of a file, or co-registered volumes that become slices.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medsd.data.duplicates import hashes_both_ways, thumbnail
from medsd.data.files import is_nifti, read_frames, read_mask, readable
from medsd.data.geometry import fit_square, without_padding
from medsd.data.image import Header, SourceImage, common_kind
from medsd.data.intensity import foreground, percentile_range
from medsd.data.metadata import Facts
from medsd.data.nifti import Volume, read_volume
from medsd.data.rows import Row
from medsd.errors import InputError

QUANTILES = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.9975, 0.999, 1.0)
"""Kept of an MR slice, so that the percentiles of its series can be told."""
MOST_OFFSET = 1.0
"""Voxels by which a corner of two stacked volumes may differ."""


@dataclass(frozen=True)
class DecodeOptions:
    """What decoding needs to know; fields as in `medsd.config.PrepareDataConfig`."""

    resolution: int
    resize: str = "pad"
    axis: str = "axial"
    slices: str = "content"
    mask_channel: bool = False
    """Stack the mask behind the image's channels."""
    mask_classes: tuple[str, str] | None = None
    """Classes of slices without and with something in the mask, for rows without a label."""


@dataclass(slots=True)
class Decoded:
    """One image at its final size."""

    image: np.ndarray
    """`(C, R, R)` in the source's unit."""
    header: Header
    frame: int | None = None
    mask: np.ndarray | None = None
    """`(1, R, R)` of labels."""
    findings: tuple[str, ...] = ()
    """What the mask says, where the collection is labelled by its masks."""
    spacing: list[float] | None = None
    """(row, column) in mm after resizing."""
    height: float | None = None
    """Place in an axial volume, from 0 (lowest) to 1."""
    ranges: list[float] | None = None
    """low, high of each channel: percentiles of its volume."""
    quantiles: list[float] | None = None
    """Of the foreground of an MR slice."""
    foreground: int = 0
    """Pixels that the quantiles are of."""
    content: np.ndarray | None = None
    """The image without its padding and its mask channel: what makes it look like another one."""
    mask_labels: list[float] = field(default_factory=list)
    """Labels that occur in the mask of a row whose mask is a channel."""

    def fingerprint(self) -> str:
        """sha256 of the pixels."""
        return hashlib.sha256(str((self.image.shape, self.image.dtype.str)).encode() + self.image.tobytes()).hexdigest()


def decode_row(row: Row, options: DecodeOptions) -> Iterator[Decoded]:
    """Decode a row.

    Raises InputError, naming the file and what is wrong with it.
    """
    if is_nifti(row.file):
        yield from _slices(row, options)
        return
    frames = read_frames(row.file, row.array, row.index)
    for number, source in enumerate(frames):
        if row.mask is not None and number > 0:
            raise InputError(f"{row.file.name}: several frames and one mask")
        yield _image(row, source, number, options)


def _image(row: Row, source: SourceImage, number: int, options: DecodeOptions) -> Decoded:
    mask = read_mask(row.mask) if row.mask else None
    if mask is not None and mask.shape[1:] != source.pixels.shape[1:]:
        raise InputError(f"{row.mask.name}: a mask of {mask.shape[1:]} pixels for an image of {source.pixels.shape[1:]}")
    decoded = _fitted(source.pixels, mask, source.header, options)
    decoded.frame, decoded.findings = number, _by_mask(mask, options)
    if source.header.modality == "MR":
        shown = foreground(source.pixels)
        shown = shown if shown.size else source.pixels.ravel()[:1]
        decoded.foreground, decoded.quantiles = shown.size, np.quantile(shown, QUANTILES).tolist()
    return decoded


def _slices(row: Row, options: DecodeOptions) -> Iterator[Decoded]:
    volumes = [_volume(path) for path in row.files]
    mask = _volume(row.mask) if row.mask else None
    first = volumes[0]
    for path, volume in zip([*row.files[1:], *([row.mask] if row.mask else [])], [*volumes[1:], *([mask] if mask else [])], strict=True):
        if volume.voxels.shape[1:] != first.voxels.shape[1:]:
            raise InputError(f"{path.name}: {volume.voxels.shape[1:]} voxels beside {first.voxels.shape[1:]} of {row.file.name}")
        if volume.voxels_from(first) > MOST_OFFSET:
            raise InputError(f"{path.name} lies elsewhere in space than {row.file.name}: save them on one grid, with one affine")
    ranges = [end for volume in volumes for channel in volume.voxels for end in percentile_range(channel)]
    header = Header(pixel_spacing=first.pixel_spacing(options.axis), facts=Facts(view=options.axis))
    for index in np.flatnonzero(_wanted(row, first, mask, options)).tolist():
        labels = mask.slice(options.axis, index)[:1] if mask else None
        pixels = np.concatenate([_same_kind(volume.slice(options.axis, index), volumes) for volume in volumes])
        decoded = _fitted(pixels, labels, header, options)
        decoded.frame, decoded.ranges = index, ranges
        decoded.findings = _by_mask(labels, options)
        decoded.height = index / max(1, first.depth("axial") - 1) if options.axis == "axial" else None
        yield decoded


def _volume(path: Path) -> Volume:
    with readable(path):
        if not path.is_file():
            raise InputError("no such file")
        return read_volume(path)


def _wanted(row: Row, volume: Volume, mask: Volume | None, options: DecodeOptions) -> np.ndarray:
    """Which slices become images: `(depth,)` bool."""
    if options.slices == "all":
        return np.ones(volume.depth(options.axis), bool)
    if options.slices == "mask":
        if mask is None:
            raise InputError(f"{row.file.name}: has no mask, which --slices mask needs")
        return mask.occupied(options.axis)
    return volume.content(options.axis)


def _same_kind(pixels: np.ndarray, volumes: list[Volume]) -> np.ndarray:
    """Pixels in a type that holds the values of all channels."""
    return pixels.astype(common_kind(*(volume.voxels for volume in volumes)))


def _fitted(pixels: np.ndarray, mask: np.ndarray | None, header: Header, options: DecodeOptions) -> Decoded:
    """Image and mask at the final size, the mask stacked as a channel where that is wanted."""
    image, scale = fit_square(pixels, options.resolution, options.resize)
    spacing = [header.pixel_spacing[0] / scale[0], header.pixel_spacing[1] / scale[1]] if header.pixel_spacing else None
    decoded = Decoded(image, header, spacing=spacing, content=without_padding(image, *pixels.shape[1:], scale))
    if mask is None:
        return decoded
    labels = fit_square(mask, options.resolution, options.resize, nearest=True, background=0)[0]
    if not options.mask_channel:
        decoded.mask = labels
        return decoded
    decoded.image = np.concatenate([image, labels], dtype=common_kind(image, labels), casting="same_kind")
    decoded.mask_labels = np.unique(labels).tolist()
    return decoded


def _by_mask(mask: np.ndarray | None, options: DecodeOptions) -> tuple[str, ...]:
    """The class that the mask says, where the collection is labelled by its masks."""
    if options.mask_classes is None or mask is None:
        return ()
    return (options.mask_classes[int((mask != 0).any())],)


def look_alike(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What near duplicates are found by: the thumbnail `(64, 64)` uint8, and its hash beside that of its mirror image `(2, 4)` uint64."""
    small = thumbnail(content)
    return small, np.concatenate(hashes_both_ways(small[None]))
