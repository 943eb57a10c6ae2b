"""Rows -> a prepared data folder: Parquet shards with class-token prompts, split by patient.

*Key* and *patient id* are salted hashes; what they stand for is kept in `DATA.private/` and nowhere else. The folder
appears under its name only when it is complete. Resized images are held in memory until they are written.
"""

import hashlib
import hmac
import io
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.dataset import INFO_FILE, DataInfo, data_features, pack
from medsd.data.files import Header, is_dicom, read_file
from medsd.data.intensity import IntensityMap, Range, Windows, parse_windows
from medsd.data.prompts import class_prompts, class_tokens
from medsd.data.sources import Row, table
from medsd.data.splits import SPLITS, check_patient_overlap, drop_duplicates, find_duplicates, split_patients
from medsd.data.transforms import fit_square
from medsd.errors import InputError
from medsd.runtime import check_output, partial_folder, replace_folder

PHANTOM_SALT = b"medsd phantom: procedural, nobody's data"
PHANTOM_RESOLUTION = 64
PHANTOM_WINDOW = (50.0, 130.0)
"""(centre, width) in HU, in which blood is brighter than brain and darker than bone."""
ROWS_PER_SHARD = 4096
PREVIEW_SIDE = 96
DEFAULT_TEMPLATE = "a medical image of {label}"
PHANTOM_TEMPLATE = "a head CT with {label}"


@dataclass(frozen=True)
class PrepareOptions:
    """How rows become a data set; fields as in `medsd.config.PrepareDataConfig`."""

    resolution: int
    resize: str = "pad"
    intensity: IntensityMap | None = None
    """None: CT windows brain, subdural, bone for CT, else the full range of the data."""
    prompt_template: str | None = None
    class_names: tuple[str, ...] | None = None
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    duplicates: str = "refuse"
    max_quarantine: float = 0.05
    num_workers: int = 2
    seed: int = 0


@dataclass
class Example:
    """One decoded row on its way into a shard."""

    row: Row
    header: Header
    image: np.ndarray
    mask: np.ndarray | None
    spacing: list[float] | None
    fingerprint: str
    """sha256 of the resized pixels."""
    patient: str = ""
    """Salted hash of `source_patient`, which came by `patient_rule`."""
    source_patient: str = ""
    patient_rule: str = ""
    split: str = ""


def prepare(
    rows: Sequence[Row], output_dir: Path, options: PrepareOptions, salt: bytes, salt_name: str, overwrite: bool = False
) -> dict[str, Any]:
    """Write `output_dir` and `output_dir.private`; returns the summary that is also in `summary.json`.

    Raises InputError for a folder in use, too many unreadable files, a patient in two splits, or duplicates across splits.
    """
    check_output(output_dir, overwrite, [row.file for row in rows])
    examples, quarantine = _decode_all(rows, options)
    if len(quarantine) > options.max_quarantine * len(rows):
        first = quarantine[0]
        raise InputError(
            f"{len(quarantine)} of {len(rows)} files cannot be used, more than --max_quarantine {options.max_quarantine}; "
            f"the first: {first['name']}: {first['reason']}"
        )
    if not examples:
        raise InputError("no file could be read: nothing to prepare")
    _check_channels(examples)
    _assign_patients(examples, salt)
    _assign_splits(examples, options)
    examples, dropped = _deduplicate(examples, options.duplicates)
    info = _describe(examples, options, salt)
    summary = _summarise(examples, info, quarantine, dropped)
    _write(output_dir, examples, info, summary, quarantine, salt, salt_name)
    return summary


