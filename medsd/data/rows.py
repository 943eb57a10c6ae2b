"""What a source gives: rows to decode, and the words that sources share."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medsd.data.metadata import Facts
from medsd.errors import InputError

Accepts = Callable[[Path], bool]
"""Which file names are images."""
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
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
    group: str | None = None
    """The folder that is the patient where neither a table nor a header says who is."""

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


def images_below(folder: Path, accepts: Accepts) -> list[Path]:
    """Image files below a folder, in order, without hidden ones and those in hidden folders."""
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder")
    found = (file for file in folder.rglob("*") if accepts(file) and file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def words_of(name: str) -> list[str]:
    """`"BraTS20_Training_001_t1ce"` -> `["brats20", "training", "001", "t1ce"]`."""
    return re.split(r"[_\-.\s]+", name.lower())


def stem_of(name: str) -> str:
    """A file's name without its suffix, `.nii.gz` counting as one."""
    return Path(name.removesuffix(".gz") if name.lower().endswith(".nii.gz") else name).stem


def relative(file: Path, folder: Path) -> str:
    """The path below `folder`, or the name of a file that lies elsewhere."""
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) and file != folder else file.name


def split_name(value: str, where: str) -> str:
    """The split that a word of a table or of a folder means."""
    name = SPLIT_NAMES.get(value.strip().lower())
    if name is None:
        raise InputError(f'{where}: split "{value}" is none of {", ".join(SPLIT_NAMES)}')
    return name
