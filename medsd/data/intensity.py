"""Intensity maps: invertible maps between an image in the source's own unit and `[-1, 1]`.

A map is recorded with the data (`to_dict`) and applied when an image is used. All functions take numpy arrays or torch
tensors `(..., C, H, W)` and use arithmetic that both have, so that the training device does the work.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from medsd.errors import InputError

CT_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40.0, 80.0),
    "subdural": (80.0, 200.0),
    "bone": (600.0, 2800.0),
    "lung": (-600.0, 1500.0),
    "abdomen": (40.0, 400.0),
}
"""(centre, width) in HU."""


class IntensityMap(Protocol):
    """Source unit <-> `[-1, 1]`."""

    def channels(self, image_channels: int) -> int:
        """Number of channels after `to_unit` of an image with `image_channels`."""

    def to_unit(self, image: Any) -> Any:
        """Image in the source's unit `(..., C, H, W)` -> `[-1, 1]`."""

    def from_unit(self, unit: Any) -> Any:
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

    def to_unit(self, image: Any) -> Any:
        """`(..., C, H, W)` in the source's unit -> `[-1, 1]`."""
        return ((image - self.low) * (2 / (self.high - self.low)) - 1).clip(-1, 1)

    def from_unit(self, unit: Any) -> Any:
        """`[-1, 1]` -> the source's unit."""
        return (unit + 1) * ((self.high - self.low) / 2) + self.low

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "range", "low": .., "high": ..}`."""
        return {"kind": "range"} | asdict(self)


@dataclass(frozen=True)
class Windows:
    """CT windows, one output channel each: `(..., 1, H, W)` HU <-> `(..., n, H, W)` for n windows."""

    windows: tuple[tuple[float, float], ...]

    def channels(self, image_channels: int) -> int:
        """One per window; the image must have one channel."""
        if image_channels != 1:
            raise InputError(f"CT windows need images of 1 channel, these have {image_channels}: leave --windows away")
        return len(self.windows)

    def to_unit(self, image: Any) -> Any:
        """`(..., 1, H, W)` HU -> `(..., n, H, W)` in `[-1, 1]`."""
        stacked = image[..., [0] * len(self.windows), :, :] * 1.0
        for index, (centre, width) in enumerate(self.windows):
            stacked[..., index, :, :] = ((stacked[..., index, :, :] - centre) * (2 / width)).clip(-1, 1)
        return stacked

    def from_unit(self, unit: Any) -> Any:
        """`(..., n, H, W)` in `[-1, 1]` -> `(..., 1, H, W)` HU.

        Each pixel is read from the narrowest window that does not saturate there; where all do, from the widest.
        """
        order = sorted(range(len(self.windows)), key=lambda index: -self.windows[index][1])
        image = None
        for index in order:
            centre, width = self.windows[index]
            plane = unit[..., index : index + 1, :, :]
            hounsfield = plane * (width / 2) + centre
            inside = abs(plane) < 1
            image = hounsfield if image is None else inside * hounsfield + ~inside * image
        return image

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "windows", "windows": [[centre, width], ...]}`."""
        return {"kind": "windows", "windows": [list(window) for window in self.windows]}


def parse_windows(names: tuple[str, ...]) -> Windows:
    """Windows from names of `CT_WINDOWS` or `CENTRE/WIDTH` in HU."""
    return Windows(tuple(_parse_window(name) for name in names))


def intensity_from_dict(record: dict[str, Any]) -> IntensityMap:
    """The map that `to_dict` recorded."""
    if record["kind"] == "windows":
        return Windows(tuple((float(centre), float(width)) for centre, width in record["windows"]))
    return Range(record["low"], record["high"])


def _parse_window(name: str) -> tuple[float, float]:
    if name in CT_WINDOWS:
        return CT_WINDOWS[name]
    try:
        centre, width = map(float, name.split("/"))
    except ValueError:
        raise InputError(f'--windows "{name}": expected one of {", ".join(CT_WINDOWS)} or CENTRE/WIDTH such as 40/80') from None
    if width <= 0:
        raise InputError(f'--windows "{name}": the width must be above 0')
    return centre, width
