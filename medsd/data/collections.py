"""Public collections, as they lie on disk when downloaded -> rows: RSNA-2019, ADNI, OASIS, BraTS, MedMNIST.

Each function knows one layout: where the files are, what their names say of the patient, and how findings are written down.
"""

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path

from medsd.data.files import is_nifti, is_raster
from medsd.data.metadata import Facts
from medsd.data.rows import SPLIT_NAMES, Collection, Row, images_below, relative, stem_of, words_of
from medsd.data.sources import MASK, MASK_WORDS, channel_words, image_folder, npz, single_npz, volumes_by_folder
from medsd.data.tables import UNCERTAIN, fact_reader, find_table, open_table, read_lines
from medsd.errors import InputError

HAEMORRHAGES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
"""Subtypes of RSNA-2019; its sixth kind, `any`, is their union."""
KINDS = (*HAEMORRHAGES, "any")
RSNA_TABLES = ("stage_2_train.csv", "stage_1_train.csv")
COMPLETE = (1 << len(KINDS)) - 1

ADNI_SUBJECT = re.compile(r"\d{3}_S_\d{4,5}")
ADNI_SLICE = re.compile(r"(\d+)_\d+")
"""`218391_78`: subject and slice of the AD_NC images."""

OASIS_SUBJECT = re.compile(r"OAS[12]_\d{4}|OAS3\d{4}")
OASIS_SESSION = re.compile(r"OAS[12]_\d{4}_MR\d+|OAS3\d{4}_(?:[A-Za-z]+_|ses-|sess-)?d\d{4}")
OASIS_SLICE = re.compile(r"(case_\d+)(_slice_\d+\.nii\.png)")
OASIS_IDS = ("MRI ID", "ID", "OASIS_session_label", "Subject ID", "Subject", "OASISID")
NEURITE_IMAGE, NEURITE_MASK = "aligned_norm.nii.gz", "aligned_seg4.nii.gz"

BRATS_CHANNELS = ("t1", "t1ce", "t2", "flair")
BRATS_WORDS = {
    **{name: name for name in (*BRATS_CHANNELS, MASK)},
    **{"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": MASK, "segm": MASK},
}
"""Last word of a file's name (of 2020, of 2023) -> channel; `segm` is what case 355 of 2020 has."""
BRATS_TIMEPOINT = re.compile(r"(BraTS-\w+-\d+)-\d{3}")

ORGANS = (
    *("bladder", "left femur", "right femur", "heart", "left kidney", "right kidney"),
    *("liver", "left lung", "right lung", "pancreas", "spleen"),
)
MEDMNIST_CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        *("adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle"),
        *("normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium"),
    ),
    "chestmnist": (
        *("atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia"),
        *("pneumothorax", "consolidation", "edema", "emphysema", "fibrosis", "pleural thickening", "hernia"),
    ),
    "dermamnist": (
        *("actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions"),
        *("dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"),
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("grade 0", "grade 1", "grade 2", "grade 3", "grade 4"),
    "breastmnist": ("malignant", "normal or benign"),
    "bloodmnist": (
        *("basophil", "eosinophil", "erythroblast", "immature granulocytes"),
        *("lymphocyte", "monocyte", "neutrophil", "platelet"),
    ),
    "tissuemnist": (
        *("collecting duct or connecting tubule", "distal convoluted tubule", "glomerular endothelial cells"),
        *("interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments", "thick ascending limb"),
    ),
    "organamnist": ORGANS,
    "organcmnist": ORGANS,
    "organsmnist": ORGANS,
}
"""Names of the labels 0, 1, 2, ... by file stem."""


def rsna2019(folder: Path, labels: Path | None = None) -> Collection:
    """RSNA-2019 intracranial haemorrhage: `ID_*.dcm` and `stage_2_train.csv`, with six lines an image (`ID_12cadc6af_epidural,1`).

    Findings are all subtypes that are 1, none for an image without blood; the patient stands in the DICOM header. Raises
    InputError for lines that contradict each other, an image without all six, and an `any` that is not the union.
    """
    files = _dicom_files(folder)
    table = find_table(folder, labels) if labels else _rsna_table(folder)
    codes, foreign = _rsna_codes(table, files)
    rows = [Row(relative(files[name], folder), (files[name],), _subtypes(code)) for name, code in codes.items() if code]
    if not rows:
        raise InputError(f"{table.name} has no line for any DICOM file below {folder}; put stage_2_train/ID_*.dcm there")
    _check_rsna(table, codes)
    unlabelled = len(files) - len(rows)
    notes = [f"{foreign} lines of {table.name} are about images that are not there"] if foreign else []
    notes += [f"{unlabelled} DICOM files have no line in {table.name} and are left out"] if unlabelled else []
    return Collection(rows, HAEMORRHAGES, multi_label=True, prompt_template="a head CT with {label}", notes=tuple(notes))


