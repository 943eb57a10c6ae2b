"""Rows -> a prepared data folder: Parquet shards with class-token prompts, split by patient.

Three stages, each of which can be killed at any moment and goes on where it was: rows are decoded into blocks by workers
that may be killed (`staging`); the whole collection is looked at (`plan`); blocks become shards (`shards`). The folder appears
under its name only when it is complete. *Key* and *patient id* are salted hashes; what they stand for is kept in
`DATA.private/` and nowhere else.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsd.data.files import is_dicom
from medsd.data.folder import DataFolder, check_folders
from medsd.data.intensity import Windows
from medsd.data.leakage import count_kinds, deduplicate
from medsd.data.plan import PrepareOptions, assign_splits, check_names, describe, final_columns, make_plan
from medsd.data.rows import Row
from medsd.data.sources import findings_table, table
from medsd.data.staging import Staging, write_block
from medsd.data.workers import Job, WorkerPool
from medsd.errors import InputError
from medsd.output import check_output

PHANTOM_SALT = b"medsd phantom: procedural, nobody's data"
PHANTOM_RESOLUTION = 64
PHANTOM_WINDOW = (50.0, 130.0)
"""(centre, width) in HU, in which blood is brighter than brain and darker than bone."""
PHANTOM_TEMPLATE = "a head CT with {label}"
IMAGES_PER_BLOCK = 64
VOLUMES_PER_BLOCK = 2


def prepare(
    rows: Sequence[Row], output_dir: Path, options: PrepareOptions, salt: bytes, salt_name: str, overwrite: bool = False
) -> dict[str, Any]:
    """Write `output_dir` and `output_dir.private`; returns the summary that is also in `summary.json`.

    What an earlier call with the same rows and options left unfinished is used. Raises InputError for a folder in use, too
    many unreadable files, a patient in two splits, or duplicates across splits.
    """
    if not rows:
        raise InputError("no image was found: nothing to prepare")
    check_names(rows, options)
    staging_dir = output_dir.with_name(f".{output_dir.name}.staging")
    with _alone(staging_dir):
        check_output(output_dir, overwrite, [row.file for row in rows], recipe="prepare_data.py")
        check_folders(output_dir, overwrite)
        volumes = any(len(row.files) > 1 or row.file.name.endswith((".nii", ".nii.gz")) for row in rows)
        staging = Staging(staging_dir, rows, options.decode, VOLUMES_PER_BLOCK if volumes else IMAGES_PER_BLOCK)
        with WorkerPool(options.num_workers, options.seconds_per_file, options.worker_memory) as pool:
            refused = _decode(staging, pool, options.max_quarantine)
            plan = make_plan(staging.table(), rows, salt)
            if not plan.rows:
                raise InputError("no file could be read: nothing to prepare")
            assign_splits(plan, options)
            plan, hits, dropped = deduplicate(plan, staging, options.duplicates)
            info = describe(plan, options)
            made = DataFolder(output_dir, plan, info, final_columns(plan, info, options, salt), hits, refused, salt, salt_name)
            summary = made.write(
                staging, pool, {"quarantined": len(refused), "duplicates": count_kinds(hits), "duplicates_dropped": dropped}
            )
    return summary


def prepare_phantom(output_dir: Path, options: PrepareOptions, source_dir: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Make the procedural head CT as DICOM files in `source_dir` (default: `phantom_dicom_SEED` beside `output_dir`) and prepare them.

    Its heads are alike by design and nobody's, so what looks alike is reported and kept.
    """
    from medsd.data import phantom

    source_dir = source_dir or output_dir.with_name(f"phantom_dicom_{options.seed}" + "_findings" * options.multi_label)
    if source_dir.is_dir() and not phantom.is_phantom(source_dir):
        raise InputError(f"--data_dir {source_dir} holds files that are no phantom's: say with --source what they are")
    labels = source_dir / "labels.csv"
    if not labels.is_file():
        phantom.write_phantom(source_dir, seed=options.seed, multi_label=options.multi_label)
    columns = {"image_column": "file", "patient_column": "patient_id", "mask_column": "mask", "accepts": is_dicom}
    if options.multi_label:
        rows = findings_table(source_dir, labels, ("label",), **columns).rows
    else:
        rows = table(source_dir, labels, "label", **columns).rows
    chosen = replace(
        options,
        intensity=options.intensity or Windows((PHANTOM_WINDOW,)),
        prompt_template=options.prompt_template or PHANTOM_TEMPLATE,
        class_names=options.class_names or (phantom.FINDINGS if options.multi_label else phantom.CLASSES),
        duplicates="keep",
    )
    return prepare(rows, output_dir, chosen, PHANTOM_SALT, "phantom", overwrite)


def prepare_default(name: str, default: str) -> None:
    """Make the phantom in the folder `default` where that is the data set's `name` and nothing is there yet."""
    if name == default and not Path(default).exists():
        print(f"making the phantom, a procedural head CT, in {default}")
        prepare_phantom(Path(default), PrepareOptions(PHANTOM_RESOLUTION))


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


@contextmanager
def _alone(staging_dir: Path) -> Iterator[None]:
    """Refuse a second run that would write to the same folder. The kernel drops the lock when the process dies."""
    lock = staging_dir.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another run is writing {staging_dir.name[1:].removesuffix('.staging')}: wait for it, or stop it") from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _decode(staging: Staging, pool: WorkerPool, max_quarantine: float) -> list[tuple[Row, str]]:
    """Fill the blocks that are missing; returns the rows that no image came of, and why.

    A row that breaks its worker is refused and its block done again without it. Too many refused rows stop the run.
    """
    from tqdm import tqdm

    missing = [block for block in staging.blocks() if not staging.finished(block)]
    for block in missing:
        pool.submit(Job(write_block, (staging.path(block), staging.rows_of(block), {}, staging.options)))
    refused = staging.refused()
    count, done = len(refused), len(staging.rows) - sum(len(staging.rows_of(block)) for block in missing)
    with tqdm(total=len(staging.rows), initial=done, desc="reading", unit="file", smoothing=0.1) as bar:
        for outcome in pool.outcomes():
            path, numbered, broken, decode = outcome.job.arguments
            if outcome.failure is None:
                bar.update(len(numbered))
                count += outcome.result
                if count > max_quarantine * len(staging.rows):
                    break
            elif outcome.step is None:
                raise InputError(f"a worker {outcome.failure} before it read a file: is there memory and disk left?")
            else:
                reason = f"{staging.rows[outcome.step].file.name}: {outcome.failure}"
                pool.submit(Job(write_block, (path, numbered, broken | {outcome.step: reason}, decode)), first=True)
    refused = staging.refused()
    _check_quarantine(refused, len(staging.rows), max_quarantine)
    return refused


def _check_quarantine(refused: list[tuple[Row, str]], total: int, most: float) -> None:
    if len(refused) > most * total:
        row, reason = refused[0]
        shown = reason if row.name.endswith(reason.split(":")[0]) else f"{row.name}: {reason}"
        raise InputError(f"{len(refused)} of {total} files cannot be used, more than --max_quarantine {most}; the first: {shown}")
