"""DICOM -> frames in the source's own unit, read with pydicom's own `pixels` functions.

Stored values go through the padding rule, the palette, and the modality LUT or rescale, which an enhanced multi-frame
object may state per frame. The VOI window is not applied: it is a fact beside the pixels.
"""

import io
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.image import LARGEST, MOST_BYTES, Header, SourceImage, channels_first, check_size, narrow
from medsd.data.metadata import known_facts
from medsd.errors import InputError

WITHOUT_PIXELS = frozenset({"SR", "PR", "KO", "REG", "SEG", "DOC", "ECG", "AU", "PLAN", "RTPLAN", "RTSTRUCT"})
"""Kinds of object that a message may name."""
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
NEEDED = ("Rows", "Columns")
DEFLATED = b"1.2.840.10008.1.2.1.99"
SMALL_FILE = 2**22
"""Bytes up to which a file is read in one piece."""
MOST_FRAMES = 20_000
LEAST_UPRIGHT = 0.8
"""Cosine of the angle between an axial slice's normal and the body's axis."""
BURNED_IN_MODALITIES = frozenset({"US", "IVUS", "ES", "XC", "OT", "SC", "ECG", "GM", "DOC"})
"""Kinds of image that often carry a patient's name in their pixels."""
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, NotImplementedError)
"""What pydicom raises for an element whose bytes make no sense."""
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def dicom_frames(path: Path) -> Iterator[SourceImage]:
    """Every frame of a DICOM file.

    Raises InputError for an object without pixels and for a header that claims too much, and whatever pydicom raises.
    """
    from pydicom.pixels import iter_pixels

    dataset = open_dicom(path)
    frames = _check(dataset)
    number = -1
    for number, stored in enumerate(islice(iter_pixels(dataset, allow_excess_frames=False), frames)):
        yield _frame(dataset, stored, number)
    if number + 1 < frames:
        raise InputError(f"the header claims {frames} frames, and {number + 1} are there")


def open_dicom(path: Path, stop_before_pixels: bool = False) -> Any:
    """The `pydicom.Dataset`, after a look at how large a deflated one becomes."""
    import pydicom

    with path.open("rb") as stream:
        start = stream.read(2**16 if stop_before_pixels else SMALL_FILE)
        if DEFLATED in start:
            _check_inflated(path)
        if len(start) < SMALL_FILE and not stop_before_pixels:
            return pydicom.dcmread(io.BytesIO(start))
    return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)


def _check_inflated(path: Path) -> None:
    """Refuse a deflated file that would grow beyond what one image may take."""
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DEFLATED.decode():
        return
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as stream:
        stream.seek(132 + 12 + meta.FileMetaInformationGroupLength)
        while (chunk := inflater.unconsumed_tail or stream.read(2**16)) and not inflater.eof:
            size += len(inflater.decompress(chunk, 2**22))
            if size > MOST_BYTES:
                raise InputError(f"the header claims a deflated file, which is larger than {MOST_BYTES / 2**30:.0f} GiB")


