"""Sound files of every kind that is read, small, procedural and nobody's: what `mutations` breaks."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

SHARES = {"dicom": 45, "nifti": 20, "picture": 15, "table": 12, "array": 8}
"""Percent of the broken files that are made of each group."""


@dataclass(frozen=True)
class Seed:
    """A sound file, its group, and its kind in `mutations.MUTATIONS`; `reader` says which reader a table is for."""

    path: Path
    group: str
    kind: str
    reader: str = ""


def make_seeds(folder: Path, data: Path | None) -> list[Seed]:
    """Write the seeds into `folder`; `data` holds a `dicom_zoo` besides."""
    folder.mkdir(parents=True, exist_ok=True)
    zoo = sorted(path for path in (data / "dicom_zoo").rglob("*") if path.suffix in {".dcm", ".seg"}) if data else []
    own = list(_dicoms(folder))
    seeds = [Seed(path, "dicom", "dicom") for path in (*own * max(1, len(zoo) // max(1, len(own))), *zoo)]
    seeds += [Seed(path, "nifti", "nii.gz" if path.suffix == ".gz" else "nii") for path in _volumes(folder)]
    seeds += [Seed(path, "picture", path.suffix[1:]) for path in _pictures(folder)]
    seeds += [Seed(path, "array", path.suffix[1:]) for path in _arrays(folder)]
    return seeds + list(_tables(folder))


def _dicoms(folder: Path) -> Iterator[Path]:
    """Slices of the phantom, plain and compressed, several frames, colour, floats, one bit."""
    import pydicom
    from pydicom.uid import JPEGLSLossless, RLELossless

    from medsd.data.phantom import write_phantom

    write_phantom(folder / "phantom", patients=2, slices=3, size=48)
    for path in sorted((folder / "phantom" / "dicom").rglob("*.dcm")):
        yield path
    for name, syntax in (("rle", RLELossless), ("jpegls", JPEGLSLossless)):
        made = pydicom.dcmread(path)
        made.compress(syntax, generate_instance_uid=False)
        yield _saved(made, folder / f"{name}.dcm")
    generator = np.random.default_rng(0)
    shapes = {
        "frames": (np.uint16, (3, 16, 16)),
        "colour": (np.uint8, (16, 16, 3)),
        "float": (np.float32, (16, 16)),
        "wide": (np.int32, (16, 16)),
    }
    for name, (kind, shape) in shapes.items():
        yield _saved(_changed(pydicom.dcmread(path), generator.integers(0, 100, shape).astype(kind), name), folder / f"{name}.dcm")


def _changed(made: "Dataset", pixels: np.ndarray, name: str) -> "Dataset":
    """The slice with other pixels."""
    made.Rows = made.Columns = 16
    made.BitsAllocated = made.BitsStored = 8 * pixels.itemsize
    made.HighBit, made.PixelRepresentation = made.BitsStored - 1, int(pixels.dtype.kind == "i")
    made.PixelData = pixels.tobytes()
    if name == "float":
        del made.PixelData
        made.FloatPixelData = pixels.tobytes()
    if name == "frames":
        made.NumberOfFrames, made.PhotometricInterpretation = 3, "MONOCHROME1"
        made.add_new("PixelPaddingValue", "US", 7)
    if name == "colour":
        made.SamplesPerPixel, made.PlanarConfiguration, made.PhotometricInterpretation = 3, 0, "RGB"
    return made


def _saved(made: "Dataset", path: Path) -> Path:
    made.save_as(path, enforce_file_format=True)
    return path


def _volumes(folder: Path) -> Iterator[Path]:
    import nibabel

    generator = np.random.default_rng(0)
    for number, (kind, shape) in enumerate(((np.int16, (9, 10, 11)), (np.float32, (8, 8, 4)), (np.uint8, (6, 5, 4, 3)))):
        for version, suffix in ((nibabel.Nifti1Image, "nii"), (nibabel.Nifti1Image, "nii.gz"), (nibabel.Nifti2Image, "nii")):
            image = version(generator.integers(0, 200, shape).astype(kind), np.diag([-1.0, -1.0, 2.0, 1.0]))
            if number == 0:
                image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"nobody" * 8))
            if number == 1:
                image.header.set_slope_inter(0.5, 3)
            path = folder / f"{number}-{version.__name__}.{suffix}"
            nibabel.save(image, path)
            yield path


def _pictures(folder: Path) -> Iterator[Path]:
    from PIL import Image

    generator = np.random.default_rng(0)
    grey = generator.integers(0, 256, (24, 20), dtype=np.uint8)
    pictures = {"grey": Image.fromarray(grey), "colour": Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8))}
    deep = Image.fromarray(generator.integers(0, 65536, (24, 20)).astype(np.uint16))
    reals = Image.fromarray(generator.normal(size=(24, 20)).astype(np.float32))
    made = [(pictures[name], f"{name}.{suffix}", {}) for name in pictures for suffix in ("png", "jpg", "bmp", "tif")]
    made += [(deep, "deep.png", {}), (deep, "deep.tif", {}), (reals, "real.tif", {}), (pictures["colour"].quantize(16), "palette.png", {})]
    made += [(deep, f"{name}.tif", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "packbits")]
    made += [(deep, "pages.tif", {"save_all": True, "append_images": [deep, deep]})]
    for picture, name, options in made:
        picture.save(folder / name, **options)
        yield folder / name


def _arrays(folder: Path) -> Iterator[Path]:
    generator = np.random.default_rng(0)
    images = {f"{split}_images": generator.integers(0, 256, (4, 12, 12), dtype=np.uint8) for split in ("train", "test")}
    labels = {f"{split}_labels": np.arange(4, dtype=np.uint8)[:, None] % 2 for split in ("train", "test")}
    np.savez(folder / "plain.npz", **images, **labels)
    np.savez_compressed(folder / "packed.npz", **images, **labels)
    np.save(folder / "one.npy", generator.normal(size=(12, 12)))
    return iter([folder / "plain.npz", folder / "packed.npz", folder / "one.npy"])


def _tables(folder: Path) -> Iterator[Seed]:
    """Tables of twelve pictures, and RSNA's of four DICOM files; what they speak of lies in `FOLDER/pictures` and `FOLDER/rsna`."""
    from PIL import Image

    for name in ("pictures", "rsna"):
        (folder / name).mkdir(exist_ok=True)
    for index in range(12):
        Image.new("L", (8, 8), index * 20).save(folder / "pictures" / f"0-{index}.png")
    for index, path in enumerate(sorted((folder / "phantom" / "dicom").rglob("*.dcm"))[:4]):
        (folder / "rsna" / f"ID_000{index}.dcm").write_bytes(path.read_bytes())
    plain = [("file", "label", "patient", "split", "mask", "age", "sex")]
    plain += [(f"0-{index}.png", "ab"[index % 2], f"p{index}", "train", f"0-{11 - index}.png", 50 + index, "F") for index in range(12)]
    flags = [("image", "effusion", "nodule", "patient", "view")]
    flags += [(f"0-{index}", index % 2, (-1, 0, 1, "")[index % 4], f"p{index}", "PA") for index in range(12)]
    names = [("file", "findings", "patient")]
    names += [(f"0-{index}.png", ("Effusion|Nodule", "No Finding", "Nodule")[index % 3], f"p{index}") for index in range(12)]
    kinds = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
    rsna = [("ID", "Label")] + [(f"ID_000{index}_{kind}", int(kind in {"any", "subdural"})) for index in range(4) for kind in kinds]
    for reader, lines in {"table": plain, "flags": flags, "names": names, "rsna2019": rsna}.items():
        with (folder / f"{reader}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(lines)
        yield Seed(folder / f"{reader}.csv", "table", "csv", reader)
