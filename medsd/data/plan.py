"""What only the whole collection can tell: patients, splits, duplicates, classes, intensity map and prompts.

Everything here is computed from `Staging.table`, without a pixel but for the thumbnails of suspected duplicates.
"""

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.decode import DecodeOptions
from medsd.data.intensity import IntensityMap, Windows
from medsd.data.metadata import FACT_COLUMNS, Facts, slice_position
from medsd.data.prompts import NO_FINDING, class_prompts, class_tokens, prompt_of
from medsd.data.ranges import choose_intensity, is_ct, is_recorded, recorded_ranges
from medsd.data.rows import Row
from medsd.data.splits import SPLITS, check_patient_overlap, split_patients
from medsd.errors import InputError

if TYPE_CHECKING:
    import pyarrow

MODALITIES = frozenset({"CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "SM", "OP", "OCT", "SEG", "RTDOSE"})
"""What a summary may say; a header can hold anything."""
FEW_CLASSES = 5
"""Up to so many, less one, are never taken for patients."""
FEW_PATIENTS = 2
"""In a class that is a patient."""
PATIENT_NAME = re.compile(r"(sub|subj|subject|pat|patient|case|p|id)?[-_ ]?[0-9]{2,}", re.IGNORECASE)
DEFAULT_TEMPLATE = "a medical image of {label}"


@dataclass(frozen=True)
class PrepareOptions(DecodeOptions):
    """How rows become a data set: how they are decoded, and what becomes of them then."""

    intensity: IntensityMap | None = None
    """None: CT windows, percentiles per volume (MRI), the VOI window (X-ray), 8 bits, or the full range of the training images."""
    prompt_template: str | None = None
    prompt_metadata: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    multi_label: bool = False
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    duplicates: str = "refuse"
    max_quarantine: float = 0.05
    num_workers: int = 2
    seed: int = 0
    seconds_per_file: float = 60.0
    """A file that takes longer is refused."""
    worker_memory: int = 4 * 2**30
    """Bytes that decoding one file may take."""

    @property
    def decode(self) -> DecodeOptions:
        """What the workers need of it; a block depends on nothing else."""
        return DecodeOptions(**{known.name: getattr(self, known.name) for known in fields(DecodeOptions)})

    @property
    def template(self) -> str:
        """The sentence around a class."""
        return self.prompt_template or DEFAULT_TEMPLATE


@dataclass
class Plan:
    """One entry per image in every list; `table` holds the rest of what is known of each."""

    table: "pyarrow.Table"
    rows: list[Row]
    keys: list[str]
    findings: list[tuple[str, ...]]
    patients: list[str]
    """Salted hashes of `source_patients`, which came by `rules`."""
    source_patients: list[str]
    rules: list[str]
    splits: list[str] = field(default_factory=list)

    def keep(self, wanted: Sequence[int]) -> "Plan":
        """The plan of some images."""
        lists = {
            name: [getattr(self, name)[index] for index in wanted]
            for name in ("rows", "keys", "findings", "patients", "source_patients", "rules", "splits")
        }
        return Plan(table=self.table.take(list(wanted)), **lists)

    def column(self, name: str) -> list[Any]:
        """A column of the table as Python values."""
        return self.table[name].to_pylist()

    def names(self) -> list[str]:
        """How each image is called at the terminal and in the private folder."""
        return [_name(row, frame) for row, frame in zip(self.rows, self.column("frame"), strict=True)]


def salted(salt: bytes, text: str) -> str:
    """The hash that stands for an id."""
    return hmac.new(salt, text.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:16]


def make_plan(table: "pyarrow.Table", all_rows: Sequence[Row], salt: bytes) -> Plan:
    """Keys, findings and patients of all images."""
    rows = [all_rows[number] for number in table["row"].to_pylist()]
    frames = table["frame"].to_pylist()
    staged = [tuple(found) for found in table["findings"].to_pylist()]
    known = list(zip(rows, *(table[name].to_pylist() for name in ("patient", "study", "series")), strict=True))
    rules, sources = zip(*(_patient(*ids) for ids in known), strict=True) if known else ((), ())
    hashed = {source: salted(salt, source) for source in set(sources)}
    return Plan(
        table=table,
        rows=rows,
        keys=[salted(salt, _name(row, frame)) for row, frame in zip(rows, frames, strict=True)],
        findings=[row.findings or found for row, found in zip(rows, staged, strict=True)],  # Of a row, or of its mask: never both.
        patients=[hashed[source] for source in sources],
        source_patients=list(sources),
        rules=list(rules),
    )


def _patient(row: Row, patient: str | None, study: str | None, series: str | None) -> tuple[str, str]:
    """The first rule that knows a patient, and its id."""
    known = {"patient column": row.patient, "PatientID": patient, "StudyInstanceUID": study, "SeriesInstanceUID": series}
    known |= {"folder": row.group, "file": row.name}
    return next((rule, value) for rule, value in known.items() if value)


def _name(row: Row, frame: int | None) -> str:
    return f"{row.name}#{frame}" if frame else row.name


def check_names(rows: Sequence[Row], options: PrepareOptions) -> None:
    """Raise InputError, before anything is decoded, for classes that no data set can have."""
    found = {name for row in rows for name in row.findings}
    unknown = sorted(found.difference(options.class_names or found))
    if unknown:
        raise InputError(f"class {unknown[0]} is in the labels and not in --class_names: add it, or drop its images")
    class_tokens(sorted(found))
    given = [row for row in rows if row.patient and row.split]
    check_patient_overlap([row.patient for row in given], [row.split for row in given], [row.name for row in given])


def assign_splits(plan: Plan, options: PrepareOptions) -> None:
    """Given splits stay; rows without one are divided, by patient, among the splits that nobody was given."""
    given = [row.split for row in plan.rows]
    free = [split for split in SPLITS if split not in given]
    open_rows = [index for index, split in enumerate(given) if split is None]
    if open_rows and not free:
        raise InputError(f"{len(open_rows)} images have no split beside {', '.join(SPLITS)}: fill the split column")
    plan.splits = list(given)
    if open_rows:
        shares = [fraction if split in free else 0.0 for split, fraction in zip(SPLITS, options.split_fractions, strict=True)]
        if len(free) == len(SPLITS):
            scaled = list(options.split_fractions)
        elif sum(shares) > 0:
            scaled = [share / sum(shares) for share in shares]
        else:
            raise InputError(f"--split_fractions leaves nothing for {', '.join(free)}, which {len(open_rows)} images without a split need")
        labels = _stratum(plan)[open_rows]
        for index, split in zip(
            open_rows, split_patients([plan.patients[i] for i in open_rows], labels, scaled, options.seed), strict=True
        ):
            plan.splits[index] = split
    check_patient_overlap(plan.patients, plan.splits, plan.names())


def _stratum(plan: Plan) -> np.ndarray:
    """Labels `(N,)` where each image has one, else findings `(N, F)`."""
    names = sorted({name for found in plan.findings for name in found})
    order = {name: index for index, name in enumerate(names)}
    if all(len(found) == 1 for found in plan.findings):
        return np.array([order[found[0]] for found in plan.findings])
    flags = np.zeros((len(plan.findings), max(1, len(names))), int)
    for index, found in enumerate(plan.findings):
        flags[index, [order[name] for name in found]] = 1
    return flags


def describe(plan: Plan, options: PrepareOptions) -> DataInfo:
    """`medsd.json` of the data set."""
    class_names = _class_names(plan, options)
    tokens = class_tokens(class_names)
    image_channels = _channels(plan)
    intensity = choose_intensity(plan.table, plan.splits, options.intensity, options.mask_channel, image_channels)
    intensity.channels(image_channels)
    fingerprints = plan.column("fingerprint")
    content = sorted(
        f"{key} {'+'.join(found)} {split} {pixels}"
        for key, found, split, pixels in zip(plan.keys, plan.findings, plan.splits, fingerprints, strict=True)
    )
    return DataInfo(
        class_names=class_names,
        prompts=class_prompts(tokens, options.template),
        class_tokens=tokens,
        intensity=intensity.to_dict(),
        resolution=options.resolution,
        resize=options.resize,
        image_channels=image_channels,
        unit="HU" if is_ct(plan.table) or isinstance(options.intensity, Windows) else "grey value",
        fingerprint=hashlib.sha256("\n".join(content).encode()).hexdigest(),
        multi_label=options.multi_label,
        prompt_template=options.template,
    )


def _class_names(plan: Plan, options: PrepareOptions) -> list[str]:
    """In the wanted order; a class of one label an image that no image has is left out."""
    found = {name for names in plan.findings for name in names}
    unknown = sorted(found.difference(options.class_names or found))
    if unknown:
        raise InputError(f"class {unknown[0]} of the masks is not in --class_names: add it")
    if not options.multi_label and not all(plan.findings):
        raise InputError("some images have no label: give them one, or add --multi_label if none of the findings may hold")
    if not options.class_names and not options.multi_label:
        _check_classes(plan)
    chosen = [name for name in options.class_names or sorted(found) if name in found or options.multi_label]
    if not chosen:
        raise InputError("no image has a label: name the column with --label_column")
    return chosen


def _check_classes(plan: Plan) -> None:
    """Refuse classes that must be patients: many of them, called like patients or with no more than a patient or two in most."""
    patients: dict[str, set[str]] = {}
    for found, patient in zip(plan.findings, plan.patients, strict=True):
        patients.setdefault(found[0], set()).add(patient)
    names = sorted(patients)
    few = np.median([len(members) for members in patients.values()]) <= FEW_PATIENTS
    if len(names) >= FEW_CLASSES and (few or all(PATIENT_NAME.fullmatch(name) for name in names)):
        raise InputError(
            f"{len(names)} classes ({', '.join(names[:3])}, ...) of {len(set(plan.patients))} patients: are these patients? Name the column"
            " of the class with --label_column, or the classes with --class_names if that is what they are"
        )


def _channels(plan: Plan) -> int:
    counts = set(plan.column("channels"))
    if len(counts) > 1 and counts != {1, 3}:
        raise InputError(f"images have different numbers of channels ({', '.join(map(str, sorted(counts)))}); prepare each kind on its own")
    return max(counts)


def final_columns(plan: Plan, info: DataInfo, options: PrepareOptions, salt: bytes) -> dict[str, list[Any]]:
    """The columns of the data set but its pixels, and where those are."""
    facts = _facts(plan)
    tokens = dict(zip(info.class_names, info.class_tokens, strict=True))
    order = {name: index for index, name in enumerate(info.class_names)}
    heights = slice_heights(plan)
    said = [_said(fact, height, options.prompt_metadata) for fact, height in zip(facts, heights, strict=True)]
    siblings = Counter(plan.column("row"))
    frames = [frame if siblings[row] > 1 else None for frame, row in zip(plan.column("frame"), plan.column("row"), strict=True)]
    series = zip(plan.column("series"), plan.source_patients, strict=True)
    columns = {
        "block": plan.column("block"),
        "place": plan.column("place"),
        "key": plan.keys,
        "prompt": [
            prompt_of([tokens[name] for name in found], options.template, words) for found, words in zip(plan.findings, said, strict=True)
        ],
        "patient_id": plan.patients,
        "series_id": [salted(salt, name or patient) for name, patient in series],
        "slice_index": [
            number if number is not None else (row.index if row.index is not None else frame)
            for number, row, frame in zip(plan.column("instance_number"), plan.rows, frames, strict=True)
        ],
        "pixel_spacing": plan.column("spacing"),
        **{name: [getattr(fact, name) for fact in facts] for name in FACT_COLUMNS},
    }
    if info.multi_label:
        columns["labels"] = [[int(name in found) for name in info.class_names] for found in plan.findings]
    else:
        columns["label"] = [order[found[0]] for found in plan.findings]
    if is_recorded(info.intensity):
        columns["intensity_range"] = recorded_ranges(plan.table, info)
    return columns


def _facts(plan: Plan) -> list[Facts]:
    """What is known of each image: by the collection's table, else by its header."""
    columns = zip(*(plan.column(name) for name in FACT_COLUMNS), strict=True)
    return [row.facts.or_else(Facts(*values)) for row, values in zip(plan.rows, columns, strict=True)]


def _said(facts: Facts, height: float | None, wanted: tuple[str, ...]) -> dict[str, str | None]:
    position = slice_position(height) if height is not None else None
    return {name: position if name == "slice_position" else getattr(facts, name) for name in wanted}


def slice_heights(plan: Plan) -> list[float | None]:
    """Place of each image in its axial volume or DICOM series, from 0 (lowest) to 1; None where that is not known."""
    heights, series, positions = plan.column("height"), plan.column("series"), plan.column("position")
    members: dict[str, list[int]] = {}
    for index, (name, position) in enumerate(zip(series, positions, strict=True)):
        if name is not None and position is not None:
            members.setdefault(name, []).append(index)
    for indices in members.values():
        if len(indices) < 3:
            continue
        for rank, index in enumerate(sorted(indices, key=lambda index: positions[index])):
            heights[index] = rank / (len(indices) - 1)
    return heights


def summarise(plan: Plan, info: DataInfo) -> dict[str, Any]:
    """Counts of images, patients and classes per split, and how patients were known."""
    images = Counter(plan.splits)
    patients = {split: {p for p, s in zip(plan.patients, plan.splits, strict=True) if s == split} for split in SPLITS}
    classes = {split: Counter() for split in SPLITS}
    for found, split in zip(plan.findings, plan.splits, strict=True):
        classes[split].update(found or [NO_FINDING])
    shown = [*info.class_names, *([NO_FINDING] if info.multi_label else [])]
    return {
        "images": {split: images[split] for split in SPLITS},
        "patients": {split: len(patients[split]) for split in SPLITS},
        "classes": {split: {name: classes[split][name] for name in shown} for split in SPLITS},
        "patient_rule": dict(Counter(plan.rules)),
        "longest_side": max(plan.column("side")),
        "burned_in_text_possible": sum(plan.column("burned_in")),
        "modalities": dict(Counter(name if name in MODALITIES else "other" for name in sorted(map(str, plan.column("modality"))))),
        "fingerprint": info.fingerprint,
    }
