"""NIfTI volumes -> slices in the order and the orientation that radiologists look at them.

A volume is turned to RAS (first axis to the patient's right, then front, then up) by permuting and flipping axes; voxels
are never interpolated.
"""

import gzip
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from medsd.data.image import MOST_CHANNELS, check_size, narrow
from medsd.errors import InputError

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
MOST_EXTENSION_BYTES = 2**26
"""Voxels that begin later in the file are not looked for."""
LEAST_DETERMINANT = 1e-3
"""Axes closer than this to one plane give no orientation; 1 is that of a right angle between any two."""
FOREGROUND = 0.1
"""Share of a volume's intensity range above which a voxel shows something."""
LEAST_CONTENT = 0.1
"""A slice has content where its foreground is at least this share of the fullest slice's."""


@dataclass(frozen=True)
class Volume:
    """Voxels `(C, X, Y, Z)` in RAS order, in the source's unit, and their spacing `(X, Y, Z)` in mm."""

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    """`(4, 4)` from voxels to mm."""

    def slices(self, axis: str) -> Iterator[np.ndarray]:
        """Images `(C, H, W)` across `axis`, from the lowest (axial), the back (coronal) or the left (sagittal).

        Axial and coronal: the patient's right is on the left; axial: the front is up; coronal and sagittal: the head is
        up; sagittal: the front is on the left.
        """
        for index in range(self.depth(axis)):
            yield self.slice(axis, index)

    def slice(self, axis: str, index: int) -> np.ndarray:
        """Image `(C, H, W)` number `index` across `axis`."""
        plane = np.take(self.voxels, index, axis=AXES[axis] + 1)
        return np.ascontiguousarray(plane[:, ::-1, ::-1].swapaxes(1, 2))

    def voxels_from(self, other: "Volume") -> float:
        """Largest distance, in voxels, between a corner of this volume and that of another of the same shape."""
        corners = np.array([(*np.multiply(place, np.array(self.voxels.shape[1:]) - 1), 1) for place in np.ndindex(2, 2, 2)])
        return float(np.abs(corners @ (np.linalg.inv(other.affine) @ self.affine).T - corners).max())

    def depth(self, axis: str) -> int:
        """Number of slices across `axis`."""
        return self.voxels.shape[AXES[axis] + 1]

    def pixel_spacing(self, axis: str) -> tuple[float, float]:
        """(row, column) distance in mm within a slice."""
        column, row = (step for place, step in enumerate(self.spacing) if place != AXES[axis])
        return row, column

    def content(self, axis: str) -> np.ndarray:
        """Which slices show something: `(depth,)` bool. See `FOREGROUND` and `LEAST_CONTENT`."""
        first = self.voxels[0]
        low, high = np.percentile(first[::2, ::2, ::2], (0.5, 99.5))
        others = tuple(place for place in range(3) if place != AXES[axis])
        filled = (first > low + FOREGROUND * (high - low)).sum(others)
        return filled >= max(1, LEAST_CONTENT * filled.max())

    def occupied(self, axis: str) -> np.ndarray:
        """Which slices of a mask volume are not all 0: `(depth,)` bool."""
        return (self.voxels != 0).any(axis=tuple(place for place in range(4) if place != AXES[axis] + 1))


def read_volume(path: Path) -> Volume:
    """Read a NIfTI file of three axes, or of four where the last one is channels.

    Raises InputError for another shape, colour voxels, a size beyond reason, or voxels that are not finite.
    """
    import nibabel

    kind, header = _header(path)
    with _opened(path) as stream:
        # Not a byte more than the header tells of: a compressed file of some kB can hold GB, in its voxels or its extensions.
        content = stream.read(_check(header))
    image = nibabel.as_closest_canonical(kind.from_bytes(content))
    voxels = np.asarray(image.dataobj)
    del content
    voxels = narrow(np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
    return Volume(voxels, tuple(nibabel.affines.voxel_sizes(image.affine).tolist()), image.affine)


def volume_shape(path: Path) -> tuple[int, ...]:
    """Shape in RAS order, `(X, Y, Z)` or `(X, Y, Z, C)`, from the header alone."""
    from nibabel.orientations import io_orientation

    _, header = _header(path)
    _check(header)
    shape, order = header.get_data_shape(), io_orientation(header.get_best_affine())[:, 0].tolist()
    return tuple(shape[order.index(axis)] for axis in range(3)) + shape[3:]


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def _header(path: Path) -> tuple[Any, Any]:
    """nibabel's class for the file, NIfTI-1 or -2, and its header without extensions."""
    import nibabel

    with _opened(path) as stream:
        start = stream.read(nibabel.Nifti2Header.sizeof_hdr)
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.header_class.may_contain_header(start):
            return kind, kind.header_class(start[: kind.header_class.sizeof_hdr])
    raise InputError("not a NIfTI volume in one file")


def _check(header: Any) -> int:
    """Size in bytes that the header claims for the file. Raises InputError for what is not read here."""
    shape, dtype, offset, affine = header.get_data_shape(), header.get_data_dtype(), float(header["vox_offset"]), header.get_best_affine()
    if len(shape) not in {3, 4} or (len(shape) == 4 and shape[3] > MOST_CHANNELS):
        raise InputError(f"a volume of shape {shape}: three axes are expected, or a fourth of up to {MOST_CHANNELS} channels")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise InputError(f"voxels of type {dtype}: one number per voxel is expected")
    if np.isinf(header["scl_slope"]):  # nibabel would leave it away; it writes NaN itself where there is none.
        raise InputError("the header claims a slope that is infinite")
    scaled = header.get_slope_inter() not in {(None, None), (1.0, 0.0)}
    check_size(shape, 8 if scaled else dtype.itemsize)
    if not 0 <= offset <= MOST_EXTENSION_BYTES:
        raise InputError(f"the header claims that voxels begin at byte {offset:.4g}")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (np.isfinite(affine).all() and (spacing > 0).all() and abs(np.linalg.det(affine[:3, :3] / spacing)) > LEAST_DETERMINANT):
        raise InputError(f"the header claims voxels of {tuple(spacing.tolist())} mm along axes that are no three directions")
    return int(offset) + math.prod(map(int, shape)) * dtype.itemsize
