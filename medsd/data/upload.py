"""One file that somebody hands to a running program: read where it may crash, and gone afterwards.

An *upload* is trusted in nothing. A process of its own decodes it under the limits of `medsd.data.prepare` and ends with it; what comes
back is already at the model's size, and says in whose unit it is.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.decode import Decoded, DecodeOptions, decode_row
from medsd.data.intensity import Range, Recorded
from medsd.data.ranges import joint_percentiles
from medsd.data.rows import Row
from medsd.data.workers import Announce, Job, WorkerPool
from medsd.errors import InputError

SECONDS = 60.0
"""From one slice to the next."""
MOST_SECONDS = 300.0
"""For all of them."""
MEMORY = 4 * 2**30
"""Bytes that decoding may take."""
MOST_KEPT = 2**28
"""Bytes of all slices at the model's size."""
EIGHT_BITS = Range(0.0, 255.0)


@dataclass(frozen=True)
class Upload:
    """The N slices or frames of a file; an image is one."""

    images: np.ndarray
    """`(N, C, R, R)` in the source's unit, at the model's resolution R."""
    modality: str | None
    """What a DICOM header says of itself: CT, MR, ...; None where nothing does."""
    ranges: np.ndarray | None
    """`(N, C, 2)`: low and high of each channel, for an intensity map that is recorded per image and where the file tells it."""
    longest: int
    """Pixels of the longer side, at the model's size and without padding."""

    def __len__(self) -> int:
        return len(self.images)

    @property
    def middle(self) -> int:
        """Number of the middle slice, from 0."""
        return len(self) // 2

    def range_of(self, number: int) -> np.ndarray | None:
        """`(1, C, 2)` of one slice."""
        return None if self.ranges is None else self.ranges[number : number + 1]

    def remarks(self, data: DataInfo) -> list[str]:
        """What makes answers about it less sure than they look, a sentence each."""
        found, recorded = [], isinstance(data.intensity_map, Recorded)
        if recorded and (self.ranges is None or (data.intensity_map.rule == "percentiles" and len(self) == 1)):
            found.append("Its brightness was measured on this slice alone, and the model learnt from ranges of whole series or volumes.")
        if self.longest < data.resolution:
            found.append(f"It is {self.longest} px where the model sees {data.resolution} px, so background surrounds it.")
        return found


def take_upload(path: Path, data: DataInfo) -> Upload:
    """Read a file for a model of such `data`, and delete it whatever it is.

    Raises InputError for what cannot be read within the limits or is not in the model's unit; it names no folder.
    """
    try:
        upload = _read_apart(path, data)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()  # Unless something else lies in it.
    _check_unit(upload, data)
    return upload


def _read_apart(path: Path, data: DataInfo) -> Upload:
    """In a process that may be killed."""
    with WorkerPool(1, SECONDS, MEMORY) as pool:
        pool.submit(Job(read_upload, (path, data)))
        outcome = next(pool.outcomes())
    if outcome.failure is not None:
        raise InputError(f"{path.name}: {outcome.failure}")
    return outcome.result


def read_upload(path: Path, data: DataInfo, announce: Announce = lambda step: None) -> Upload:
    """Every slice of a file at the model's size; a NIfTI volume's are axial. Raises InputError."""
    options, slices, size, end = DecodeOptions(data.resolution, data.resize, slices="all"), [], 0, monotonic() + MOST_SECONDS
    for number, decoded in enumerate(decode_row(Row(path.name, (path,)), options)):
        announce(number)
        size += decoded.image.nbytes
        if size > MOST_KEPT or monotonic() > end:
            raise InputError(f"{path.name}: more than {number} slices, too many for a look: cut out those that matter")
        if slices and decoded.image.shape != slices[0].image.shape:
            raise InputError(f"{path.name}: frames of {len(slices[0].image)} and of {len(decoded.image)} channels: save them apart")
        slices.append(decoded)
    if not slices:
        raise InputError(f"{path.name}: holds no image")
    return Upload(np.stack([one.image for one in slices]), slices[0].header.modality, _ranges(slices, data), _longest(slices[0]))


def _longest(decoded: Decoded) -> int:
    return max(decoded.image.shape[1:] if decoded.content is None else decoded.content.shape[1:])


def _ranges(slices: list[Decoded], data: DataInfo) -> np.ndarray | None:
    """By the rule that the model's training images were measured by."""
    if not isinstance(data.intensity_map, Recorded):
        return None
    channels = len(slices[0].image)
    if data.intensity_map.rule == "voi":
        found = [one.header.voi for one in slices]
    elif all(one.ranges for one in slices):
        return np.float32([one.ranges for one in slices]).reshape(len(slices), channels, 2)
    else:
        measured = [(one.quantiles, one.foreground) for one in slices if one.quantiles]
        found = [joint_percentiles(measured) if len(measured) == len(slices) else None] * len(slices)
    if not all(pair and pair[0] < pair[1] for pair in found):
        return None
    return np.float32(found)[:, None].repeat(channels, 1)


def _check_unit(upload: Upload, data: DataInfo) -> None:
    """Raise InputError for values that would be taken for others."""
    hounsfield = data.unit == "HU"
    if hounsfield and upload.modality not in {None, "CT"}:
        raise InputError("its header says that it is no CT image, and this model reads CT in HU")
    if hounsfield and upload.images.dtype == np.uint8:
        raise InputError("grey values of 8 bits, and this model reads HU: drop the DICOM or NIfTI file that the picture was made from")
    if not hounsfield and upload.modality == "CT":
        raise InputError(f"a CT image in HU, and this model reads {data.unit}s")
    if data.intensity_map == EIGHT_BITS and (upload.images.min() < 0 or upload.images.max() > 255):
        low, high = upload.images.min(), upload.images.max()
        raise InputError(f"values from {low:g} to {high:g}, and this model reads 0 to 255: save it as a picture of 8 bits")
