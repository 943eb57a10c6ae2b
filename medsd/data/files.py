"""One image file -> pixels `(C, H, W)` in the source's own unit, and an allow-list of header facts.

Nothing else leaves a header, not even as a library's warning. A *frame* is one image of a file that holds several: a
multi-frame DICOM, a TIFF of several pages. DICOM, NIfTI, PNG, TIFF, JPEG and BMP, NPY, and arrays inside an NPZ; never a pickle.
"""

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.arrays import read_array
from medsd.data.image import MOST_BYTES, SourceImage, channels_first, check_size, narrow
from medsd.errors import InputError

RASTER_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"})
RASTER_FORMATS = ("PNG", "TIFF", "JPEG", "BMP")
"""What Pillow may take a file for, whatever its suffix says; it knows some fifty kinds, one of which runs Ghostscript."""
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima", ".seg"})
MOST_FILE_BYTES = 4 * MOST_BYTES
"""`read_image` stacks the frames of a file up to this size."""
BITS_PER_SAMPLE, PHOTOMETRIC, SUBFILE_TYPE, SAMPLE_FORMAT = 258, 262, 254, 339
"""Tags of a TIFF page."""


def is_raster(path: Path) -> bool:
    """Whether the name is that of a PNG, TIFF, JPEG or BMP."""
    return path.suffix.lower() in RASTER_SUFFIXES


def is_dicom(path: Path) -> bool:
    """Whether a file can be a DICOM image: by its suffix, or without one (or with a number, the end of a UID) by its first bytes."""
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    return (not path.suffix or path.suffix[1:].isdigit()) and path.name != "DICOMDIR" and _has_preamble(path)


