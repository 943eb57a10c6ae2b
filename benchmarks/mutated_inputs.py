"""What becomes of broken files: of every one, pixels or a refusal, and nothing else.

    python benchmarks/mutated_inputs.py --count 20000 --seed 0 [--data FOLDER] [--workers 2]

Sound files (`sound_inputs`; with --data or MEDSD_TEST_DATA also every file of FOLDER/dicom_zoo) are broken as `mutations` says,
each by its own number, and go the way of `prepare`: `write_block` in workers of a `WorkerPool`, tables through `table`,
`findings_table` and `rsna2019` first, archives through `npz`. What went wrong is a JSON line on stdout, and --only NUMBER does
it again. Four counts must be 0, or the exit code is 1: process crashes (the pool itself failed), hangs (a file that went on for
2 s beyond its limit), pixels or figures that are not finite, and exceptions that are no InputError. A worker that dies or is
killed costs its file alone, which is a refusal.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # Jobs are pickled by the name of their module, which workers must be able to import.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.mutations import mutate, pick
from benchmarks.sound_inputs import SHARES, Seed, make_seeds
from medsd.data.collections import rsna2019
from medsd.data.dataset import unpack
from medsd.data.decode import DecodeOptions
from medsd.data.files import readable
from medsd.data.nifti import volume_shape
from medsd.data.rows import Row
from medsd.data.sources import findings_table, npz, table
from medsd.data.staging import Staging, read_columns, schema, write_block
from medsd.data.workers import Job, Outcome, WorkerPool
from medsd.errors import InputError

SECONDS, GRACE, MEMORY = 10.0, 2.0, 4 * 2**30
BATCH = 50
"""Files per job."""
OPTIONS = DecodeOptions(resolution=32, slices="all")
ALLOWED = ("decoded", "refused", "killed for time", "killed workers")
FORBIDDEN = ("process crashes", "hangs", "not finite", "unexpected exceptions")


@dataclass(frozen=True)
class Setting:
    """What makes a number's file what it is, and where it is written."""

    folder: Path
    seeds: tuple[Seed, ...]
    seed: int

    def make(self, number: int) -> tuple[Path, Seed, str]:
        """Write the broken file of a number; returns it, its seed and what was done to it."""
        generator = np.random.default_rng([self.seed, number])
        group = pick(generator, [name for name, percent in SHARES.items() for _ in range(percent)])
        seed = pick(generator, [seed for seed in self.seeds if seed.group == group])
        content, what = mutate(seed.path.read_bytes(), seed.kind, generator)
        path = self.folder / f"{number}-{seed.path.name}"
        path.write_bytes(content)
        return path, seed, what

    def stamp(self, number: int) -> Path:
        """A file that is there, since when, while the number is being looked at."""
        return self.folder / f"{number}.running"

    def notes(self, numbers: Sequence[int]) -> Path:
        """Where a job notes each number's outcome at once, since it may not live to tell."""
        return self.folder / f"{numbers[0]}.notes"


def run_batch(setting: Setting, numbers: Sequence[int], announce: Callable[[int], None]) -> None:
    """Look at broken files one by one."""
    with setting.notes(numbers).open("a") as notes:
        for number in numbers:
            setting.stamp(number).touch()
            announce(number)
            started = time.monotonic()
            note = look_at(setting, number)
            if time.monotonic() - started > SECONDS + GRACE:
                note["outcome"] = "hangs"
            notes.write(json.dumps(note) + "\n")
            notes.flush()
            setting.stamp(number).unlink()


def look_at(setting: Setting, number: int) -> dict[str, object]:
    """Make a number's file, read it, and say what came of it."""
    path, seed, what = setting.make(number)
    note = {"number": number, "seed": seed.path.name, "kind": seed.kind, "mutation": what}
    try:
        reason = read(setting.folder, path, seed, number)
        outcome = "refused" if reason else "decoded"
    except InputError as error:
        outcome, reason = "refused", str(error)
    except FloatingPointError as error:
        outcome, reason = "not finite", str(error)
    except MemoryError:
        raise
    except BaseException:
        outcome, reason = "unexpected exceptions", traceback.format_exc()
    path.unlink()
    return note | {"outcome": outcome, "reason": reason}


def read(folder: Path, path: Path, seed: Seed, number: int) -> str | None:
    """Read a file as `prepare` does; returns why it was refused, if it was."""
    rows = list(READERS[seed.reader or path.suffix](path, seed))
    block = folder / f"{number}-block.arrow"
    try:
        if seed.group == "table":
            Staging(folder / f"{number}-staging", rows, OPTIONS, 64)
        write_block(block, list(enumerate(rows[:3])), {}, OPTIONS, lambda step: None)
        check_finite(block)
        refused = json.loads(block.with_suffix(".json").read_text())
        return refused[0]["reason"] if refused else None
    finally:
        for made in folder.glob(f"{number}-block.*"):
            made.unlink()


def check_finite(block: Path) -> None:
    """Raise FloatingPointError for an image, or a figure about it, that is not finite."""
    for row in read_columns(block, schema().names).to_pylist():
        images = [unpack(row[name]) for name in ("image", "mask") if row[name]]
        lists = [row[name] or [] for name in ("spacing", "voi", "ranges", "quantiles", "mask_labels")]
        figures = [row[name] or 0.0 for name in ("position", "height", "low", "high")]
        if not all(np.isfinite(values).all() for values in (*images, *lists, figures)):
            raise FloatingPointError(
                str({name: row[name] for name in ("position", "low", "high", "spacing", "voi", "ranges", "quantiles")})
            )


