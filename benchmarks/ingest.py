"""How fast DICOM becomes shards, beside a bare loop of pydicom over the same files.

    python benchmarks/ingest.py --count 3000 --only uncompressed

CT slices of 512 x 512, written uncompressed, and as RLE, JPEG-LS and JPEG 2000 lossless: real ones where MEDSD_TEST_DATA names
a folder with ct_contrast_dicom (the header of a real file costs as much as its pixels), else the phantom. For each: images/s of
`[dcmread(file).pixel_array for file in files]` on one core (JPEG 2000 is decoded by threads), of `prepare` to 256 px with one
worker on that core, and with two workers on two; the median of interleaved repetitions. Rates include starting the workers,
the search for duplicates and writing the shards.
"""

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

SYNTAXES = {"uncompressed": None, "RLE": "RLELossless", "JPEG-LS": "JPEGLSLossless", "JPEG 2000": "JPEG2000Lossless"}
AT_LEAST = {"uncompressed": 0.3, "RLE": 0.8, "JPEG-LS": 0.8, "JPEG 2000": 0.8}
SOURCES = 48
"""Phantom slices drawn; files are copies of the sources with other ids, moved round by any number of pixels, and a little noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=SYNTAXES)
    arguments = parser.parse_args()
    print(f"{'':<14}{'bare':>8}{'1 worker':>10}{'2 workers':>11}{'ratio':>8}{'at least':>10}{'2 / 1':>8}   images/s")
    with tempfile.TemporaryDirectory() as folder:
        for name in [arguments.only] if arguments.only else SYNTAXES:
            files = write_series(Path(folder) / name.replace(" ", ""), arguments.count, SYNTAXES[name])
            runs = {"bare": (1, partial(bare, files)), "one": (1, partial(ingest, files, 1)), "two": (2, partial(ingest, files, 2))}
            rates = measure(runs, len(files), arguments.repetitions)
            ratio, gain = rates["one"] / rates["bare"], rates["two"] / rates["one"]
            shown = "".join(f"{rates[run]:>{width}.0f}" for run, width in (("bare", 8), ("one", 10), ("two", 11)))
            print(f"{name:<14}{shown}{ratio:>8.2f}{AT_LEAST[name]:>10.1f}{gain:>8.2f}", flush=True)


def write_series(folder: Path, count: int, syntax: str | None) -> list[Path]:
    """`count` CT slices as DICOM files of one transfer syntax; ten slices a patient."""
    import pydicom
    from pydicom import uid

    from medsd.data.phantom import write_phantom

    source = Path(os.environ.get("MEDSD_TEST_DATA", "")) / "ct_contrast_dicom"
    if not source.is_dir():
        source = folder.parent / "source"
        if not source.exists():
            write_phantom(source, patients=SOURCES // 6, slices=6, size=512)
    sources = [pydicom.dcmread(file) for file in sorted(source.rglob("*.dcm"))]
    folder.mkdir()
    generator, files = np.random.default_rng(0), []
    for number in range(count):
        dataset = copy.deepcopy(sources[number % len(sources)])
        pixels = np.roll(dataset.pixel_array, generator.integers(0, 512, 2), (0, 1))
        dataset.PixelData = (pixels + generator.integers(-1, 2, pixels.shape).astype(pixels.dtype)).tobytes()
        dataset.PatientID, dataset.SOPInstanceUID = f"P{number // 10:05d}", uid.generate_uid(entropy_srcs=[str(number)])
        if syntax:
            dataset.compress(getattr(uid, syntax), generate_instance_uid=False)
        files.append(folder / f"{number:06d}.dcm")
        dataset.save_as(files[-1])
    return files


def measure(runs: dict[str, tuple[int, Callable[[], None]]], count: int, repetitions: int) -> dict[str, float]:
    """Images/s of each run on so many cores, the median of repetitions that take turns; the first turn is for the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    all_cores = sorted(os.sched_getaffinity(0))
    for turn in range(repetitions + 1):
        for name, (cores, run) in runs.items():
            os.sched_setaffinity(0, all_cores[-cores:])
            started = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: count / statistics.median(taken) for name, taken in seconds.items()}


def bare(files: list[Path]) -> None:
    import pydicom

    for file in files:
        _ = pydicom.dcmread(file).pixel_array


def ingest(files: list[Path], workers: int) -> None:
    from medsd.data.prepare import PrepareOptions, prepare
    from medsd.data.rows import Row

    rows = [Row(name=file.name, files=(file,), findings=(("even", "odd")[index % 2],)) for index, file in enumerate(files)]
    output = files[0].parent.parent / "data"
    prepare(rows, output, PrepareOptions(256, num_workers=workers, duplicates="keep"), b"a salt for benchmarks", "benchmark")
    for made in (output, output.with_name("data.private")):
        shutil.rmtree(made)


if __name__ == "__main__":
    main()