def adni(folder: Path) -> Collection:
    """ADNI slices, `AD_NC/train/AD/218391_78.jpeg`, or files with an ADNI subject in their names, in class folders.

    The patient is the subject. The test folder is the test split; the train folder is left to be divided by patient.
    """
    root = _unwrapped(folder, _is_picture)
    rows = [replace(row, name=relative(row.file, folder)) for row in image_folder(root, _is_picture)]
    rows = [replace(row, patient=_adni_subject(row), split=None if row.split == "train" else row.split) for row in rows]
    return Collection(rows, prompt_template="a brain MRI, {label}")


def oasis(folder: Path, labels: Path | None = None, label_column: str = "label") -> Collection:
    """OASIS: the `keras_png_slices_*` folders with their masks and splits, or NIfTI volumes with OAS1, OAS2, OAS3 subjects.

    Without `labels` there is one class, `brain`. Else the class is the `label_column` (CDR, Group) of the session or the
    subject; volumes without one are left out. The patient is the subject, whatever the session.
    """
    folders = sorted(path for path in folder.rglob("keras_png_slices_*") if path.is_dir() and "_seg_" not in path.name)
    if folder.name.startswith("keras_png_slices_") and folder.name != "keras_png_slices_data":
        raise InputError(f"--data_dir {folder}: name the folder above it, which holds the splits and their masks")
    folders = [path for path in folders if path.name != "keras_png_slices_data"]
    if not folders:
        return _oasis_volumes(folder, labels, label_column)
    if labels is not None:
        raise InputError("--labels: the keras_png_slices of OASIS do not say whose they are; leave the table away")
    rows = [row for path in folders for row in _oasis_slices(folder, path)]
    return Collection(rows, prompt_template="an MRI slice of the {label}")


def brats(folder: Path, channels: tuple[str, ...] | None = None) -> Collection:
    """BraTS 2020, 2021, 2023 and later: a row per case, a channel per modality, slices labelled by the tumour's mask.

    `channels` are any of t1, t1ce, t2, flair (or t1n, t1c, t2w, t2f), then `mask`; without it the mask is kept beside the image.
    """
    names = _brats_channels(channels or BRATS_CHANNELS)
    rows = [_brats_row(folder, case, found, names) for case, found in _brats_cases(folder)]
    if not rows:
        raise InputError(f"no BraTS case below {folder}: files such as BraTS20_Training_001_t1ce.nii or BraTS-GLI-00000-000-t1c.nii.gz")
    return Collection(
        rows,
        mask_classes=("no tumour", "tumour"),
        mask_channel=MASK in names,
        prompt_template="a brain MRI with {label}",
    )


def medmnist(path: Path, class_names: Sequence[str] | None = None) -> Collection:
    """A MedMNIST npz; without `class_names` the classes of a file called `pneumoniamnist_64.npz` and the like are known."""
    file = single_npz(path)
    return npz(file, class_names or MEDMNIST_CLASSES.get(file.stem.lower().split("_")[0]))


COLLECTIONS: dict[str, Callable[..., Collection]] = {"rsna2019": rsna2019, "adni": adni, "oasis": oasis, "brats": brats}
"""By the name that --source has for them."""


def read_collection(
    source: str, folder: Path, labels: Path | None = None, label_column: str = "label", channels: tuple[str, ...] | None = None
) -> Collection:
    """The collection called `source`. Raises InputError for labels or channels where it has no use for them."""
    reader = COLLECTIONS[source]
    given = {"labels": labels, "channels": channels, "label_column": label_column if labels else None}
    known = signature(reader).parameters
    for flag in ("labels", "channels"):
        if given[flag] is not None and flag not in known:
            raise InputError(f"--{flag} has no meaning for --source {source}: leave it away")
    if not folder.is_dir():
        raise InputError(f"--data_dir {folder}: no such folder")
    return reader(folder, **{flag: value for flag, value in given.items() if flag in known and value is not None})


def _dicom_files(folder: Path) -> dict[str, Path]:
    """DICOM files by stem; `os.walk` since there are 750,000."""
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder):
        folders.sort()
        base = Path(parent)
        for name in sorted(names):
            if name.endswith(".dcm") and files.setdefault(name[:-4], path := base / name) is not path:
                raise InputError(f"two files are called {name}, in {files[name[:-4]].parent.name} and {base.name}: move one folder away")
    return files


def _rsna_table(folder: Path) -> Path:
    found = next((file for name in RSNA_TABLES for file in (folder / name, *sorted(folder.glob(f"*/{name}"))) if file.is_file()), None)
    if found is None:
        raise InputError(f"--data_dir {folder} has no {RSNA_TABLES[0]}: put it there, or name the table with --labels")
    return found


