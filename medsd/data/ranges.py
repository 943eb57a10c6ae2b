"""Which intensity map a collection gets, and the range of each image where the map is recorded per image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.decode import QUANTILES
from medsd.data.intensity import PERCENTILES, IntensityMap, Labels, Range, Recorded, Stack, Windows, label_channels, parse_windows
from medsd.errors import InputError

if TYPE_CHECKING:
    import pyarrow

XRAY = frozenset({"CR", "DX", "MG", "RG", "RF", "XA", "PX", "IO"})
MOST_MASK_LABELS = 64


def choose_intensity(
    table: "pyarrow.Table", splits: Sequence[str], wanted: IntensityMap | None, mask_channel: bool, channels: int
) -> IntensityMap:
    """The map of images with so many channels, the last one a mask's where there is a `mask_channel`; `wanted` if it fits.

    `table` is that of `Staging.table`, `splits` those of its rows. Raises InputError for windows over 8 bits and for masks
    without labels or with too many.
    """
    if isinstance(wanted, Windows) and set(_column(table, "dtype")) == {"uint8"}:
        raise InputError("--windows are in HU, and these are grey values of 8 bits: leave the flag away")
    if not mask_channel:
        return wanted or _default_intensity(table, splits, channels)
    labels = sorted({value for found in _column(table, "mask_labels") for value in found} | {0.0})
    if len(labels) == 1:
        raise InputError("no mask holds anything but 0: drop mask from --channels, or name another file with mask=WORD")
    if len(labels) > MOST_MASK_LABELS:
        raise InputError(f"the masks hold {len(labels)} values; labels, at most {MOST_MASK_LABELS}, are expected")
    images = wanted or _default_intensity(table, splits, channels - 1)
    return Stack(((images, channels - 1), (Labels(tuple(labels)), 1)))


def is_ct(table: "pyarrow.Table") -> bool:
    """Whether every image says that it is CT."""
    return set(_column(table, "modality")) == {"CT"}


def _column(table: "pyarrow.Table", name: str) -> list[Any]:
    return table[name].to_pylist()


def _default_intensity(table: "pyarrow.Table", splits: Sequence[str], channels: int) -> IntensityMap:
    """CT windows, percentiles per volume (MRI), the VOI window (X-ray), 8 bits, or the full range of the training images."""
    ranges = image_ranges(table, channels)
    modalities = set(_column(table, "modality"))
    if is_ct(table):
        return parse_windows(("brain", "subdural", "bone"))
    if all(ranges) and (modalities <= {"MR", None} or modalities <= XRAY):
        train = [found for found, split in zip(ranges, splits, strict=True) if split == "train"] or ranges
        nominal = np.median(np.array(train)[:, : 2 * channels].reshape(-1, channels, 2), axis=0)
        return Recorded("voi" if modalities <= XRAY else "percentiles", tuple(tuple(pair) for pair in nominal.tolist()))
    if set(_column(table, "dtype")) == {"uint8"}:
        return Range(0.0, 255.0)
    ends = zip(_column(table, "low"), _column(table, "high"), splits, strict=True)
    train = [(low, high) for low, high, split in ends if split == "train"] or list(
        zip(_column(table, "low"), _column(table, "high"), strict=True)
    )
    low, high = min(low for low, _ in train), max(high for _, high in train)
    if low == high:
        raise InputError(f"every pixel of the training images is {low}: nothing to learn from")
    return Range(low, high)


def image_ranges(table: "pyarrow.Table", channels: int) -> list[list[float] | None]:
    """low, high of each of an image's channels: of its volume or series (MRI), or its VOI window (X-ray); None where unknown."""
    series = _series_ranges(table)
    columns = zip(_column(table, "ranges"), _column(table, "voi"), _column(table, "modality"), _column(table, "series"), strict=True)
    return [
        found or (list(voi) if voi and modality in XRAY else series.get(name, [])) * channels or None
        for found, voi, modality, name in columns
    ]


def _series_ranges(table: "pyarrow.Table") -> dict[str | None, list[float]]:
    """Percentiles of each MR series, from the quantiles of its slices' foreground: the mean of their distribution functions, inverted."""
    slices: dict[str | None, list[tuple[list[float], int]]] = {}
    for name, quantiles, pixels in zip(_column(table, "series"), _column(table, "quantiles"), _column(table, "foreground"), strict=True):
        if quantiles:
            slices.setdefault(name, []).append((quantiles, pixels))
    joint = {name: joint_percentiles(found) for name, found in slices.items()}
    return {name: [low, high] if low < high else _ends(table, name) for name, (low, high) in joint.items()}


def joint_percentiles(slices: Sequence[tuple[list[float], int]]) -> tuple[float, float]:
    """`PERCENTILES` of slices together, from each one's `QUANTILES` and how many pixels they are of."""
    values = np.unique([quantiles for quantiles, _ in slices])
    share = np.average([_distribution(values, quantiles) for quantiles, _ in slices], axis=0, weights=[pixels for _, pixels in slices])
    low, high = np.interp(np.array(PERCENTILES) / 100, share.ravel(), np.repeat(values, 2)).tolist()
    return low, high


def _ends(table: "pyarrow.Table", series: str | None) -> list[float]:
    """Smallest and largest value of a series, as it is stored."""
    found = [
        ends for name, *ends in zip(_column(table, "series"), _column(table, "low"), _column(table, "high"), strict=True) if name == series
    ]
    return [min(low for low, _ in found), max(high for _, high in found)]


def _distribution(values: np.ndarray, quantiles: list[float]) -> np.ndarray:
    """Shares `(N, 2)` of a slice's pixels that are below each value, and below or equal to it."""
    below = 1 - np.interp(-values, -np.array(quantiles[::-1]), 1 - np.array(QUANTILES[::-1]))
    return np.stack([below, np.interp(values, quantiles, QUANTILES)], 1)


def is_recorded(intensity: dict[str, Any]) -> bool:
    """Whether an intensity map's JSON form says that ranges are recorded per image."""
    return "'recorded'" in repr(intensity)


def recorded_ranges(table: "pyarrow.Table", info: DataInfo) -> list[list[list[float]]]:
    """The column `intensity_range`: `(C, 2)` of every image, with a range of no meaning for each mask channel."""
    masks = label_channels(info.intensity_map, info.image_channels)
    return [_with_masks(found, masks) for found in image_ranges(table, info.image_channels - masks)]


def _with_masks(ranges: list[float], masks: int) -> list[list[float]]:
    return np.array(ranges).reshape(-1, 2).tolist() + [[0.0, 1.0]] * masks
