"""CSV tables joined to the files that they speak of."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO

from medsd.data.metadata import Facts, known_facts
from medsd.data.rows import Row, split_name, stem_of
from medsd.errors import InputError

IMAGE_COLUMNS = ("file", "path", "image", "image_id", "filename", "dicom_name", "image index")
FACT_NAMES = {
    "age": ("age", "patientage"),
    "sex": ("sex", "gender", "patientsex", "patientgender", "mf"),
    "view": ("view", "projection", "viewposition", "appa"),
    "manufacturer": ("manufacturer", "scanner"),
}
"""Columns that say something of the patient or the acquisition, without capitals and signs."""
YES_NO = {"1": True, "1.0": True, "true": True, "yes": True, "0": False, "0.0": False, "false": False, "no": False}
UNCERTAIN = frozenset({"", "-1", "-1.0", "nan"})
NO_FINDING = frozenset({"no finding", "no findings"})


@dataclass(frozen=True)
class Columns:
    """Which columns of a table mean what; None: none does."""

    labels: tuple[str, ...]
    image: str | None = None
    patient: str | None = None
    split: str | None = None
    mask: str | None = None

    def checked(self, header: Iterable[str], name: str) -> "Columns":
        """With the column of the image found; raises InputError for a column that is not there."""
        lower = {column.lower(): column for column in header}
        image = self.image or next((lower[column] for column in IMAGE_COLUMNS if column in lower), None)
        if image is None:
            raise InputError(f"{name} has none of the columns {', '.join(IMAGE_COLUMNS)}: name one with --image_column")
        flags = [("image", image), *(("label", label) for label in self.labels)]
        flags += [("patient", self.patient), ("split", self.split), ("mask", self.mask)]
        for flag, column in flags:
            if column is not None and column not in header:
                raise InputError(f'{name} has no column "{column}" (--{flag}_column); it has {", ".join(header)}')
        return replace(self, image=image)


Rule = Callable[[dict[str, str], tuple[str, ...], str], tuple[str, ...] | None]
"""(line, label columns, where) -> findings; None leaves the image out."""


def join(index: "Index", lines: list[dict[str, str]], name: str, columns: Columns, rule: Rule) -> list[Row]:
    """A row per line of a table: what is known of the image, and what the line adds."""
    columns = columns.checked(lines[0], name)
    facts, rows, seen = fact_reader(lines[0]), [], set()
    for number, line in enumerate(lines, start=2):
        where = f"{name}, line {number}"
        row = index.find(line[columns.image].strip(), where)
        if row.name in seen:
            raise InputError(f"{name} has several lines for {row.name}: one line, with one label, is expected")
        seen.add(row.name)
        findings = rule(line, columns.labels, where)
        if findings is not None:
            rows.append(_filled(row, index.folder, line, columns, findings, facts(line), where))
    return rows


def _filled(row: Row, folder: Path, line: dict[str, str], columns: Columns, findings: tuple[str, ...], facts: Facts, where: str) -> Row:
    patient = line[columns.patient].strip() or None if columns.patient else None
    split = split_name(line[columns.split], where) if columns.split and line[columns.split].strip() else None
    mask = folder / line[columns.mask] if columns.mask and line[columns.mask] else row.mask
    return replace(row, findings=findings, patient=patient, split=split, mask=mask, facts=facts)


def one_class(line: dict[str, str], columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The rule of a table of one class per image; raises InputError where there is none."""
    label = line[columns[0]].strip()
    if label.lower() in UNCERTAIN:
        state = f"is {label}, which names no class" if label else "is empty"
        raise InputError(f'{where}: "{columns[0]}" {state}; give the image a label or drop the line')
    return (label,)


@dataclass(frozen=True)
class Findings:
    """The rule of a multi-label table: flags in several columns, or names in one."""

    uncertain: str
    named: bool

    def __call__(self, line: dict[str, str], columns: tuple[str, ...], where: str) -> tuple[str, ...] | None:
        """The findings that hold, in the order of the columns (names: sorted); None to leave the image out."""
        if self.named:
            return self._names(line[columns[0]].strip(), f'{where}: "{columns[0]}"')
        values = {column: self._flag(line[column].strip(), f'{where}: "{column}"') for column in columns}
        return None if None in values.values() else tuple(column for column, value in values.items() if value)

    def _flag(self, cell: str, where: str) -> bool | None:
        if cell.lower() in UNCERTAIN:
            return {"drop": None, "positive": True, "negative": False}[self.uncertain]
        if cell.lower() not in YES_NO:
            raise InputError(f'{where} is "{cell}"; 0 or 1 is expected, -1 or nothing where it is uncertain')
        return YES_NO[cell.lower()]

    def _names(self, cell: str, where: str) -> tuple[str, ...] | None:
        if cell.lower() in UNCERTAIN and self.uncertain == "positive":
            raise InputError(f"{where} is empty or -1, so no finding is named: fill it, or choose --uncertain drop or negative")
        if cell.lower() in UNCERTAIN:
            return None if self.uncertain == "drop" else ()
        names = sorted({name.strip() for name in re.split(r"[|;]", cell)})
        if names[0].lower() in NO_FINDING and len(names) == 1:
            return ()
        wrong = next((name for name in names if is_flag(name) or name.lower() in NO_FINDING), None)
        if wrong is not None:
            raise InputError(f'{where} is "{cell}", with "{wrong}" in it; names joined by | are expected, or "No Finding" alone')
        return tuple(names)


