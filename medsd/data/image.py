"""What every reader gives: pixels `(C, H, W)` in the source's own unit, and an allow-list of header facts."""

from dataclasses import dataclass, field

import numpy as np

from medsd.data.metadata import Facts
from medsd.errors import InputError

MOST_BYTES = 2**30
"""A frame that would be larger than this is refused before it is decoded."""
MOST_CHANNELS = 8
"""Of an image or a volume; a longer axis is space or time."""
LARGEST = 1e30
"""Pixels of this size are no measurement, and float32 ends not far above."""


@dataclass(frozen=True, slots=True)
class Header:
    """What may leave a file's header. Ids stay inside `DATA.private` and are hashed elsewhere."""

    patient: str | None = None
    study: str | None = None
    series: str | None = None
    sop_uid: str | None = None
    instance_number: int | None = None
    position: float | None = None
    """mm along the slice normal; slices of a series are in this order."""
    modality: str | None = None
    pixel_spacing: tuple[float, float] | None = None
    """(row, column) distance in mm."""
    voi: tuple[float, float] | None = None
    """(low, high) of the header's window or VOI LUT, in the unit of the pixels."""
    burned_in: bool = False
    """Whether the header says that text is burned into the pixels, or the kind of image is known for it."""
    facts: Facts = Facts()


@dataclass(frozen=True, slots=True)
class SourceImage:
    """Pixels `(C, H, W)` in the source's unit (HU for CT), never clipped or rescaled, and the header facts."""

    pixels: np.ndarray
    header: Header = field(default_factory=Header)


def check_size(shape: tuple[int, ...], item_bytes: int) -> None:
    """Refuse an image whose header claims a shape without pixels, or with too many."""
    if min(shape, default=0) < 1:
        raise InputError(f"the header claims an image of shape {shape}")
    count = 1
    for side in shape:
        count *= int(side)
    if count * item_bytes > MOST_BYTES:
        raise InputError(f"the header claims {count * item_bytes / 2**30:.1f} GiB for one image, more than {MOST_BYTES / 2**30:.0f} GiB")


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """`(H, W)`, `(H, W, C)` or `(C, H, W)` with C up to `MOST_CHANNELS` -> `(C, H, W)`; equal colour channels are one grey channel."""
    if pixels.ndim == 2:
        return pixels[None]
    if pixels.ndim != 3 or min(pixels.shape[0], pixels.shape[-1]) > MOST_CHANNELS:
        raise InputError(f"an image of shape {pixels.shape}; (H, W), (H, W, C) or (C, H, W) is expected, C up to {MOST_CHANNELS}")
    planes = np.moveaxis(pixels, -1, 0) if pixels.shape[-1] <= MOST_CHANNELS else pixels
    grey = len(planes) == 3 and (planes[0] == planes[1]).all() and (planes[0] == planes[2]).all()
    return np.ascontiguousarray(planes[:1] if grey else planes)


def common_kind(*arrays: np.ndarray) -> np.dtype:
    """The type that holds the values of all; where no type of 32 bits does, float32."""
    kind = np.result_type(*arrays)
    return kind if kind.itemsize <= 4 else np.dtype(np.float32)


def narrow(pixels: np.ndarray) -> np.ndarray:
    """The same values in the smallest of uint8 (kept), int16, uint16, int32, uint32 and float32 that holds them.

    Only float64 that is not whole, and what needs more than 32 bits, loses digits. Raises InputError for what is empty, not
    finite, or so large that a difference of two values would not be.
    """
    if pixels.size == 0 or pixels.dtype.kind not in "biuf":
        raise InputError(f"{pixels.size} pixels of type {pixels.dtype}; whole or real numbers are expected")
    if pixels.dtype == np.uint8:
        return pixels
    low, high = pixels.min(), pixels.max()
    whole = pixels.dtype.kind in "biu"
    if not whole:
        # min and max carry every NaN and infinity, so the whole image need not be searched for them.
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("pixels that are not finite numbers")
        if max(-low, high) > LARGEST:
            raise InputError(f"pixels up to {max(-low, high):.3g}; at most {LARGEST:.0g} is expected")
        whole = bool((pixels == np.rint(pixels)).all())
    for kind in (np.int16, np.uint16, np.int32, np.uint32):
        if whole and np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return pixels.astype(kind, copy=False)
    return pixels.astype(np.float32, copy=False)
