"""A collection on disk -> rows: which file, which findings, which patient, which split.

Sources read names and tables only; pixels and headers are `files`' business. Words: a *volume* is a NIfTI file; a *case* is
a folder whose volumes are the channels of one image; a *word* of a file's name stands between `_`, `-` and `.`.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from medsd.data.arrays import array_names, array_shape, read_array
from medsd.data.files import is_nifti, is_raster, readable
from medsd.data.image import MOST_CHANNELS
from medsd.data.rows import SPLIT_NAMES, Accepts, Collection, Row, images_below, relative, split_name, stem_of, words_of
from medsd.data.tables import Columns, Findings, Index, holds_names, join, one_class, read_table
from medsd.errors import InputError

FLAT_CLASS = "image"
"""The class of images without any."""
MASK = "mask"
MASK_WORDS = ("seg", "mask", "segm", "segmentation", "label")
CHANNEL_WORDS = frozenset({*MASK_WORDS, "t1", "t1w", "t1n", "t1c", "t1ce", "t1gd", "t2", "t2w", "t2f", "flair", "fla", "dwi", "adc"})
"""Words by which the volumes of one case are told apart."""
NNUNET_FOLDERS = frozenset({"imagesTr", "labelsTr", "imagesTs", "labelsTs", "imagesVal", "labelsVal"})
LEAST_PATIENTS = 3
"""One for each split."""


def image_folder(folder: Path, accepts: Accepts = is_raster) -> list[Row]:
    """`FOLDER/CLASS/...` or `FOLDER/train|val|test/CLASS/...`: a row per file, labelled by its folder.

    Where no folders but images lie in FOLDER (or in a split's folder), these are of the one class `image`. Where all images lie
    in three or more numbered folders below their classes, `CLASS/p01/1.png`, these are the patients, unless a header knows better.
    """
    parts = _subfolders(folder)
    splits = [part for part in parts if part.name.lower() in SPLIT_NAMES]
    if not splits:
        return _with_groups(_classes(folder, folder, accepts, None), 1)
    if len(splits) < len(parts):
        other = next(part.name for part in parts if part not in splits)
        raise InputError(f"{folder} holds {splits[0].name} and {other}: folders are either splits or classes; move the others away")
    return _with_groups([row for part in parts for row in _classes(folder, part, accepts, SPLIT_NAMES[part.name.lower()])], 2)


def _with_groups(rows: list[Row], depth: int) -> list[Row]:
    """Rows grouped by the folder at `depth` of their names, where each has one and these can be patients. Splits may count alike."""
    parts = [PurePosixPath(row.name).parts for row in rows]
    folders = {names[depth] for names in parts if len(names) > depth + 1}
    unlike = any(not re.search(r"[0-9]", name) or CHANNEL_WORDS.intersection(words_of(name)) for name in folders)
    if unlike or len(folders) < LEAST_PATIENTS or any(len(names) < depth + 2 for names in parts):
        return rows
    return [replace(row, group=f"{row.split or ''}/{names[depth]}") for row, names in zip(rows, parts, strict=True)]


def table(
    folder: Path,
    labels: Path,
    label_column: str,
    image_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    mask_column: str | None = None,
    accepts: Accepts = is_raster,
) -> Collection:
    """A row per line of the CSV `labels`, its file looked up below `folder` by path, name or stem."""
    columns = Columns((label_column,), image_column, patient_column, split_column, mask_column)
    files = _file_rows(folder, accepts)
    rows = join(Index(files, folder), read_table(folder, labels), labels.name, columns, one_class)
    return Collection(rows, notes=_unlisted(files, rows, len(rows), labels.name))


def _unlisted(files: list[Row], rows: list[Row], lines: int, name: str) -> tuple[str, ...]:
    """How many images a table of so many lines says nothing about; masks are none."""
    masks = {row.mask for row in rows}
    left = sum(file.files[0] not in masks for file in files) - lines
    return (f"{left} images have no line in {name} and are left out",) if left > 0 else ()


def findings_table(
    folder: Path,
    labels: Path,
    label_columns: tuple[str, ...],
    uncertain: str = "drop",
    image_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    mask_column: str | None = None,
    accepts: Accepts = is_raster,
) -> Collection:
    """A multi-label table: columns of 0 and 1 (true, yes), or one of names joined by `|` or `;`, "No Finding" for none.

    `uncertain` says what -1 and an empty cell are: `drop` leaves the image out, `positive` and `negative` read 1 and 0.
    """
    lines = read_table(folder, labels)
    columns = Columns(label_columns, image_column, patient_column, split_column, mask_column)
    named = len(label_columns) == 1 and holds_names(line.get(label_columns[0], "") for line in lines)
    rule = Findings(uncertain, named)
    files = _file_rows(folder, accepts)
    rows = join(Index(files, folder), lines, labels.name, columns, rule)
    if not rows:
        raise InputError(f"{labels.name}: no line without an uncertain finding; --uncertain negative reads -1 and empty cells as 0")
    dropped = len(lines) - len(rows)
    notes = (f"{dropped} of {len(lines)} images left out: a finding is -1 or empty (--uncertain drop)",) if dropped else ()
    notes += _unlisted(files, rows, len(lines), labels.name)
    return Collection(rows, None if named else label_columns, multi_label=True, notes=notes)


def nifti_tree(
    folder: Path,
    channels: tuple[str, ...] | None = None,
    labels: Path | None = None,
    label_column: str = "label",
    image_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
) -> Collection:
    """NIfTI volumes, labelled by the CSV `labels` or by folder as in `image_folder`; a row per volume, or per case with `channels`.

    A channel is the one volume of the case with this word in its name (`t1ce`), or with another one (`t1ce=t1c`). `mask` comes
    last. Cases with a mask and neither table nor class folders are labelled by their mask, slice by slice.
    """
    if channels is None and labels is None:
        _check_single_volumes(folder)
        return Collection(image_folder(folder, is_nifti))
    rows, notes = (_file_rows(folder, is_nifti), ()) if channels is None else _cases(folder, channel_words(channels))
    if labels is None:
        rows = _by_folder(rows)
    else:
        columns = Columns((label_column,), image_column, patient_column, split_column)
        rows = join(Index(rows, folder), read_table(folder, labels), labels.name, columns, one_class)
    with_mask, labelled = rows[0].mask is not None, bool(rows[0].findings)
    if not labelled and not with_mask:
        rows = [replace(row, findings=(FLAT_CLASS,)) for row in rows]
    mask_classes = ("no lesion", "lesion") if with_mask and not labelled else None
    return Collection(rows, mask_classes=mask_classes, mask_channel=with_mask, notes=notes)


def npz(path: Path, class_names: Sequence[str] | None = None) -> Collection:
    """A MedMNIST npz: `train_images`, `train_labels`, and the same for `val` and `test`; its splits are kept.

    Labels `(N,)` or `(N, 1)` are classes, `(N, K)` are K findings of 0 and 1 (ChestMNIST). Only the labels are read.
    """
    file = single_npz(path)
    labels = _npz_labels(file)
    widths = {split: int(np.prod(values.shape[1:])) for split, values in labels.items()}
    if len(set(widths.values())) > 1:
        raise InputError(f"{file.name}: different numbers of labels an image ({widths}); save each kind in a file of its own")
    multi_label = max(widths.values()) > 1
    names = class_names or ([str(index) for index in range(max(widths.values()))] if multi_label else None)
    read = _flags if multi_label else _number
    rows = [
        Row(
            name=f"{file.name}:{split}_images[{index}]",
            files=(file,),
            findings=read(value, names),
            split=split_name(split, file.name),
            array=f"{split}_images",
            index=index,
        )
        for split, values in labels.items()
        for index, value in enumerate(values.reshape(len(values), widths[split]))
    ]
    return Collection(rows, tuple(names) if names else None, multi_label)


def single_npz(path: Path) -> Path:
    """The file itself, or the only npz in a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.npz"))
    if len(found) != 1:
        raise InputError(f"--data_dir {path}: {len(found)} npz files; name one file")
    return found[0]


def volumes_by_folder(folder: Path) -> dict[Path, list[Path]]:
    """Folders that hold volumes, and these, in order."""
    found = defaultdict(list)
    for file in images_below(folder, is_nifti):
        found[file.parent].append(file)
    return dict(sorted(found.items()))


def channel_words(channels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`("t1", "mask=simple")` -> which words name each channel's file. Raises InputError unless images come first, then the mask."""
    pairs = [channel.partition("=") for channel in channels]
    words = {name: (word,) if word else MASK_WORDS if name == MASK else (name,) for name, _, word in pairs}
    if len(words) < len(channels):
        raise InputError(f"--channels {' '.join(channels)} names a channel twice: drop one")
    if MASK in words and (len(words) == 1 or list(words)[-1] != MASK):
        raise InputError(f"--channels {' '.join(channels)}: the mask is a last channel, behind at least one image; put it last")
    return words


def _check_single_volumes(folder: Path) -> None:
    """Refuse folders of channels and masks where each volume would be taken for a case of its own."""
    for case, files in volumes_by_folder(folder).items():
        where = relative(case, folder) if case != folder else str(folder)
        if case.name in NNUNET_FOLDERS:
            raise InputError(f"{where} is no class: give each case a folder of its own with image and mask, and name them with --channels")
        named = {CHANNEL_WORDS.intersection(words_of(stem_of(file.name))) for file in files}
        words = frozenset().union(*named)
        if len(named) > 1 and len(words) > 1:
            chosen = " ".join([*sorted(words.difference(MASK_WORDS)), *([MASK] if words.intersection(MASK_WORDS) else [])])
            raise InputError(
                f"{where}: {', '.join(sorted(words))} look like volumes of one case: stack them with --channels {chosen}, or some"
            )


def _cases(folder: Path, words: dict[str, tuple[str, ...]]) -> tuple[list[Row], tuple[str, ...]]:
    """A row without findings per folder that has every channel; and what was left out."""
    rows, incomplete, foreign = [], [], 0
    for case, files in volumes_by_folder(folder).items():
        found = {channel: [file for file in files if _has_word(file, names)] for channel, names in words.items()}
        missing = [channel for channel, candidates in found.items() if not candidates]
        if len(missing) == len(found):
            foreign += 1
        elif missing:
            incomplete.append(f"{relative(case, folder)} has no {missing[0]}")
        else:
            rows.append(_case(folder, case, found))
    if not rows:
        first = incomplete[0] if incomplete else "their names have none of these words; NAME=WORD looks for another word"
        raise InputError(f"no folder below {folder} has a volume for each of --channels {' '.join(words)}: {first}")
    notes = [f"folders left out for lack of a channel: {len(incomplete)} (the first: {incomplete[0]})"] if incomplete else []
    return rows, (*notes, *([f"folders left out without any of the channels: {foreign}"] if foreign else []))


def _case(folder: Path, case: Path, found: dict[str, list[Path]]) -> Row:
    for channel, candidates in found.items():
        if len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise InputError(
                f"{relative(case, folder)}: {len(candidates)} files for channel {channel} ({names}); tell them apart by NAME=WORD"
            )
    files = tuple(candidates[0] for channel, candidates in found.items() if channel != MASK)
    return Row(relative(case, folder), files, mask=found[MASK][0] if MASK in found else None)


def _has_word(file: Path, names: Sequence[str]) -> bool:
    words = set(words_of(stem_of(file.name)))
    return any(words.issuperset(words_of(name)) for name in names)


def _by_folder(cases: list[Row]) -> list[Row]:
    """Cases with split and class by the folders above them, where there are such."""
    rows = []
    for case in cases:
        parts = PurePosixPath(case.name).parts
        split = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 1 else None
        above = parts[1:-1] if split else parts[:-1]
        rows.append(replace(case, split=split, findings=above[:1]))
    for what, has in {"a split": [row.split for row in rows], "a class": [row.findings for row in rows]}.items():
        if any(has) and not all(has):
            odd, even = rows[has.index(next(filter(None, has)))], next(row for row, value in zip(rows, has, strict=True) if not value)
            raise InputError(f"{odd.name} lies in a folder for {what}, {even.name} does not: put all cases or none into such folders")
    return rows


def _npz_labels(file: Path) -> dict[str, np.ndarray]:
    """The labels of each split, `(N,)` or `(N, K)`."""
    with readable(file):
        names = array_names(file)
        splits = [name.removesuffix("_images") for name in names if name.endswith("_images")]
        if not splits:
            raise InputError("no array ends in _images; a MedMNIST npz has train_images, train_labels, ...")
        lacking = next((split for split in splits if f"{split}_labels" not in names), None)
        if lacking is not None:
            raise InputError(f"{lacking}_images has no {lacking}_labels beside it")
        for split in splits:
            _check_images(array_shape(file, f"{split}_images"), split)
        return {split: _labels(read_array(file, f"{split}_labels"), split) for split in splits}


def _check_images(shape: tuple[int, ...], split: str) -> None:
    if len(shape) not in {3, 4} or (len(shape) == 4 and shape[-1] > MOST_CHANNELS):
        raise InputError(f"{split}_images has the shape {shape}: 2-D images (N, H, W) or (N, H, W, C) are expected, no volumes")


def _labels(values: np.ndarray, split: str) -> np.ndarray:
    if values.ndim not in {1, 2}:
        raise InputError(f"{split}_labels has the shape {values.shape}; (N,) or (N, K) is expected")
    return values


def _number(values: np.ndarray, class_names: Sequence[str] | None) -> tuple[str, ...]:
    value = int(values[0])
    if class_names is None:
        return (str(value),)
    if not 0 <= value < len(class_names):
        raise InputError(f"label {value} has no name in --class_names {' '.join(class_names)}")
    return (class_names[value],)


def _flags(values: np.ndarray, class_names: Sequence[str]) -> tuple[str, ...]:
    if len(values) != len(class_names) or not np.isin(values, (0, 1)).all():
        raise InputError(f"labels {values.tolist()} of an image: {len(class_names)} numbers 0 or 1 are expected, one per class name")
    return tuple(name for name, value in zip(class_names, values, strict=True) if value)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder")
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root: Path, folder: Path, accepts: Accepts, split: str | None) -> list[Row]:
    classes = {child.name: images_below(child, accepts) for child in _subfolders(folder)} or {FLAT_CLASS: images_below(folder, accepts)}
    empty = next((name for name, files in classes.items() if not files), None)
    if empty == FLAT_CLASS and not (folder / empty).is_dir():
        raise InputError(f"{folder}: no folders and no images in it; one folder per class is expected, or images alone")
    if empty is not None:
        other = next((file.name for file in sorted((folder / empty).rglob("*")) if file.is_file()), None)
        there = f" that this --source reads ({other} is none)" if other else ""
        raise InputError(
            f"class {empty}: no image{there} in {relative(folder / empty, root)}; fill the folder, remove it, or change --source"
        )
    return [Row(relative(file, root), (file,), (name,), split=split) for name, files in classes.items() for file in files]


def _file_rows(folder: Path, accepts: Accepts) -> list[Row]:
    return [Row(relative(file, folder), (file,)) for file in images_below(folder, accepts)]
