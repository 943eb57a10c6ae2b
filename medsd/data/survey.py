"""What a preparation would give, from headers alone, and what it would cost, from a handful of files that are decoded."""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsd.data.decode import DecodeOptions
from medsd.data.files import is_dicom, is_nifti, is_raster, readable
from medsd.data.plan import PrepareOptions, check_names
from medsd.data.rows import Row
from medsd.data.staging import read_columns, write_block
from medsd.data.workers import Job, WorkerPool
from medsd.errors import InputError

ROWS_PER_JOB = 256
SAMPLE = 32
"""Rows decoded to learn the cost."""


@dataclass(frozen=True)
class HeaderFacts:
    """What the header of one row says."""

    images: int
    patient: str | None


@dataclass(frozen=True)
class Survey:
    """Counts from headers; cost from a sample. `staged` and `stored` are bytes."""

    files: int
    refused: list[tuple[str, str]]
    """(name, reason) of each row whose header cannot be read."""
    images: int
    patients: int
    classes: dict[str, int]
    """Rows of each class; of volumes labelled by their masks, none."""
    seconds: float
    staged: float
    stored: float


def survey(rows: Sequence[Row], options: PrepareOptions) -> Survey:
    """Read every header, decode `SAMPLE` rows, and write nothing."""
    from tqdm import tqdm

    check_names(rows, options)
    facts: dict[int, HeaderFacts | str] = {}
    with WorkerPool(options.num_workers, options.seconds_per_file, options.worker_memory) as pool:
        for start in range(0, len(rows), ROWS_PER_JOB):
            numbered = list(enumerate(rows[start : start + ROWS_PER_JOB], start=start))
            pool.submit(Job(read_headers, (numbered, {}, options.axis)))
        with tqdm(total=len(rows), desc="headers", unit="file") as bar:
            for outcome in pool.outcomes():
                numbered, broken, axis = outcome.job.arguments
                if outcome.failure is None:
                    facts |= outcome.result
                    bar.update(len(numbered))
                else:
                    pool.submit(Job(read_headers, (numbered, broken | {outcome.step: outcome.failure}, axis)), first=True)
        known = {number: fact for number, fact in facts.items() if isinstance(fact, HeaderFacts)}
        if not known:
            raise InputError("no header could be read: nothing to prepare")
        cost = _cost([rows[number] for number in sorted(known)], options.decode, pool)
    images = sum(fact.images for fact in known.values())
    if any(is_nifti(row.file) for row in rows):
        images = round(cost.images_per_row * len(known))
    return Survey(
        files=len(rows),
        refused=[(rows[number].name, fact) for number, fact in sorted(facts.items()) if isinstance(fact, str)],
        images=images,
        patients=len({rows[number].patient or fact.patient or rows[number].group or rows[number].name for number, fact in known.items()}),
        classes=dict(sorted(Counter(name for number in known for name in rows[number].findings).items())),
        seconds=cost.seconds_per_row * len(known) / max(1, options.num_workers),
        staged=cost.raw_per_image * images,
        stored=cost.stored_per_image * images,
    )


def read_headers(rows: Sequence[tuple[int, Row]], broken: dict[int, str], axis: str, announce: Callable[[int], None]) -> dict:
    """`HeaderFacts` of numbered rows, or the reason why a header cannot be read."""
    found = {}
    for number, row in rows:
        announce(number)
        try:
            found[number] = broken[number] if number in broken else _header(row, axis)
        except InputError as error:
            found[number] = str(error)
    return found


def _header(row: Row, axis: str) -> HeaderFacts:
    if not row.file.is_file():
        raise InputError(f"{row.file.name}: no such file")
    if row.mask is not None and not row.mask.is_file():
        raise InputError(f"{row.mask.name}: no such file")
    with readable(row.file):
        if is_nifti(row.file):
            from medsd.data.nifti import AXES, volume_shape

            return HeaderFacts(volume_shape(row.file)[AXES[axis]], None)
        if is_raster(row.file):
            from PIL import Image

            with Image.open(row.file) as image:
                return HeaderFacts(getattr(image, "n_frames", 1), None)
        if is_dicom(row.file):
            from medsd.data.dicom import dicom_header, open_dicom

            dataset = open_dicom(row.file, stop_before_pixels=True)
            if "Rows" not in dataset:
                raise InputError("a DICOM object without pixels")
            header = dicom_header(dataset)
            return HeaderFacts(int(dataset.get("NumberOfFrames") or 1), header.patient or header.study or header.series)
    return HeaderFacts(1, None)


@dataclass(frozen=True)
class _Cost:
    images_per_row: float
    seconds_per_row: float
    raw_per_image: float
    stored_per_image: float


def _cost(rows: Sequence[Row], options: DecodeOptions, pool: WorkerPool) -> _Cost:
    """Decode an even sample of rows into a temporary folder, which then goes."""
    picked = [rows[index] for index in np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))]
    with tempfile.TemporaryDirectory() as folder:
        path, spent = Path(folder) / "block-000000.arrow", 0.0
        job = Job(write_block, (path, list(enumerate(picked)), {}, options))
        while not path.is_file():
            started = time.perf_counter()
            pool.submit(job)
            outcome = next(iter(pool.outcomes()))
            spent = time.perf_counter() - started
            if outcome.failure is not None:
                broken = outcome.job.arguments[2] | {outcome.step: outcome.failure}
                job = Job(write_block, (path, list(enumerate(picked)), broken, options))
        sizes = np.array(list(_sizes(path))).reshape(-1, 2)
    if not len(sizes):
        raise InputError("none of the files looked at could be decoded: nothing to prepare")
    return _Cost(len(sizes) / len(picked), spent / len(picked), *sizes.mean(0).tolist())


def _sizes(path: Path) -> Iterator[tuple[int, int]]:
    """Raw and compressed bytes of each image of a block."""
    import pyarrow

    codec = pyarrow.Codec("zstd")
    for stored in read_columns(path, ["image"])["image"].to_pylist():
        yield len(stored["bytes"]), len(codec.compress(stored["bytes"]))
