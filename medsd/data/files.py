"""One image file -> pixels `(C, H, W)` in the source's own unit, and an allow-list of header facts.

Nothing else leaves a header. DICOM, PNG, TIFF, JPEG and BMP, NPY, and arrays inside an NPZ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from medsd.errors import InputError

RASTER_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima", ""})


def is_raster(path: Path) -> bool:
    """Whether the name is that of a PNG, TIFF, JPEG or BMP."""
    return path.suffix.lower() in RASTER_SUFFIXES


def is_dicom(path: Path) -> bool:
    """Whether the name can be that of a DICOM file: its suffix, none, or a UID."""
    return path.suffix.lower() in DICOM_SUFFIXES or path.suffix[1:].isdigit()


@dataclass(frozen=True)
class Header:
    """What may leave a file's header. Ids stay inside `DATA.private` and are hashed elsewhere."""

    patient: str | None = None
    study: str | None = None
    series: str | None = None
    sop_uid: str | None = None
    instance_number: int | None = None
    modality: str | None = None
    pixel_spacing: tuple[float, float] | None = None
    """(row, column) distance in mm."""


@dataclass(frozen=True)
class SourceImage:
    """Pixels `(C, H, W)` in the source's unit (HU for CT), never clipped or rescaled, and the header facts."""

    pixels: np.ndarray
    header: Header = field(default_factory=Header)


def read_image(path: str | Path) -> np.ndarray:
    """Pixels `(C, H, W)` of one image file in the source's own unit: HU for CT, grey values else.

    Raises InputError for a missing file, an unknown suffix, or a file that cannot be decoded.
    """
    return read_file(Path(path)).pixels


def read_file(path: Path, array: str | None = None, index: int | None = None) -> SourceImage:
    """Decode one file. In an npz, `array` names the member and `index` the row of `(N, H, W)` or `(N, H, W, C)`.

    Raises InputError, naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise InputError(f"{path.name}: no such file")
    reader = _reader(path)
    try:
        return reader(path, array, index) if reader is _read_npz else reader(path)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path.name}: cannot be decoded ({type(error).__name__}: {error})") from error


def _reader(path: Path) -> Callable[..., SourceImage]:
    if is_raster(path):
        return _read_raster
    if path.suffix.lower() == ".npy":
        return _read_npy
    if path.suffix.lower() == ".npz":
        return _read_npz
    if is_dicom(path):
        return _read_dicom
    raise InputError(f"{path.name}: not a kind of image that is read here (DICOM, PNG, TIFF, JPEG, BMP, NPY, NPZ)")


def _read_dicom(path: Path) -> SourceImage:
    import pydicom
    from pydicom.pixels import apply_modality_lut, pixel_array

    dataset = pydicom.dcmread(path)
    if "PixelData" not in dataset:
        raise InputError(f"{path.name}: a DICOM object without pixels ({dataset.get('Modality', 'unknown modality')})")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise InputError(f"{path.name}: {dataset.NumberOfFrames} frames in one file; split it into single frames first")
    stored = pixel_array(dataset)
    pixels = _narrow(apply_modality_lut(_without_padding(stored, dataset), dataset))
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = _invert(pixels)
    return SourceImage(_channels_first(pixels), _dicom_header(dataset))


def _without_padding(stored: np.ndarray, dataset: Any) -> np.ndarray:
    """Stored values with PixelPaddingValue replaced by the smallest real value."""
    padding = dataset.get("PixelPaddingValue")
    if padding is None or stored.ndim != 2:
        return stored
    padded = stored == np.array(padding).astype(stored.dtype)
    if padded.all() or not padded.any():
        return stored
    return np.where(padded, stored[~padded].min(), stored)


def _invert(pixels: np.ndarray) -> np.ndarray:
    """MONOCHROME1 (small is bright) as small is dark, within the image's own range."""
    return (pixels.max() - pixels + pixels.min()).astype(pixels.dtype)


def _dicom_header(dataset: Any) -> Header:
    def text(tag: str) -> str | None:
        return str(dataset.get(tag)) if dataset.get(tag) else None

    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    number = text("InstanceNumber")
    return Header(
        patient=text("PatientID"),
        study=text("StudyInstanceUID"),
        series=text("SeriesInstanceUID"),
        sop_uid=text("SOPInstanceUID"),
        instance_number=int(number) if number and number.lstrip("-").isdigit() else None,
        modality=text("Modality"),
        pixel_spacing=(float(spacing[0]), float(spacing[1])) if spacing else None,
    )


def _read_raster(path: Path) -> SourceImage:
    from PIL import Image

    with Image.open(path) as image:
        return SourceImage(pixels_of(image))


def pixels_of(image: Any) -> np.ndarray:
    """A PIL image of any mode -> `(C, H, W)` with its own depth, turned as its EXIF says; palettes become colour."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in {"P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}:
        image = image.convert("RGB")
    pixels = np.asarray(image)
    return _channels_first(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels)


def _read_npy(path: Path) -> SourceImage:
    return SourceImage(_channels_first(_narrow(np.load(path, allow_pickle=False))))


def _read_npz(path: Path, array: str | None, index: int | None) -> SourceImage:
    member = _npz_member(path, array)
    return SourceImage(_channels_first(_narrow(member if index is None else member[index])))


@lru_cache(maxsize=3)
def _npz_member(path: Path, array: str | None) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        if array is None and len(archive.files) != 1:
            raise InputError(f"{path.name}: holds {len(archive.files)} arrays ({', '.join(archive.files)}); one is expected")
        return archive[array or archive.files[0]]


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """`(H, W)` or `(H, W, C)` -> `(C, H, W)`; transparency is dropped, equal colour channels are one grey channel."""
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3:
        raise InputError(f"an image of shape {pixels.shape}; (H, W) or (H, W, C) is expected")
    planes = np.moveaxis(pixels, -1, 0)
    planes = planes[:-1] if len(planes) in {2, 4} else planes
    grey = len(planes) == 3 and (planes[0] == planes[1]).all() and (planes[0] == planes[2]).all()
    return np.ascontiguousarray(planes[:1] if grey else planes)


def _narrow(pixels: np.ndarray) -> np.ndarray:
    """The same values in the smallest of uint8 (kept), int16, uint16, int32 and float32 that holds them exactly."""
    if pixels.dtype == np.uint8:
        return pixels
    if not np.isfinite(pixels).all():
        raise InputError("pixels that are not finite numbers")
    low, high = pixels.min(), pixels.max()
    whole = np.issubdtype(pixels.dtype, np.integer) or (pixels == np.rint(pixels)).all()
    for kind in (np.int16, np.uint16, np.int32):
        if whole and np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return pixels.astype(kind)
    return pixels.astype(np.float32)
