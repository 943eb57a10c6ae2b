"""A collection on disk -> rows: which file, which label, which patient, which split.

Sources read names and tables only; pixels and headers are `files`' business.
"""

import csv
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsd.data.files import is_raster
from medsd.data.metadata import Facts
from medsd.errors import InputError

Accepts = Callable[[Path], bool]
"""Which file names are images."""
IMAGE_COLUMNS = ("file", "path", "image", "image_id", "filename", "dicom_name")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to decode: an image, all frames of a file, or one slice stack of volumes."""

    name: str
    """How messages call it and what its key is made of: the path below the data folder; unique."""
    files: tuple[Path, ...]
    """The image; or co-registered volumes, one channel each, in this order."""
    findings: tuple[str, ...] = ()
    """What it shows: one class, or any number of findings of a multi-label collection."""
    patient: str | None = None
    split: str | None = None
    mask: Path | None = None
    array: str | None = None
    """Member of an npz."""
    index: int | None = None
    """Row of that member."""
    facts: Facts = Facts()
    """Age, sex, view of the collection's table."""

    @property
    def file(self) -> Path:
        """The image, or its first channel."""
        return self.files[0]

    @property
    def label(self) -> str:
        """The class of a row that has just one."""
        return self.findings[0]


@dataclass(frozen=True)
class Collection:
    """Rows, and what the collection fixes for all of them."""

    rows: list[Row]
    class_names: tuple[str, ...] | None = None
    """Order of the classes; None: sorted as found."""
    multi_label: bool = False
    mask_classes: tuple[str, str] | None = None
    """Classes of slices without and with something in the mask, where rows have no findings."""
    mask_channel: bool = False
    """Whether the mask is stacked behind the image's channels rather than kept as a column of its own."""
    prompt_template: str | None = None
    notes: tuple[str, ...] = ()
    """What was left out, a sentence each with counts, for the terminal."""


def image_folder(folder: Path, accepts: Accepts = is_raster) -> list[Row]:
    """`FOLDER/CLASS/...` or `FOLDER/train|val|test/CLASS/...`: a row per file, labelled by its folder."""
    parts = _subfolders(folder)
    splits = [part for part in parts if part.name.lower() in SPLIT_NAMES]
    if not splits:
        return _classes(folder, folder, accepts, None)
    if len(splits) < len(parts):
        other = next(part.name for part in parts if part not in splits)
        raise InputError(f"{folder} holds {splits[0].name} and {other}: folders are either splits or classes; move the others away")
    return [row for part in parts for row in _classes(folder, part, accepts, SPLIT_NAMES[part.name.lower()])]


def table(
    folder: Path,
    labels: Path,
    label_column: str,
    image_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    mask_column: str | None = None,
    accepts: Accepts = is_raster,
) -> list[Row]:
    """A row per line of the CSV `labels`, its file looked up below `folder` by path, name or stem."""
    lines = _read_csv(folder, labels)
    image_column = image_column or next((name for name in IMAGE_COLUMNS if name in lines[0]), None)
    if image_column is None:
        raise InputError(f"{labels.name} has none of the columns {', '.join(IMAGE_COLUMNS)}: name one with --image_column")
    for flag, column in {"image": image_column, "label": label_column, "patient": patient_column, "split": split_column}.items():
        if column is not None and column not in lines[0]:
            raise InputError(f'{labels.name} has no column "{column}" (--{flag}_column); it has {", ".join(lines[0])}')
    files = _FileIndex(folder, accepts)
    rows = []
    for number, line in enumerate(lines, start=2):
        label = line[label_column].strip()
        if not label:
            raise InputError(f'{labels.name}, line {number}: "{label_column}" is empty; give the image a label or drop the line')
        file = files.find(line[image_column].strip(), f"{labels.name}, line {number}")
        rows.append(
            Row(
                name=_relative(file, folder),
                files=(file,),
                findings=(label,),
                patient=line[patient_column].strip() or None if patient_column else None,
                split=_split_name(line[split_column], f"{labels.name}, line {number}") if split_column else None,
                mask=folder / line[mask_column] if mask_column else None,
            )
        )
    twice = next((name for name, count in Counter(row.name for row in rows).items() if count > 1), None)
    if twice is not None:
        raise InputError(f"{labels.name} has several lines for {twice}: one line, with one label, is expected")
    return rows