def _rsna_codes(table: Path, files: dict[str, Path]) -> tuple[dict[str, int], int]:
    """A number per file, and the count of lines without a file.

    Bit k of the number says that there was a line of the k-th kind, bit k + 6 that it was 1.
    """
    codes, foreign, values = dict.fromkeys(files, 0), 0, {"0": 0, "1": 1}
    bits = {kind: 1 << index for index, kind in enumerate(KINDS)}
    with open_table(table) as stream:
        lines = csv.reader(stream)
        if next(lines, None) != ["ID", "Label"]:
            raise InputError(f"{table.name} does not begin with ID,Label: is it RSNA's table?")
        for number, line in enumerate(lines, start=2):
            image, _, kind = line[0].rpartition("_") if line else ("", "", "")
            bit, value = bits.get(kind), values.get(line[-1] if line else "")
            if len(line) != 2 or bit is None or value is None:
                raise InputError(f"{table.name}, line {number}: {','.join(line)} is not ID_NAME_KIND,0 or 1 with {', '.join(KINDS)}")
            code = codes.get(image)
            if code is None:
                foreign += 1
                continue
            positive = bit << len(KINDS)
            if code & bit and bool(code & positive) != value:
                raise InputError(f"{table.name}, line {number}: {line[0]} was {1 - value} before and is {value} here; drop what is wrong")
            codes[image] = code | bit | positive * value
    return codes, foreign


def _check_rsna(table: Path, codes: dict[str, int]) -> None:
    partial = [image for image, code in codes.items() if code and code & COMPLETE != COMPLETE]
    if partial:
        raise InputError(f"{table.name}: {len(partial)} images lack one of {', '.join(KINDS)}; the first: {partial[0]}")
    odd = [image for image, code in codes.items() if bool(_subtypes(code)) != bool(code >> 2 * len(KINDS) - 1)]
    if odd:
        raise InputError(f"{table.name}: any is not the union of the subtypes in {len(odd)} images; the first: {odd[0]}; correct its lines")


@cache
def _subtypes(code: int) -> tuple[str, ...]:
    return tuple(kind for index, kind in enumerate(HAEMORRHAGES) if code >> len(KINDS) + index & 1)


def _is_picture(path: Path) -> bool:
    return is_raster(path) or is_nifti(path)


def _unwrapped(folder: Path, accepts: Callable[[Path], bool]) -> Path:
    """The folder, or the one inside that wraps everything (`AD_NC`)."""
    inside = [child for child in folder.iterdir() if not child.name.startswith(".") and (child.is_dir() or accepts(child))]
    if len(inside) != 1 or not inside[0].is_dir() or any(accepts(file) for file in inside[0].iterdir()):
        return folder
    return _unwrapped(inside[0], accepts)


def _adni_subject(row: Row) -> str:
    subject = ADNI_SUBJECT.search(row.name)
    if subject:
        return subject[0]
    numbers = ADNI_SLICE.fullmatch(stem_of(row.file.name))
    if numbers is None:
        raise InputError(f"{row.name}: no subject in the name; 218391_78.jpeg (subject, slice) or 002_S_0295 is expected")
    return numbers[1]


def _oasis_slices(root: Path, folder: Path) -> list[Row]:
    """One split's PNG slices, with the masks of the folder beside it."""
    split = SPLIT_NAMES.get(folder.name.removeprefix("keras_png_slices_"))
    if split is None:
        raise InputError(f"{relative(folder, root)}: train, validate or test is expected at its name's end")
    masks = folder.with_name(folder.name.replace("slices_", "slices_seg_"))
    files = images_below(folder, is_raster)
    if not files:
        raise InputError(f"{relative(folder, root)}: no PNG slices in it; fill the folder or remove it")
    return [_oasis_slice(root, file, masks, split) for file in files]


def _oasis_slice(root: Path, file: Path, masks: Path, split: str) -> Row:
    name = OASIS_SLICE.fullmatch(file.name)
    if name is None:
        raise InputError(f"{relative(file, root)}: case_001_slice_0.nii.png is expected; move other files away")
    mask = masks / f"{name[1].replace('case', 'seg')}{name[2]}"
    if masks.is_dir() and not mask.is_file():
        raise InputError(f"{relative(file, root)} has no {mask.name} in {masks.name}: add it, or move all masks away")
    return Row(relative(file, root), (file,), ("brain",), name[1], split, mask if masks.is_dir() else None)


def _oasis_volumes(folder: Path, labels: Path | None, label_column: str) -> Collection:
    rows, notes = _oasis_rows(folder)
    if labels is None:
        return Collection(
            [replace(row, findings=("brain",)) for row in rows], prompt_template="an MRI slice of the {label}", notes=tuple(notes)
        )
    known = _oasis_table(find_table(folder, labels), label_column)
    joined = [replace(row, findings=(known[key][0],), facts=known[key][1]) for row in rows if (key := _oasis_key(row, known))]
    if not joined:
        raise InputError(f"{labels.name} gives no {label_column} for any of the {len(rows)} volumes: are the ids in it theirs?")
    if len(joined) < len(rows):
        notes.append(f"{len(rows) - len(joined)} of {len(rows)} volumes have no {label_column} in {labels.name} and are left out")
    return Collection(joined, prompt_template=f"a brain MRI, {label_column} {{label}}", notes=tuple(notes))