def is_flag(cell: str) -> bool:
    """Whether a cell says yes, no, or that it is not known."""
    return cell.strip().lower() in YES_NO.keys() | UNCERTAIN


def holds_names(cells: Iterable[str]) -> bool:
    """Whether a column holds names of findings rather than yes and no: it does where most cells that say anything are no flags."""
    said = [cell.strip().lower() for cell in cells if cell.strip().lower() not in UNCERTAIN]
    return 0 < len(said) >= 2 * sum(cell in YES_NO for cell in said)


class Index:
    """Rows by path, by name and by stem; a name that several share is refused."""

    def __init__(self, rows: list[Row], folder: Path) -> None:
        self.folder = folder
        self.paths = {row.name: row for row in rows}
        names = [(alias, row) for row in rows for alias in {PurePosixPath(row.name).name, stem_of(row.name)}]
        self.counts = Counter(name for name, _ in names)
        self.names = dict(names)

    def find(self, name: str, where: str) -> Row:
        """The row called `name`."""
        if name in self.paths:
            return self.paths[name]
        if self.counts[name] > 1:
            raise InputError(f'{where}: {self.counts[name]} files are called "{name}"; give their paths relative to --data_dir')
        if name not in self.names:
            raise InputError(f'{where}: image "{name}" {self._missing(name)}')
        return self.names[name]

    def _missing(self, name: str) -> str:
        """What is wrong with a file that is not among the rows, and what to do."""
        last = PurePosixPath(name).name
        if last in self.names:
            return f"is not there, but {self.names[last].name} is: give paths below --data_dir, or names alone"
        if any(file.name == last for file in self.folder.rglob("*")):
            return "is no kind of file that this --source reads: csv reads PNG, TIFF, JPEG, BMP and NIfTI, dicom reads DICOM"
        return f"is not below {self.folder}; drop the line or add the file"


def find_table(folder: Path, labels: Path) -> Path:
    """The CSV `labels`, relative to the data folder or to here."""
    file = folder / labels if (folder / labels).is_file() else labels
    if not file.is_file():
        raise InputError(f"--labels {labels}: no such file, neither here nor in {folder}")
    return file


def fact_reader(header: Iterable[str]) -> Callable[[dict[str, str]], Facts]:
    """What reads a line's facts, whatever its table calls the columns."""
    plain = {re.sub(r"[^a-z]", "", column.lower()): column for column in header}
    columns = {fact: next((plain[name] for name in names if name in plain), None) for fact, names in FACT_NAMES.items()}
    return lambda line: known_facts(**{fact: line[column] for fact, column in columns.items() if column})


@contextmanager
def open_table(file: Path) -> Iterator[IO[str]]:
    """A CSV to read from; raises InputError where its text is not UTF-8 or its cells are not a CSV's."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            yield stream
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--labels {file} cannot be read ({error}): save it as comma-separated UTF-8") from error


def read_lines(file: Path) -> list[dict[str, str]]:
    """The lines of a CSV; a missing cell is empty."""
    with open_table(file) as stream:
        lines = [{key: value or "" for key, value in line.items() if key is not None} for line in csv.DictReader(stream)]
    if not lines:
        raise InputError(f"--labels {file}: no line in it")
    separator = next((sign for sign in ";\t" if len(lines[0]) == 1 and sign in next(iter(lines[0]))), None)
    if separator:
        raise InputError(f"--labels {file} is separated by {'semicolons' if separator == ';' else 'tabs'}: save it with commas")
    if any("\0" in cell for line in lines for cell in line.values()):
        raise InputError(f"--labels {file}: a byte 0 in a cell; save it as comma-separated UTF-8")
    return lines


def read_table(folder: Path, labels: Path) -> list[dict[str, str]]:
    """The lines of the CSV `labels`; raises InputError where it is not there or cannot be read."""
    return read_lines(find_table(folder, labels))