def _check(dataset: Any) -> int:
    """Number of frames; raises InputError where there are no pixels or absurdly many."""
    if not any(name in dataset for name in PIXELS):
        modality = dataset.get("Modality")
        raise InputError(f"a DICOM object without pixels ({modality if modality in WITHOUT_PIXELS else 'no image modality'})")
    lacking = next((name for name in NEEDED if dataset.get(name) is None), None)
    if lacking:
        raise InputError(f"the header claims pixels and has no {lacking}")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"the header claims {frames} frames")
    bits = int(dataset.get("BitsAllocated") or 8)
    check_size((int(dataset.Rows), int(dataset.Columns), int(dataset.get("SamplesPerPixel") or 1)), max(1, bits // 8))
    return frames


def _frame(dataset: Any, stored: np.ndarray, number: int) -> SourceImage:
    from pydicom.pixels import apply_color_lut

    header = dicom_header(dataset, number)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return SourceImage(channels_first(narrow(apply_color_lut(stored, dataset))), header)
    padded = _padding(stored, dataset)
    if padded is not None:
        stored = np.where(padded, np.where(padded, stored.max(), stored).min(), stored)
    pixels = _modality(stored, dataset, number)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels, header = _inverted(pixels, header)
    if padded is not None:
        pixels = np.where(padded, pixels.min(), pixels)
    return SourceImage(channels_first(pixels), header)


def _padding(stored: np.ndarray, dataset: Any) -> np.ndarray | None:
    """Which pixels PixelPaddingValue and its RangeLimit mark as outside the image: `(H, W)` bool, or None.

    The two may be written with the other sign than the pixels have, since both share their bits.
    """
    if dataset.get("PixelPaddingValue") is None or stored.ndim != 2 or stored.dtype.kind not in "iu":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = [int(dataset.PixelPaddingValue), int(dataset.PixelPaddingValue if limit is None else limit)]
    bits = 8 * stored.dtype.itemsize
    if not all(-(2 ** (bits - 1)) <= end < 2**bits for end in ends):
        return None
    low, high = sorted(np.array(ends).astype(stored.dtype).tolist())
    padded = stored == low if low == high else (stored >= low) & (stored <= high)
    return padded if padded.any() and not padded.all() else None


def _modality(stored: np.ndarray, dataset: Any, number: int) -> np.ndarray:
    """Stored values in the modality's unit: HU for CT."""
    from pydicom.pixels import apply_modality_lut

    transform = _group(dataset, number, "PixelValueTransformationSequence") or dataset
    if "ModalityLUTSequence" in transform or "RescaleSlope" not in transform:
        return narrow(apply_modality_lut(stored, dataset) if "ModalityLUTSequence" in dataset else stored)
    slope, intercept = float(transform.RescaleSlope), float(transform.get("RescaleIntercept") or 0)
    if stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer() and max(abs(slope), abs(intercept)) < 2**24:
        return narrow(stored) if (slope, intercept) == (1, 0) else _whole_rescale(stored, int(slope), int(intercept))
    return narrow(stored * np.float64(slope) + intercept)


def _whole_rescale(stored: np.ndarray, slope: int, intercept: int) -> np.ndarray:
    """The same as `stored * slope + intercept` in float64, several times as fast."""
    ends = [int(stored.min()) * slope + intercept, int(stored.max()) * slope + intercept]
    kind = narrow(np.array(ends)).dtype
    if kind.kind == "f":
        return narrow(stored * np.float64(slope) + intercept)
    if slope == 1 and kind.itemsize == stored.dtype.itemsize:
        return stored.view(kind) + np.array(intercept).astype(kind)  # Wraps around on the way, and ends within the range.
    wide = np.int32 if max(map(abs, ends)) < 2**30 and stored.dtype.itemsize <= 2 else np.int64
    return (stored.astype(wide) * wide(slope) + wide(intercept)).astype(kind)


def _inverted(pixels: np.ndarray, header: Header) -> tuple[np.ndarray, Header]:
    """MONOCHROME1 (small is bright) as small is dark, within the image's own range; its window goes along."""
    if pixels.dtype.kind == "f":
        ends: float = float(pixels.min()) + float(pixels.max())
        turned = (ends - pixels.astype(np.float64)).astype(pixels.dtype)
    else:
        ends = int(pixels.min()) + int(pixels.max())
        turned = (ends - pixels.astype(np.int64)).astype(pixels.dtype)
    voi = (float(ends - header.voi[1]), float(ends - header.voi[0])) if header.voi else None
    return turned, replace(header, voi=voi)


def dicom_header(dataset: Any, number: int = 0) -> Header:
    """The allow-listed facts of frame `number`; an element that cannot be understood is as good as absent."""
    frame_item = _group(dataset, number, "FrameContentSequence")
    single = int(dataset.get("NumberOfFrames") or 1) == 1
    instance = (
        _text(frame_item, "InStackPositionNumber") if frame_item is not None else _text(dataset, "InstanceNumber") if single else None
    )
    known = instance is not None and re.fullmatch(r"-?[0-9]{1,9}", instance)
    return Header(
        patient=_text(dataset, "PatientID"),
        study=_text(dataset, "StudyInstanceUID"),
        series=_text(dataset, "SeriesInstanceUID"),
        sop_uid=_text(dataset, "SOPInstanceUID"),
        instance_number=int(instance) if known else None,
        position=_position(dataset, number),
        modality=_text(dataset, "Modality"),
        pixel_spacing=_spacing(dataset, number),
        voi=_voi(dataset, number),
        burned_in=_burned_in(dataset),
        facts=known_facts(*(_text(dataset, name) for name in ("PatientAge", "PatientSex", "Manufacturer", "ViewPosition"))),
    )


def _group(dataset: Any, number: int, name: str) -> Any | None:
    """The item of a functional group that holds for frame `number` of an enhanced object."""
    for sequence, place in (("PerFrameFunctionalGroupsSequence", number), ("SharedFunctionalGroupsSequence", 0)):
        groups = _value(dataset, sequence)
        items = _value(groups[place], name) if groups and place < len(groups) else None
        if items:
            return items[0]
    return None


def _value(dataset: Any, name: str) -> Any | None:
    """An element's value, or None; several times as fast as `dataset.get` for what is absent."""
    tag = _tag(name)
    return dataset[tag].value if tag in dataset else None


@cache
def _tag(name: str) -> Any:
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    return Tag(tag_for_keyword(name))


def _text(dataset: Any, name: str) -> str | None:
    """An element as text; None for one that is absent or cannot be understood. What UTF-8 cannot hold becomes `?`."""
    try:
        value = _value(dataset, name)
    except UNREADABLE:
        return None
    return str(value).encode(errors="replace").decode().strip() or None if value is not None else None


def _numbers(dataset: Any, name: str, count: int) -> list[float] | None:
    """`count` finite numbers of an element, or None."""
    try:
        value = _value(dataset, name)
        values = [float(item) for item in (value if hasattr(value, "__len__") and not isinstance(value, str) else [value])]
    except UNREADABLE:
        return None
    return values[:count] if len(values) >= count and all(abs(value) < LARGEST for value in values) else None


def _spacing(dataset: Any, number: int) -> tuple[float, float] | None:
    measures = _group(dataset, number, "PixelMeasuresSequence") or dataset
    spacing = _numbers(measures, "PixelSpacing", 2) or _numbers(dataset, "ImagerPixelSpacing", 2)
    return (spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None


def _position(dataset: Any, number: int) -> float | None:
    """Height of an axial slice along its own normal, whatever its tilt and spacing; None for another plane."""
    corner = _numbers(_group(dataset, number, "PlanePositionSequence") or dataset, "ImagePositionPatient", 3)
    turn = _numbers(_group(dataset, number, "PlaneOrientationSequence") or dataset, "ImageOrientationPatient", 6)
    if not corner or not turn:
        return None
    (a, b, c), (d, e, f) = turn[:3], turn[3:]
    normal = (b * f - c * e, c * d - a * f, a * e - b * d)
    height = sum(part * place for part, place in zip(normal, corner, strict=True))
    return math.copysign(1, normal[2]) * height if abs(normal[2]) > LEAST_UPRIGHT else None


def _voi(dataset: Any, number: int) -> tuple[float, float] | None:
    """Ends of the first window (PS3.3 C.11.2.1.2), or of the first VOI LUT."""
    item = _group(dataset, number, "FrameVOILUTSequence") or dataset
    exact = _text(item, "VOILUTFunction") in {"LINEAR_EXACT", "SIGMOID"}
    centre, width = _numbers(item, "WindowCenter", 1), _numbers(item, "WindowWidth", 1)
    if centre and width and (width[0] >= 1 or (exact and width[0] > 0)):
        middle, half = (centre[0], width[0] / 2) if exact else (centre[0] - 0.5, max(width[0] - 1, 0.5) / 2)
        return middle - half, middle + half
    table = item.get("VOILUTSequence")
    entries = _numbers(table[0], "LUTDescriptor", 2) if table else None
    return (entries[1], entries[1] + max(1.0, (entries[0] or 2**16) - 1)) if entries else None


def _burned_in(dataset: Any) -> bool:
    said, kind = _text(dataset, "BurnedInAnnotation"), f"{_text(dataset, 'SOPClassUID')}."
    risky = _text(dataset, "Modality") in BURNED_IN_MODALITIES or kind.startswith(f"{SECONDARY_CAPTURE}.")
    return said == "YES" or (risky and said != "NO")