def medmnist(path: Path, class_names: Sequence[str] | None = None) -> list[Row]:
    """A MedMNIST npz: `train_images`, `train_labels`, and the same for `val` and `test`; its splits are kept."""
    file = _only_npz(path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            splits = [name.removesuffix("_images") for name in archive.files if name.endswith("_images")]
            labels = {split: archive[f"{split}_labels"] for split in splits if f"{split}_labels" in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
        raise InputError(f"{file.name} is not an npz that can be read ({error})") from error
    if not splits:
        raise InputError(f"{file.name}: no array ends in _images; a MedMNIST npz has train_images, train_labels, ...")
    rows = []
    for split in splits:
        if split not in labels:
            raise InputError(f"{file.name}: {split}_images has no {split}_labels beside it")
        if labels[split].size != len(labels[split]):
            raise InputError(f"{file.name}: several labels an image in {split}_labels; one is expected")
        for index, value in enumerate(labels[split].ravel()):
            rows.append(
                Row(
                    name=f"{file.name}:{split}_images[{index}]",
                    files=(file,),
                    findings=(_class_name(int(value), class_names),),
                    split=_split_name(split, file.name),
                    array=f"{split}_images",
                    index=index,
                )
            )
    return rows


def _class_name(value: int, class_names: Sequence[str] | None) -> str:
    if class_names is None:
        return str(value)
    if not 0 <= value < len(class_names):
        raise InputError(f"label {value} has no name in --class_names {' '.join(class_names)}")
    return class_names[value]


def _only_npz(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
        raise InputError(f"--data_dir {path}: {len(found)} npz files; name one file")
    return found[0]


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder")
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path, accepts: Accepts) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and accepts(file) and not file.name.startswith("."))


def _classes(root: Path, folder: Path, accepts: Accepts, split: str | None) -> list[Row]:
    classes = _subfolders(folder)
    if not classes:
        raise InputError(f"{folder}: no folders in it; one folder per class is expected")
    rows = []
    for child in classes:
        files = _images(child, accepts)
        if not files:
            raise InputError(f"class {child.name}: no image in {_relative(child, root)}; fill the folder or remove it")
        rows += [Row(name=_relative(file, root), files=(file,), findings=(child.name,), split=split) for file in files]
    return rows


def _read_csv(folder: Path, labels: Path) -> list[dict[str, str]]:
    file = folder / labels if (folder / labels).is_file() else labels
    if not file.is_file():
        raise InputError(f"--labels {labels}: no such file, neither here nor in {folder}")
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            lines = [{key: value or "" for key, value in line.items() if key is not None} for line in csv.DictReader(stream)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--labels {labels} cannot be read ({error}): save it as comma-separated UTF-8") from error
    if not lines:
        raise InputError(f"--labels {labels}: no line in it")
    return lines


def _split_name(value: str, where: str) -> str:
    name = SPLIT_NAMES.get(value.strip().lower())
    if name is None:
        raise InputError(f'{where}: split "{value}" is none of {", ".join(SPLIT_NAMES)}')
    return name


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


class _FileIndex:
    """Files below a folder by relative path, by name and by stem; a name that several files share is refused."""

    def __init__(self, folder: Path, accepts: Accepts) -> None:
        if not folder.is_dir():
            raise InputError(f"--data_dir {folder}: no such folder")
        self.folder = folder
        files = _images(folder, accepts)
        self.paths = {_relative(file, folder): file for file in files}
        self.counts = Counter(name for file in files for name in {file.name, file.stem})
        self.names = {name: file for file in files for name in (file.name, file.stem)}

    def find(self, name: str, where: str) -> Path:
        if name in self.paths:
            return self.paths[name]
        if self.counts[name] > 1:
            raise InputError(f'{where}: {self.counts[name]} files are called "{name}"; give their paths relative to --data_dir')
        if name not in self.names:
            raise InputError(f'{where}: image "{name}" is not below {self.folder}; drop the line or add the file')
        return self.names[name]