def prepare_phantom(output_dir: Path, options: PrepareOptions, source_dir: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Make the procedural head CT as DICOM files in `source_dir` (default: `phantom_dicom_SEED` beside `output_dir`) and prepare them."""
    from medsd.data import phantom

    source_dir = source_dir or output_dir.with_name(f"phantom_dicom_{options.seed}")
    labels = source_dir / "labels.csv"
    if not labels.is_file():
        phantom.write_phantom(source_dir, seed=options.seed)
    rows = table(source_dir, labels, "label", "file", "patient_id", mask_column="mask", accepts=is_dicom)
    chosen = replace(
        options,
        intensity=options.intensity or Windows((PHANTOM_WINDOW,)),
        prompt_template=options.prompt_template or PHANTOM_TEMPLATE,
        class_names=options.class_names or phantom.CLASSES,
    )
    return prepare(rows, output_dir, chosen, PHANTOM_SALT, "phantom", overwrite)


def load_salt(path: Path | None) -> tuple[bytes, str]:
    """The person's secret for hashing ids and its name; made on first use (mode 0600)."""
    if path is not None and not path.is_file():
        raise InputError(f"--salt_file {path}: no such file; leave the flag away to use (or make) your own salt")
    path = path or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "medsd" / "salt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
    salt = path.read_bytes().strip()
    if len(salt) < 16:
        raise InputError(f"--salt_file {path}: {len(salt)} bytes; a secret of 16 or more is expected")
    return salt, path.name


def _decode_all(rows: Sequence[Row], options: PrepareOptions) -> tuple[list[Example], list[dict[str, str]]]:
    from tqdm import tqdm

    decode = partial(_decode_row, resolution=options.resolution, resize=options.resize)
    examples, quarantine = [], []
    for row, outcome in zip(
        rows, tqdm(_map(decode, rows, options.num_workers), total=len(rows), desc="reading", unit="image"), strict=True
    ):
        if isinstance(outcome, Example):
            examples.append(outcome)
        else:
            quarantine.append({"name": row.name, "stage": "decode", "reason": outcome})
    return examples, quarantine


def _map(decode: Any, rows: Sequence[Row], workers: int) -> Iterator[Example | str]:
    if workers <= 1:
        yield from map(decode, rows)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(decode, rows, chunksize=16)


def _decode_row(row: Row, resolution: int, resize: str) -> Example | str:
    """The row's image at its final size, or the reason why there is none."""
    try:
        source = read_file(row.file, row.array, row.index)
        image, scale = fit_square(source.pixels, resolution, resize)
        mask = fit_square(read_file(row.mask).pixels, resolution, resize, nearest=True, background=0)[0] if row.mask else None
    except InputError as error:
        return str(error)
    spacing = source.header.pixel_spacing
    spacing = [spacing[0] / scale[0], spacing[1] / scale[1]] if spacing else None
    digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()
    return Example(row, source.header, image, mask, spacing, digest)


def _check_channels(examples: list[Example]) -> None:
    """Grey images among colour ones become colour; any other mixture is refused."""
    counts = Counter(len(example.image) for example in examples)
    if counts.keys() == {1, 3}:
        for example in examples:
            example.image = np.broadcast_to(example.image, (3, *example.image.shape[1:]))
    elif len(counts) > 1:
        raise InputError(f"images have different numbers of channels ({', '.join(map(str, sorted(counts)))}); prepare each kind on its own")


def _assign_patients(examples: list[Example], salt: bytes) -> None:
    """The patient's hash, by the first rule that knows one."""
    for example in examples:
        known = {
            "patient column": example.row.patient,
            "PatientID": example.header.patient,
            "StudyInstanceUID": example.header.study,
            "SeriesInstanceUID": example.header.series,
            "file": example.row.name,
        }
        example.patient_rule, example.source_patient = next((rule, value) for rule, value in known.items() if value)
        example.patient = _hash(salt, example.source_patient)


def _assign_splits(examples: list[Example], options: PrepareOptions) -> None:
    patients, labels = [example.patient for example in examples], [example.row.label for example in examples]
    if all(example.row.split for example in examples):
        splits = [example.row.split for example in examples]
    else:
        order = {label: index for index, label in enumerate(sorted(set(labels)))}
        splits = split_patients(patients, [order[label] for label in labels], options.split_fractions, options.seed)
    check_patient_overlap(patients, splits)
    for example, split in zip(examples, splits, strict=True):
        example.split = split


def _deduplicate(examples: list[Example], rule: str) -> tuple[list[Example], int]:
    splits = [example.split for example in examples]
    groups = find_duplicates([example.fingerprint for example in examples], splits)
    if groups and rule == "refuse":
        names = ", ".join(examples[index].row.name for index in groups[0])
        raise InputError(f"{len(groups)} images lie in several splits ({names}, ...): add --duplicates drop, or keep if that is meant")
    gone = drop_duplicates(groups, splits) if rule == "drop" else set()
    return [example for index, example in enumerate(examples) if index not in gone], len(gone)


def _describe(examples: list[Example], options: PrepareOptions, salt: bytes) -> DataInfo:
    found = sorted({example.row.label for example in examples})
    class_names = list(options.class_names or found)
    missing = sorted(set(class_names) ^ set(found))
    if missing:
        raise InputError(f"class {missing[0]} is in --class_names or in the labels, not in both")
    tokens = class_tokens(class_names)
    channels = len(examples[0].image)
    is_ct = all(example.header.modality == "CT" for example in examples)
    intensity = options.intensity or _default_intensity(examples, is_ct)
    intensity.channels(channels)
    content = sorted(f"{_hash(salt, e.row.name)} {e.row.label} {e.split} {e.fingerprint}" for e in examples)
    return DataInfo(
        class_names=class_names,
        prompts=class_prompts(tokens, options.prompt_template or DEFAULT_TEMPLATE),
        class_tokens=tokens,
        intensity=intensity.to_dict(),
        resolution=options.resolution,
        resize=options.resize,
        image_channels=channels,
        unit="HU" if is_ct else "grey value",
        fingerprint=hashlib.sha256("\n".join(content).encode()).hexdigest(),
    )


def _default_intensity(examples: list[Example], is_ct: bool) -> IntensityMap:
    if is_ct:
        return parse_windows(("brain", "subdural", "bone"))
    if all(example.image.dtype == np.uint8 for example in examples):
        return Range(0.0, 255.0)
    train = [example.image for example in examples if example.split == "train"] or [example.image for example in examples]
    low, high = min(float(image.min()) for image in train), max(float(image.max()) for image in train)
    if low == high:
        raise InputError(f"every pixel of the training images is {low}: nothing to learn from")
    return Range(low, high)


def _summarise(examples: list[Example], info: DataInfo, quarantine: list[dict[str, str]], dropped: int) -> dict[str, Any]:
    counts = {split: Counter(e.row.label for e in examples if e.split == split) for split in SPLITS}
    return {
        "images": {split: sum(count.values()) for split, count in counts.items()},
        "patients": {split: len({e.patient for e in examples if e.split == split}) for split in SPLITS},
        "classes": {split: {name: count[name] for name in info.class_names} for split, count in counts.items()},
        "patient_rule": dict(Counter(example.patient_rule for example in examples)),
        "quarantined": len(quarantine),
        "duplicates_dropped": dropped,
        "fingerprint": info.fingerprint,
    }


def _write(
    output_dir: Path,
    examples: list[Example],
    info: DataInfo,
    summary: dict[str, Any],
    quarantine: list[dict[str, str]],
    salt: bytes,
    salt_name: str,
) -> None:
    private = output_dir.with_name(output_dir.name + ".private")
    partial_dir, partial_private = partial_folder(output_dir), partial_folder(private)
    partial_private.chmod(0o700)
    for split in SPLITS:
        _write_shards(partial_dir / "data", split, [example for example in examples if example.split == split], info, salt)
    _write_json(partial_dir / INFO_FILE, info.to_dict())
    _write_json(partial_dir / "summary.json", summary)
    _write_lines(
        partial_dir / "quarantine.jsonl", [{"key": _hash(salt, q["name"]), "stage": q["stage"], "reason": _nameless(q)} for q in quarantine]
    )
    _write_lines(partial_private / "quarantine.jsonl", quarantine)
    _write_keys(partial_private / "keys.parquet", examples, salt)
    _write_json(partial_private / "salt.json", {"name": salt_name})
    replace_folder(partial_private, private)
    replace_folder(partial_dir, output_dir)


def _nameless(quarantined: dict[str, str]) -> str:
    """The reason without the file's name, which may hold an identity."""
    return quarantined["reason"].split(": ", 1)[-1].split(" (")[0]


def _write_shards(folder: Path, split: str, examples: list[Example], info: DataInfo, salt: bytes) -> None:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(exist_ok=True)
    schema = data_features(info.class_names, any(example.mask is not None for example in examples)).arrow_schema
    shards = -(-len(examples) // ROWS_PER_SHARD)
    for shard in range(shards):
        part = examples[shard * ROWS_PER_SHARD : (shard + 1) * ROWS_PER_SHARD]
        rows = pyarrow.Table.from_pylist([_columns(example, info, salt) for example in part], schema=schema)
        pyarrow.parquet.write_table(rows, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", compression="zstd")


def _columns(example: Example, info: DataInfo, salt: bytes) -> dict[str, Any]:
    label = info.class_names.index(example.row.label)
    columns = {
        "key": _hash(salt, example.row.name),
        "image": pack(example.image),
        "preview": {"bytes": _preview(example.image, info.intensity_map), "path": None},
        "label": label,
        "prompt": info.prompts[label],
        "patient_id": example.patient,
        "series_id": _hash(salt, example.header.series or example.source_patient),
        "slice_index": example.header.instance_number if example.header.instance_number is not None else example.row.index,
        "pixel_spacing": example.spacing,
    }
    return columns | ({"mask": pack(example.mask)} if example.mask is not None else {})


def _preview(image: np.ndarray, intensity: IntensityMap) -> bytes:
    """8-bit PNG thumbnail of the first channel (of all three where there are three)."""
    from PIL import Image

    unit = intensity.to_unit(image.astype(np.float32))
    grey = np.rint((unit + 1) * 127.5).astype(np.uint8)
    picture = Image.fromarray(np.moveaxis(grey, 0, -1) if len(grey) == 3 else grey[0])
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _write_keys(path: Path, examples: list[Example], salt: bytes) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "key": [_hash(salt, e.row.name) for e in examples],
        "file": [str(e.row.file) for e in examples],
        "frame": [e.row.index for e in examples],
        "patient": [e.source_patient for e in examples],
        "sop_uid": [e.header.sop_uid for e in examples],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")


def _hash(salt: bytes, text: str) -> str:
    return hmac.new(salt, text.encode(), hashlib.sha256).hexdigest()[:16]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
