"""Intensity maps: invertible maps between an image in the source's own unit and `[-1, 1]`.

A map is recorded with the data (`to_dict`) and applied when an image is used. All functions take numpy arrays or torch
tensors `(..., C, H, W)` and use arithmetic that both have, so that the training device does the work. *Ranges*
`(..., C, 2)` are low and high of each image's source channels, for a map that is `Recorded` per image; the others do not read them.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np

from medsd.errors import InputError

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40.0, 80.0),
    "subdural": (80.0, 200.0),
    "bone": (600.0, 2800.0),
    "lung": (-600.0, 1500.0),
    "abdomen": (40.0, 400.0),
}
"""(centre, width) in HU."""
PERCENTILES = (0.5, 99.5)
MOST_VOXELS = 1_000_000
"""Percentiles of a larger volume are taken from an even sample of about so many voxels."""


class IntensityMap(Protocol):
    """Source unit <-> `[-1, 1]`."""

    def channels(self, image_channels: int) -> int:
        """Number of channels after `to_unit` of an image with `image_channels`."""

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """Image in the source's unit `(..., C, H, W)` -> `[-1, 1]`."""

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`[-1, 1]` -> the source's unit; what was clipped comes back as the end of the range."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form, read back by `intensity_from_dict`."""


@dataclass(frozen=True)
class Range:
    """Linear map of `[low, high]`, clipped outside."""

    low: float
    high: float

    def channels(self, image_channels: int) -> int:
        """As many as the image has."""
        return image_channels

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """`(..., C, H, W)` in the source's unit -> `[-1, 1]`."""
        return ((image - self.low) * (2 / (self.high - self.low)) - 1).clip(-1, 1)

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`[-1, 1]` -> the source's unit."""
        return (unit + 1) * ((self.high - self.low) / 2) + self.low

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "range", "low": .., "high": ..}`."""
        return {"kind": "range"} | asdict(self)


WELL_INSIDE = 0.9
"""Of a window's range `[-1, 1]`."""


@dataclass(frozen=True)
class Windows:
    """CT windows, one output channel each: `(..., 1, H, W)` HU <-> `(..., n, H, W)` for n windows."""

    windows: tuple[tuple[float, float], ...]

    def channels(self, image_channels: int) -> int:
        """One per window; the image must have one channel."""
        if image_channels != 1:
            raise InputError(f"CT windows need images of 1 channel, these have {image_channels}: leave --windows away")
        return len(self.windows)

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """`(..., 1, H, W)` HU -> `(..., n, H, W)` in `[-1, 1]`."""
        stacked = image[..., [0] * len(self.windows), :, :] * 1.0
        for index, (centre, width) in enumerate(self.windows):
            stacked[..., index, :, :] = ((stacked[..., index, :, :] - centre) * (2 / width)).clip(-1, 1)
        return stacked

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`(..., n, H, W)` in `[-1, 1]` -> `(..., 1, H, W)` HU.

        Each pixel is read from the narrowest window that is well inside its range there, else from the one that is farthest from its
        ends, else (where all saturate) from the widest. So what a window holds comes back within half a HU for float32 windows; and of
        what a model made, a window that saturates but for a small error is not taken at its word: -0.98 of a brain's window can be air.
        """
        order = sorted(range(len(self.windows)), key=lambda index: -self.windows[index][1])
        planes = [unit[..., index : index + 1, :, :] for index in order]
        read = [plane * (self.windows[index][1] / 2) + self.windows[index][0] for plane, index in zip(planes, order, strict=True)]
        image, nearest = read[0], abs(planes[0])
        for plane, hounsfield in zip(planes[1:], read[1:], strict=True):
            better = abs(plane) < nearest
            image, nearest = better * hounsfield + ~better * image, better * abs(plane) + ~better * nearest
        for plane, hounsfield in zip(planes, read, strict=True):
            inside = abs(plane) < WELL_INSIDE
            image = inside * hounsfield + ~inside * image
        return image

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "windows", "windows": [[centre, width], ...]}`."""
        return {"kind": "windows", "windows": [list(window) for window in self.windows]}


@dataclass(frozen=True)
class Recorded:
    """Linear map of each image's own range, channel by channel, clipped outside."""

    rule: Literal["percentiles", "voi"]
    """Where the recorded ranges come from: `percentile_range` of the volume, or the window of interest in the header."""
    ranges: tuple[tuple[float, float], ...]
    """Nominal (low, high) of each channel, for images that have no range of their own: medians of the training images."""

    def channels(self, image_channels: int) -> int:
        """As many as the image has."""
        return image_channels

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """`(..., C, H, W)` in the source's unit -> `[-1, 1]`; without `ranges`, by the percentiles of each image itself."""
        low, width = _low_and_width(_measured(image) if ranges is None else ranges)
        return ((image - low) * (2 / (width + (width == 0))) - 1).clip(-1, 1)

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`[-1, 1]` -> the source's unit; without `ranges`, to the nominal ones."""
        low, width = _low_and_width(_like(unit, self.ranges) if ranges is None else ranges)
        return (unit + 1) * (width / 2) + low

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "recorded", "rule": .., "ranges": [[low, high], ...]}`."""
        return {"kind": "recorded", "rule": self.rule, "ranges": [list(pair) for pair in self.ranges]}


@dataclass(frozen=True)
class Labels:
    """Mask channels: label values, such as 0 1 2 4, <-> equally spaced values in `[-1, 1]`."""

    values: tuple[float, ...]
    """Ascending."""

    def __post_init__(self) -> None:
        if len(self.values) < 2 or list(self.values) != sorted(set(self.values)):
            raise InputError(f"labels {list(self.values)} of a mask: two or more different values, in ascending order, are expected")

    def channels(self, image_channels: int) -> int:
        """As many as the image has."""
        return image_channels

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """`(..., C, H, W)` label values -> `[-1, 1]`; a value that is no label is read as the nearest one."""
        middles = [(low + high) / 2 for low, high in zip(self.values, self.values[1:], strict=False)]
        return sum(1.0 * (image > middle) for middle in middles) * (2 / len(middles)) - 1

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`[-1, 1]` -> the value of the nearest label."""
        position = (unit + 1) * ((len(self.values) - 1) / 2)
        steps = [high - low for low, high in zip(self.values, self.values[1:], strict=False)]
        return sum(step * (position > index + 0.5) for index, step in enumerate(steps)) + float(self.values[0])

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "labels", "values": [...]}`."""
        return {"kind": "labels", "values": list(self.values)}


@dataclass(frozen=True)
class Stack:
    """Several maps, each for some of the image's channels, in order; mask channels come last."""

    parts: tuple[tuple[IntensityMap, int], ...]
    """(map, number of source channels that it takes)."""

    def __post_init__(self) -> None:
        kinds = [isinstance(part, Labels) for part, _ in self.parts]
        if kinds != sorted(kinds):
            raise InputError("a stack of intensity maps has its mask channels last")

    def channels(self, image_channels: int) -> int:
        """The sum over the parts; the image must have as many channels as they take."""
        taken = sum(count for _, count in self.parts)
        if image_channels != taken:
            raise InputError(f"the intensity map takes {taken} channels, these images have {image_channels}")
        return sum(part.channels(count) for part, count in self.parts)

    def to_unit(self, image: Any, ranges: Any = None) -> Any:
        """`(..., C, H, W)` in the source's unit -> `[-1, 1]`; `ranges` of all C source channels."""
        return self._apply([part.to_unit for part, _ in self.parts], [count for _, count in self.parts], image, ranges)

    def from_unit(self, unit: Any, ranges: Any = None) -> Any:
        """`[-1, 1]` -> the source's unit."""
        return self._apply([part.from_unit for part, _ in self.parts], [part.channels(count) for part, count in self.parts], unit, ranges)

    def _apply(self, maps: list[Callable[..., Any]], counts: list[int], image: Any, ranges: Any) -> Any:
        done, first, source = [], 0, 0
        for apply, count, (_, taken) in zip(maps, counts, self.parts, strict=True):
            own = None if ranges is None else ranges[..., source : source + taken, :]
            done.append(apply(image[..., first : first + count, :, :], own))
            first, source = first + count, source + taken
        return _join(done)

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "stack", "parts": [{"channels": .., "map": {..}}, ...]}`."""
        return {"kind": "stack", "parts": [{"channels": count, "map": part.to_dict()} for part, count in self.parts]}


def label_channels(intensity: IntensityMap, image_channels: int) -> int:
    """How many channels, the last ones both of an image and of it in `[-1, 1]`, hold labels that must not be mixed."""
    if isinstance(intensity, Stack):
        return sum(label_channels(part, count) for part, count in intensity.parts)
    return image_channels if isinstance(intensity, Labels) else 0


def unit_steps(intensity: IntensityMap, image_channels: int, ranges: Any = None) -> np.ndarray:
    """How far apart two neighbouring integers of the source are in `[-1, 1]`: `(..., channels)`; labels, their neighbours.

    `ranges` `(..., C, 2)` for a map that is recorded per image, which without them takes its nominal ones.
    """
    match intensity:
        case Stack():
            return _steps_of_parts(intensity, ranges)
        case Windows():
            return np.array([2 / width for _, width in intensity.windows])
        case Recorded():
            low, high = np.moveaxis(np.asarray(intensity.ranges if ranges is None else ranges, float), -1, 0)
            return 2 / np.where(high > low, high - low, 1.0)
        case Labels():
            return np.full(image_channels, 2 / (len(intensity.values) - 1))
        case _:
            return np.full(image_channels, 2 / (intensity.high - intensity.low))


def _steps_of_parts(stack: Stack, ranges: Any) -> np.ndarray:
    found, source = [], 0
    for part, taken in stack.parts:
        found.append(unit_steps(part, taken, None if ranges is None else np.asarray(ranges)[..., source : source + taken, :]))
        source += taken
    longest = max(found, key=lambda steps: steps.ndim).shape[:-1]
    return np.concatenate([np.broadcast_to(steps, (*longest, steps.shape[-1])) for steps in found], -1)


def nominal_ranges(intensity: IntensityMap, image_channels: int) -> tuple[tuple[float, float], ...]:
    """(low, high) of each source channel that `from_unit` gives back without `ranges`."""
    match intensity:
        case Stack():
            return tuple(pair for part, count in intensity.parts for pair in nominal_ranges(part, count))
        case Windows():
            ends = [(centre - width / 2, centre + width / 2) for centre, width in intensity.windows]
            return ((min(low for low, _ in ends), max(high for _, high in ends)),)
        case Recorded():
            return intensity.ranges
        case Labels():
            return ((intensity.values[0], intensity.values[-1]),) * image_channels
        case Range():
            return ((intensity.low, intensity.high),) * image_channels
    raise InputError(f"{type(intensity).__name__} is no intensity map that has a range")


def percentile_range(values: np.ndarray) -> tuple[float, float]:
    """0.5 and 99.5 percentile of the voxels that are not background, the most common value (0 where the skull is stripped).

    Where these are equal, as in a binary image, the smallest and the largest value: equal only in a constant image.
    """
    step = math.ceil(values.size / MOST_VOXELS)
    while any(math.gcd(step, side) > 1 for side in values.shape):
        # Such a step would visit some columns of the volume and never the others.
        step += 1
    voxels = values.ravel()[::step]
    shown = foreground(voxels)
    low, high = np.percentile(shown, PERCENTILES) if shown.size else (0.0, 0.0)
    return (float(low), float(high)) if low < high else (float(voxels.min()), float(voxels.max()))


def foreground(values: np.ndarray) -> np.ndarray:
    """`(N,)` the values that are not the most common one."""
    found, counts = np.unique(values, return_counts=True)
    return values[values != found[counts.argmax()]]


def parse_windows(names: tuple[str, ...]) -> Windows:
    """Windows from names of `CT_WINDOWS` or `CENTRE/WIDTH` in HU."""
    return Windows(tuple(_parse_window(name) for name in names))


def intensity_from_dict(record: dict[str, Any]) -> IntensityMap:
    """The map that `to_dict` recorded."""
    match record["kind"]:
        case "windows":
            return Windows(tuple((float(centre), float(width)) for centre, width in record["windows"]))
        case "recorded":
            return Recorded(record["rule"], tuple((float(low), float(high)) for low, high in record["ranges"]))
        case "labels":
            return Labels(tuple(record["values"]))
        case "stack":
            return Stack(tuple((intensity_from_dict(part["map"]), part["channels"]) for part in record["parts"]))
        case _:
            return Range(record["low"], record["high"])


def _parse_window(name: str) -> tuple[float, float]:
    if name in CT_WINDOWS:
        return CT_WINDOWS[name]
    try:
        centre, width = map(float, name.split("/"))
    except ValueError:
        raise InputError(f'--windows "{name}": expected one of {", ".join(CT_WINDOWS)} or CENTRE/WIDTH such as 40/80') from None
    if not width > 0 or not math.isfinite(centre + width):
        raise InputError(f'--windows "{name}": a number and a width above 0 are expected')
    return centre, width


def _low_and_width(ranges: Any) -> tuple[Any, Any]:
    """`(..., C, 2)` -> low and high - low, each `(..., C, 1, 1)`."""
    low, high = ranges[..., 0, None, None], ranges[..., 1, None, None]
    return low, high - low


def _measured(image: Any) -> Any:
    """`percentile_range` of each channel of each image: `(..., C, H, W)` -> `(..., C, 2)`."""
    planes = np.asarray(image.cpu() if hasattr(image, "new_tensor") else image)
    ranges = [percentile_range(plane) for plane in planes.reshape(-1, *planes.shape[-2:])]
    return _like(image, np.reshape(ranges, (*planes.shape[:-2], 2)).tolist())


def _like(image: Any, values: Any) -> Any:
    """Nested numbers as a float32 array of numpy, or of torch on the image's device."""
    if not hasattr(image, "new_tensor"):
        return np.asarray(values, np.float32)
    return image.float().new_tensor(values)


def _join(parts: list[Any]) -> Any:
    """Concatenate along the channels."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, -3)
    import torch

    return torch.cat([part.to(parts[0].dtype) for part in parts], -3)
