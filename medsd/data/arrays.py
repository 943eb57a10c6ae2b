"""NPY files and members of an NPZ, without pickle and without holding an archive in memory."""

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from medsd.data.image import check_size
from medsd.errors import InputError


def read_array(path: Path, member: str | None = None, index: int | None = None) -> np.ndarray:
    """The array of an npy; or an npz's only array or `member`, of which `index` picks one row of the first axis.

    Raises InputError for an archive of several arrays without `member`, and for a header that claims too much.
    """
    if path.suffix.lower() == ".npy":
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        _check_numbers(mapped.dtype)
        check_size(mapped.shape, mapped.itemsize)
        return np.array(mapped)
    array = _open_member(path, member, path.stat().st_mtime_ns)
    return array.row(index) if index is not None else array.all()


class NpzMember:
    """One array of an npz, read row by row. Rows in order cost one pass over the archive."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self.fortran, self.dtype = read_header(stream)
        _check_numbers(self.dtype)
        self.start = stream.tell()

    def row(self, index: int) -> np.ndarray:
        """Row `index` of the first axis."""
        if not self.shape or not 0 <= index < self.shape[0]:
            raise InputError(f"row {index} of an array of shape {self.shape}")
        if self.fortran or len(self.shape) < 2:
            return self.all()[index]
        check_size(self.shape[1:], self.dtype.itemsize)
        size = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self.stream.seek(self.start + index * size)
        return self._read(self.shape[1:])

    def all(self) -> np.ndarray:
        """The whole array; one without elements is none the less an array."""
        if min(self.shape, default=1) == 0:
            return np.empty(self.shape, self.dtype)
        check_size(self.shape, self.dtype.itemsize)
        self.stream.seek(self.start)
        array = self._read(self.shape[::-1] if self.fortran else self.shape)
        return array.T if self.fortran else array

    def _read(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * self.dtype.itemsize
        content = self.stream.read(size)
        if len(content) != size:
            raise InputError(f"{len(content)} of {size} bytes: the file is cut short")
        return np.frombuffer(content, self.dtype).reshape(shape)


def _check_numbers(dtype: np.dtype) -> None:
    """Refuse Python objects, and types of no bytes, of which a file can claim any number."""
    if dtype.kind not in "biuf":
        raise InputError(f"an array of type {dtype}; whole or real numbers are expected")


def array_names(path: Path) -> list[str]:
    """The names of an npz's arrays, in its order."""
    with zipfile.ZipFile(path) as archive:
        return _names(archive)


def array_shape(path: Path, member: str) -> tuple[int, ...]:
    """The shape of an npz's array, from its header."""
    return _open_member(path, member, path.stat().st_mtime_ns).shape


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


@lru_cache(maxsize=4)
def _open_member(path: Path, member: str | None, modified: int) -> NpzMember:
    """`modified` is the time of the file's last change, so that a new file under an old name is opened anew."""
    archive = zipfile.ZipFile(path)
    names = _names(archive)
    if member is None and len(names) != 1:
        raise InputError(f"holds {len(names)} arrays ({', '.join(names[:5])}); one is expected")
    if member is not None and member not in names:
        raise InputError(f"holds no array {member}, but {', '.join(names[:5])}")
    return NpzMember(archive.open(f"{member or names[0]}.npy"))