def image(path: Path, seed: Seed) -> Iterator[Row]:
    if seed.group == "nifti":
        with readable(path):
            volume_shape(path)
    yield Row(path.name, (path,), ("any",))


def pictures(path: Path, seed: Seed) -> list[Row]:
    folder = seed.path.parent / "pictures"
    if seed.reader == "table":
        return table(folder, path, "label", "file", "patient", "split", "mask").rows
    columns = ("effusion", "nodule") if seed.reader == "flags" else ("findings",)
    return findings_table(folder, path, columns, patient_column="patient").rows


READERS: dict[str, Callable[[Path, Seed], Sequence[Row] | Iterator[Row]]] = {
    **dict.fromkeys((".dcm", ".seg", ".nii", ".gz", ".png", ".tif", ".jpg", ".bmp", ".npy"), image),
    **dict.fromkeys(("table", "flags", "names"), pictures),
    "rsna2019": lambda path, seed: rsna2019(seed.path.parent / "rsna", path).rows,
    ".npz": lambda path, seed: npz(path).rows[::3],
}
"""By the reader of a table, or the suffix of a file."""


def settle(setting: Setting, outcome: Outcome) -> tuple[list[dict[str, object]], Sequence[int]]:
    """What a job noted, with the file that broke it if one did, and the numbers it did not come to."""
    numbers = outcome.job.arguments[1]
    noted = setting.notes(numbers)
    notes = [json.loads(line) for line in noted.read_text().splitlines() if line.endswith("}")] if noted.is_file() else []
    noted.unlink(missing_ok=True)
    if outcome.failure is None:
        return notes, ()
    if outcome.step is None:
        return [*notes, {"number": numbers[0], "outcome": "process crashes", "reason": outcome.failure}], numbers[1:]
    spent = time.time() - setting.stamp(outcome.step).stat().st_mtime
    how = "killed for time" if outcome.failure.startswith("took longer") else "killed workers"
    _, seed, what = setting.make(outcome.step)
    note = {
        "number": outcome.step,
        "seed": seed.path.name,
        "kind": seed.kind,
        "mutation": what,
        "reason": f"{outcome.failure} ({spent:.1f} s)",
    }
    note["outcome"] = "hangs" if spent > SECONDS + GRACE else how
    for left in setting.folder.glob(f"{outcome.step}[-.]*"):
        left.unlink() if left.is_file() else None
    return [*notes, note], numbers[numbers.index(outcome.step) + 1 :]


def run(numbers: Sequence[int], seed: int, data: Path | None, workers: int, show: Callable[[int], None]) -> list[dict[str, object]]:
    """Look at the broken files of these numbers; a note for each. `show` is told how many are done."""
    notes: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name, WorkerPool(workers, SECONDS, MEMORY) as pool:
        setting = Setting(Path(name) / "broken", tuple(make_seeds(Path(name) / "sound", data)), seed)
        setting.folder.mkdir()
        for start in range(0, len(numbers), BATCH):
            pool.submit(Job(run_batch, (setting, numbers[start : start + BATCH])))
        try:
            for outcome in pool.outcomes():
                known, left = settle(setting, outcome)
                notes += known
                if left:
                    pool.submit(Job(run_batch, (setting, left)), first=True)
                show(len(notes))
        except Exception:
            notes.append({"number": None, "outcome": "process crashes", "reason": traceback.format_exc()})
    return notes


def report(notes: list[dict[str, object]]) -> str:
    """Counts of each outcome by kind of file."""
    kinds = sorted({str(note.get("kind", "?")) for note in notes})
    counts = Counter((str(note.get("kind", "?")), note["outcome"]) for note in notes)
    lines = [["", *kinds, "all"]]
    lines += [
        [name, *(str(counts[kind, name]) for kind in kinds), str(sum(counts[k, name] for k in kinds))] for name in (*ALLOWED, *FORBIDDEN)
    ]
    return "\n".join(f"{line[0]:24}" + "".join(f"{cell:>9}" for cell in line[1:]) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=os.environ.get("MEDSD_TEST_DATA"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="look at this number alone")
    chosen = parser.parse_args()
    numbers = range(chosen.count) if chosen.only is None else [chosen.only]
    started = time.monotonic()
    shown = lambda done: print(f"\r{done} of {len(numbers)}, {time.monotonic() - started:.0f} s", end="", file=sys.stderr)  # noqa: E731
    notes = run(numbers, chosen.seed, chosen.data, chosen.workers, shown)
    print(file=sys.stderr)
    for note in notes:
        if note["outcome"] not in {"decoded", "refused"} or chosen.only is not None:
            print(json.dumps(note))
    print(report(notes))
    print(f"{len(notes)} files in {time.monotonic() - started:.0f} s")
    return int(any(note["outcome"] in FORBIDDEN for note in notes) or {note["number"] for note in notes} != set(numbers))


if __name__ == "__main__":
    from benchmarks import mutated_inputs

    sys.exit(mutated_inputs.main())