def _oasis_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Volumes of known subjects, without masks among them; in neurite's folders `aligned_norm` alone."""
    rows, foreign = [], 0
    for session, files in volumes_by_folder(folder).items():
        mask = session / NEURITE_MASK
        for file in _oasis_images(session, files):
            name = relative(file, folder)
            if (subject := OASIS_SUBJECT.search(name)) is None:
                foreign += 1
                continue
            rows.append(Row(name, (file,), patient=subject[0], mask=mask if file.name == NEURITE_IMAGE and mask in files else None))
    if not rows:
        raise InputError(f"{folder} has neither keras_png_slices_* nor NIfTI volumes with OAS1_0001, OAS2_0001 or OAS30001 in their paths")
    return rows, [f"{foreign} volumes name no OASIS subject and are left out"] if foreign else []


def _oasis_images(session: Path, files: list[Path]) -> list[Path]:
    aligned = session / NEURITE_IMAGE
    if aligned in files:
        return [aligned]
    images = [file for file in files if not set(words_of(stem_of(file.name))) & set(MASK_WORDS)]
    return [file for file in images if "t1w" in words_of(stem_of(file.name))] or images


def _oasis_key(row: Row, known: dict[str, tuple[str, Facts]]) -> str | None:
    session = OASIS_SESSION.search(row.name)
    return next((key for key in (session and _plain_session(session[0]), row.patient) if key in known), None)


def _plain_session(name: str) -> str:
    """`OAS30001_ses-d0129` and `OAS30001_MR_d0129` -> `OAS30001_d0129`."""
    return re.sub(r"(OAS3\d{4})_.*(d\d{4})", r"\1_\2", name)


def _oasis_table(table: Path, label_column: str) -> dict[str, tuple[str, Facts]]:
    """Class and facts by session or subject; lines without a class say nothing."""
    lines = read_lines(table)
    column = next((name for name in OASIS_IDS if name in lines[0]), None)
    if column is None or label_column not in lines[0]:
        wanted = f'"{label_column}" (--label_column)' if column else ", ".join(OASIS_IDS)
        raise InputError(f"{table.name} has no column {wanted}; it has {', '.join(lines[0])}")
    facts, known = fact_reader(lines[0]), {}
    for number, line in enumerate(lines, start=2):
        label, key = line[label_column].strip(), _plain_session(line[column].strip())
        if label.lower() in UNCERTAIN:
            continue
        if known.setdefault(key, (label, facts(line)))[0] != label:
            raise InputError(f"{table.name}, line {number}: {key} is {label} here and {known[key][0]} before; keep one line per {column}")
    return known


def _brats_channels(channels: tuple[str, ...]) -> tuple[str, ...]:
    """With the names of 2020, whichever were given."""
    unknown = next((name for name in channels if name.lower() not in BRATS_WORDS), None)
    if unknown is not None:
        raise InputError(f"--channels {unknown}: BraTS has {', '.join((*BRATS_CHANNELS, MASK))}")
    return tuple(channel_words([BRATS_WORDS[name.lower()] for name in channels]))


def _brats_cases(folder: Path) -> list[tuple[Path, dict[str, Path]]]:
    """Folders with at least one file named as BraTS names them, and their files by channel."""
    cases = []
    for case, files in volumes_by_folder(folder).items():
        found: dict[str, Path] = {}
        for file in files:
            channel = BRATS_WORDS.get(words_of(stem_of(file.name))[-1])
            if channel and found.setdefault(channel, file) != file:
                raise InputError(f"{relative(case, folder)} has two files for {channel}, {found[channel].name} and {file.name}: remove one")
        cases += [(case, found)] if found else []
    return cases


def _brats_row(folder: Path, case: Path, found: dict[str, Path], channels: tuple[str, ...]) -> Row:
    if MASK not in found:
        raise InputError(f"{relative(case, folder)} has no seg file: move cases of the validation or test set, which have none, away")
    missing = next((channel for channel in channels if channel not in found), None)
    if missing is not None:
        raise InputError(f"{relative(case, folder)} has no {missing} file: complete the case, move it away, or name other --channels")
    timepoint = BRATS_TIMEPOINT.fullmatch(case.name)
    return Row(
        name=relative(case, folder),
        files=tuple(found[channel] for channel in channels if channel != MASK),
        patient=timepoint[1] if timepoint else case.name,
        mask=found[MASK],
    )