def _has_preamble(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI volume."""
    return path.name.lower().endswith((".nii", ".nii.gz"))


def read_image(path: str | Path, frame: int | None = None) -> np.ndarray:
    """Pixels `(C, H, W)` of one image file in the source's own unit: HU for CT, grey values else.

    A file of several frames gives `(N, C, H, W)`, or the one that `frame` names; the frames of a NIfTI volume are its
    axial slices from the lowest, seen as radiologists do (the patient's right is left, the front is up).

    Raises InputError for a missing file, an unknown suffix, a frame that is not there, or a file that cannot be decoded.
    """
    path, frames, size = Path(path), [], 0
    for number, image in enumerate(read_frames(path)):
        if number == frame:
            return np.require(image.pixels, requirements="W")
        frames.append(image.pixels if frame is None else None)
        size += image.pixels.nbytes
        if frame is None and size > MOST_FILE_BYTES:
            raise InputError(
                f"{path.name}: frames of more than {MOST_FILE_BYTES / 2**30:.0f} GiB; read them one by one with frame=0, 1, ..."
            )
    if frame is not None:
        raise InputError(f"{path.name}: frame {frame} of {len(frames)}; they count from 0")
    return _stacked(frames, path)


def _stacked(frames: list[np.ndarray], path: Path) -> np.ndarray:
    """One frame as it is, several as `(N, C, H, W)`; where some are grey and others colour, grey becomes colour."""
    if len({frame.shape[1:] for frame in frames}) != 1:
        raise InputError(f"{path.name}: {len(frames)} frames of different sizes; read them one by one with frame=0, 1, ...")
    channels = max(map(len, frames))
    if len(frames) == 1:
        return np.require(frames[0], requirements="W")
    return np.stack([np.broadcast_to(frame, (channels, *frame.shape[1:])) for frame in frames])


def read_file(path: Path, array: str | None = None, index: int | None = None) -> SourceImage:
    """The one image of a file. In an npz, `array` names the member and `index` the row of `(N, H, W)` or `(N, H, W, C)`.

    Raises InputError, naming the file and what is wrong with it.
    """
    frames = list(read_frames(path, array, index))
    if len(frames) != 1:
        raise InputError(f"{path.name}: {len(frames)} frames in one file; one is expected here")
    return frames[0]


def read_mask(path: Path) -> np.ndarray:
    """Labels `(1, H, W)` of a mask; those of a palette image are its indices.

    Raises InputError as `read_file` does, and for a mask in colours.
    """
    if not (is_raster(path) and path.is_file()):
        labels = read_file(path).pixels
    else:
        with readable(path):
            pages = [frame.pixels for frame in _raster_frames(path, colours=False)]
        if len(pages) != 1:
            raise InputError(f"{path.name}: {len(pages)} frames in one file; one is expected here")
        labels = pages[0]
    if len(labels) != 1:
        raise InputError(f"{path.name}: a mask of {len(labels)} channels; one grey value per label is expected")
    return labels


def read_frames(path: Path, array: str | None = None, index: int | None = None) -> Iterator[SourceImage]:
    """Every frame of a file, decoded one by one.

    Raises InputError, naming the file and what is wrong with it.
    """
    frames = _frames(path, array, index)
    while True:
        with readable(path):
            image = next(frames, None)
        if image is None:
            return
        yield image


def _frames(path: Path, array: str | None, index: int | None) -> Iterator[SourceImage]:
    if not path.is_file():
        raise InputError("no such file")
    if is_raster(path):
        yield from _raster_frames(path)
    elif is_nifti(path):
        from medsd.data.nifti import read_volume

        yield from map(SourceImage, read_volume(path).slices("axial"))
    elif path.suffix.lower() in {".npy", ".npz"}:
        yield SourceImage(channels_first(narrow(read_array(path, array, index))))
    elif is_dicom(path):
        from medsd.data.dicom import dicom_frames

        yield from dicom_frames(path)
    else:
        raise InputError("not a kind of image that is read here (DICOM, NIfTI, PNG, TIFF, JPEG, BMP, NPY, NPZ)")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an InputError that names the file, and silence what it says beside that.

    Decoders written in Rust raise a BaseException when they panic, hence the wide net.
    """
    try:
        with _quiet:
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{path.name}: needs more memory than there is") from error
    except BaseException as error:
        raise InputError(f"{path.name}: cannot be decoded ({type(error).__name__}: {_in_short(error)})") from error


def _in_short(error: BaseException) -> str:
    """A library's message as one line, without what it quotes: that may be a header's value."""
    text = re.sub(r"""(?<!\w)(['"]).*?\1(?!\w)""", "...", " ".join(str(error).split()))
    return text if len(text) <= 200 else text[:200] + "..."


class _Quiet:
    """Silences Python's warnings and the loggers of pydicom and nibabel, which quote headers, while any thread is inside."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.caught: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
                self._let_loggers_speak(False)
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self._let_loggers_speak(True)
                self.caught.__exit__(None, None, None)

    def _let_loggers_speak(self, speak: bool) -> None:
        logging.getLogger("pydicom").propagate = speak
        logging.getLogger("nibabel.global").disabled = not speak


_quiet = _Quiet()


def _raster_frames(path: Path, colours: bool = True) -> Iterator[SourceImage]:
    """Frames of a PNG, TIFF, JPEG or BMP; without `colours`, indices stand for those of a palette."""
    from PIL import Image, ImageSequence

    # From a stream, since Pillow maps a file that it is given by name and then takes a turned TIFF's sides for each other.
    with path.open("rb") as stream, Image.open(stream, formats=RASTER_FORMATS) as image:
        # The further images of a JPEG (MPO) are previews and gain maps of the first.
        for frame in [image] if image.format == "MPO" else ImageSequence.Iterator(image):
            check_size((frame.height, frame.width, len(frame.getbands())), 4)
            tags = getattr(frame, "tag_v2", {})
            if tags.get(SUBFILE_TYPE, 0) & 0b101:  # A page that is a smaller copy, or a mask, of another.
                continue
            _check_depth(frame, tags)
            unsigned = frame.mode == "I" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1 and tags.get(BITS_PER_SAMPLE) == (32,)
            yield SourceImage(pixels_of(frame, np.uint32 if unsigned else None, colours))


def _check_depth(image: Any, tags: Any) -> None:
    """Refuse what Pillow would read as something else."""
    raw_mode = image.tile[0][3] if image.tile else ""
    if len(image.getbands()) > 1 and (";16" in str(raw_mode) or max(tags.get(BITS_PER_SAMPLE, (8,))) > 8):
        raise InputError("colour of 16 bits, of which Pillow would keep 8: save it as one 16-bit grey image per channel")
    if tags.get(PHOTOMETRIC) == 0 and image.mode not in {"1", "L"}:
        raise InputError("a TIFF of more than 8 bits in which 0 is white, which Pillow does not turn: save it with 0 as black")


def pixels_of(image: Any, kind: type | None = None, colours: bool = True) -> np.ndarray:
    """A PIL image of any mode -> `(C, H, W)` with its own depth, turned as its EXIF says; transparency is dropped.

    `kind` is the type that 32 bits stand for where it is not Pillow's own, int32. Palettes become colour unless `colours` is false.
    """
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode in {"PA", "CMYK", "YCbCr", "LAB", "HSV"} or (image.mode == "P" and colours):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    pixels = pixels[..., :-1] if image.mode in {"LA", "La", "RGBA", "RGBa"} else pixels
    pixels = pixels.view(kind) if kind else pixels
    return channels_first(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else narrow(pixels))
