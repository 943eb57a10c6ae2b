"""Does a training that is killed go on where it was, to the same weights and by way of the same images?

    python benchmarks/kill_training.py --kills 50 --seed 0

First one run of each variant (full or LoRA, 0 or 2 loader threads, 1 or 4 micro-batches) goes to its end: the references. Then,
again and again, a run is killed with SIGKILL at a call of one phase's function (right before it, at a random moment within it, or
right after it) and started again with `--resume_from_checkpoint latest`. A checkpoint under its name has to be whole after the
kill. After the second run every file of the reference must be there with the same bytes (the written model, the best one, the last
checkpoints with weights, average, optimizer and random states), with the same losses, and each update must have learnt from the
same rows, in both processes. Exit code 1 otherwise.

Rows are noted where the training step takes a batch, not where the loader reads it ahead. Where a process is killed within a call,
it says through a pipe that the call begins, and the parent kills it up to as many seconds later as that call took in the reference.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kill_prepare import digests
from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.training.checkpoint import checkpoints, damage, step_of

HOME = Path(__file__).parents[1]
PHASES = {
    "data": ("medsd.data.transforms:TrainingRows", "__getitem__"),
    "forward": ("medsd.models.unet:PromptedUNet", "forward"),
    "backward": ("accelerate:Accelerator", "backward"),
    "step": ("accelerate.optimizer:AcceleratedOptimizer", "step"),
    "EMA": ("diffusers.training_utils:EMAModel", "step"),
    "save": ("medsd.training.loop", "save_checkpoint"),
    "prune": ("medsd.training.checkpoint", "_prune"),
}
"""Where each phase's function lives, and its name there."""
WHERE = ("before", "within", "after")
FLAGS = {
    "max_train_steps": 12,
    "lr_warmup_steps": 2,
    "validation_steps": 8,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": 2,
    "logging_steps": 3,
    "random_shift": 2,
    "report_to": "none",
}
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
IMAGES = 32
"""In an update: so many that sums are split over all cores, whose order must not matter."""
TOLD = {"config.yaml", "environment.json", "metrics.jsonl", "README.md"}
"""Files that hold times, flags such as `--resume_from_checkpoint`, or the run's name."""
Rows = dict[int, list[list[int]]]
"""Update -> the rows of each of its micro-batches."""


@dataclass(frozen=True)
class Variant:
    """What is trained, and how its images come."""

    lora: bool
    workers: int
    accumulation: int

    def flags(self, data: Path, base: Path) -> dict[str, Any]:
        """With accumulation classes are balanced and timesteps drawn by importance, so that there is more to get wrong."""
        chosen = {"dataset_name": str(data), "dataloader_num_workers": self.workers}
        chosen |= {"train_batch_size": IMAGES // self.accumulation, "gradient_accumulation_steps": self.accumulation}
        more = {"class_sampling": "balanced", "timestep_sampling": "importance"} if self.accumulation > 1 else {}
        return FLAGS | chosen | more | ({"pretrained_model_name_or_path": str(base), "rank": 4} if self.lora else {})

    def __str__(self) -> str:
        return f"{'LoRA' if self.lora else 'full'}, {self.workers} threads, {self.accumulation} micro-batches"


VARIANTS = tuple(itertools.starmap(Variant, itertools.product((False, True), (0, 2), (1, 4))))


@dataclass(frozen=True)
class Point:
    """Where a process is killed: at which call of a phase's function, counted from 0; `delay` is in seconds, for `within`."""

    phase: str
    call: int
    where: str
    delay: float


@dataclass(frozen=True)
class Reference:
    """What an uninterrupted run left: sha256 by file, the rows it learnt from, and the seconds of every call of each phase."""

    flags: dict[str, Any]
    outcome: dict[str, str]
    rows: Rows
    seconds: dict[str, list[float]]

    def draw(self, phase: str, rng: random.Random) -> Point:
        """A random point within a phase."""
        call = rng.randrange(len(self.seconds[phase]))
        return Point(phase, call, rng.choice(WHERE), rng.uniform(0, self.seconds[phase][call]))


@dataclass(frozen=True)
class Kill:
    """What one kill met, and what came of the run after it."""

    variant: Variant
    point: Point
    checkpoint: int
    """Updates in the newest checkpoint after the kill; 0 without any."""
    update: int
    """The last one that the killed process had begun."""
    left: list[str]
    """Files that the reference does not have, such as an old checkpoint whose removal was cut off."""
    wrong: list[str]


def around(phase: str, begin: Callable[[int], None], end: Callable[[int], None]) -> None:
    """Have `begin` and `end` told the number of each call of the phase's function, right before and after it."""
    place, name = PHASES[phase]
    owner, calls = pkgutil.resolve_name(place), itertools.count()
    function = getattr(owner, name)

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        begin(call)
        result = function(*args, **kwargs)
        end(call)
        return result

    setattr(owner, name, watched)


def die_at(point: Point, pipe: int) -> None:
    """Kill this process at a point; where that is within a call, ask the parent to."""

    def reached(where: str, call: int) -> None:
        if call == point.call and where == point.where:
            os.kill(os.getpid(), signal.SIGKILL)
        elif call == point.call and where == "before" and point.where == "within":
            os.write(pipe, b"!")

    around(point.phase, functools.partial(reached, "before"), functools.partial(reached, "after"))


def measure(phase: str) -> dict[int, float]:
    """Seconds of each call of a phase's function, filled while the process runs."""
    seconds: dict[int, float] = {}

    def begin(call: int) -> None:
        seconds[call] = -time.perf_counter()

    def end(call: int) -> None:
        seconds[call] += time.perf_counter()

    around(phase, begin, end)
    return seconds


def note_rows(path: Path) -> None:
    """Append a line (update, rows) to a file for each micro-batch that the training step takes."""
    from medsd.training import loop, setup

    updates, batches, present = loop.Loop.updates, setup.batches, [0]
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted(self: loop.Loop, *args: int) -> Iterator[int]:
        for update in updates(self, *args):
            present[0] = update
            yield update

    def noted(*args: Any) -> Iterator[Any]:
        for batch, draws in batches(*args):
            os.write(file, f"{json.dumps([present[0], batch['rows'].tolist()])}\n".encode())
            yield batch, draws

    loop.Loop.updates, setup.batches = counted, noted


def child(flags: dict[str, Any], rows: str, point: dict[str, Any] | None, pipe: int, seconds: str | None) -> None:
    """Train; die at `point`, or write the seconds of all phases to a file."""
    from medsd.config import FinetuneUNetConfig
    from recipes import finetune_unet

    note_rows(Path(rows))
    if point is not None:
        die_at(Point(**point), pipe)
    measured = {phase: measure(phase) for phase in PHASES} if seconds is not None else {}
    finetune_unet.main(FinetuneUNetConfig(**flags))
    if seconds is not None:
        ended = {phase: [value for value in list(found.values()) if value > 0] for phase, found in measured.items()}
        Path(seconds).write_text(json.dumps(ended))  # A loader's thread may be within a call even now.


def log_of(rows: Path) -> Path:
    """Where a process says what it says, beside the rows that it notes."""
    return rows.with_name(f"{rows.name}.log")


def last_line(path: Path) -> str:
    return path.read_text().strip().rpartition("\n")[2]


def train(flags: dict[str, Any], rows: Path, point: Point | None = None, seconds: Path | None = None) -> int:
    """Train in a process of its own, which `point` kills; returns its exit code."""
    reading, writing = os.pipe()
    task = {"flags": flags, "rows": str(rows), "point": asdict(point) if point else None, "pipe": writing}
    task["seconds"] = str(seconds) if seconds else None
    command = [sys.executable, "-m", "benchmarks.kill_training", "--child", json.dumps(task)]
    with log_of(rows).open("w") as words:
        process = subprocess.Popen(command, cwd=HOME, stdout=words, stderr=words, pass_fds=[writing], env=os.environ | QUIET)
    os.close(writing)
    if os.read(reading, 1):  # Empty where the process ended without a word.
        time.sleep(point.delay)
        process.kill()
    os.close(reading)
    return process.wait()


def train_or_exit(flags: dict[str, Any], rows: Path, seconds: Path | None = None) -> None:
    if train(flags, rows, seconds=seconds):
        raise SystemExit(log_of(rows).read_text())


def outcome(run: Path) -> dict[str, str]:
    """sha256 of a finished run's files, without those that hold times; of its losses; and of its card, whatever its name is."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = json.dumps([{name: value for name, value in line.items() if name != "time"} for line in lines])
    files = {name: digest for name, digest in digests(run).items() if name not in TOLD}
    card = (run / "README.md").read_text().replace(run.name, "RUN")
    return files | {"losses": hashlib.sha256(losses.encode()).hexdigest(), "README.md": hashlib.sha256(card.encode()).hexdigest()}


def read_rows(path: Path) -> Rows:
    """What one process noted."""
    found: Rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        update, rows = json.loads(line)
        found.setdefault(update, []).append(rows)
    return found


def differing_rows(first: Rows, second: Rows, reference: Rows) -> list[str]:
    """Updates that saw other rows than the reference's, in a killed process and in the one that went on."""
    other = [f"update {update} saw other rows" for update, rows in first.items() if rows != reference[update][: len(rows)]]
    learnt = first | second
    return other + [f"update {update} learnt from other rows" for update in reference if learnt.get(update) != reference[update]]


def prepare_data(folder: Path) -> Path:
    """A prepared phantom: 30 patients, 32 px."""
    write_phantom(folder / "phantom_dicom_0", patients=30, slices=6, size=64)
    prepare_phantom(folder / "data", PrepareOptions(resolution=32, num_workers=0))
    return folder / "data"


def make_reference(folder: Path, variant: Variant) -> Reference:
    """An uninterrupted run of a variant."""
    run, rows = folder / f"reference{VARIANTS.index(variant)}", folder / f"reference{VARIANTS.index(variant)}.rows"
    flags, seconds = variant.flags(folder / "data", folder / "base"), run.with_suffix(".seconds")
    train_or_exit(flags | {"output_dir": str(run)}, rows, seconds)
    return Reference(flags, outcome(run), read_rows(rows), json.loads(seconds.read_text()))


def kill_once(run: Path, variant: Variant, reference: Reference, point: Point) -> Kill:
    """Start, kill at a point, run again, compare."""
    first, second = run.with_suffix(".rows"), run.with_suffix(".rows2")
    flags = reference.flags | {"output_dir": str(run)}
    wrong = ["it was not killed"] if train(flags, first, point) != -signal.SIGKILL else []
    kept = checkpoints(run)
    wrong += [f"{path.name}: {why}" for path in kept if (why := damage(path))]
    code = train(flags | {"resume_from_checkpoint": "latest"}, second)
    wrong += [f"the second run ended with {code}: {last_line(log_of(second))}"] if code else []
    found = outcome(run) if not code else {}
    wrong += [f"{name} differs" for name, digest in reference.outcome.items() if found.get(name) != digest]
    wrong += differing_rows(read_rows(first), read_rows(second), reference.rows)
    left = sorted(found.keys() - reference.outcome.keys())
    return Kill(variant, point, step_of(kept[-1]) if kept else 0, max(read_rows(first), default=0), left, wrong)


def kill_often(
    folder: Path, kills: int, seed: int, jobs: int = 1, phases: Sequence[str] = tuple(PHASES), variants: Sequence[Variant] = VARIANTS
) -> list[Kill]:
    """The references, then so many kills, `jobs` at a time; prints a line for each."""
    data, numbers = prepare_data(folder), range(kills)
    if any(variant.lora for variant in variants):
        base = Variant(False, 0, 1).flags(data, folder) | {"max_train_steps": 2, "output_dir": str(folder / "base")}
        train_or_exit(base, folder / "base.rows")
    done = []
    with ThreadPoolExecutor(jobs) as pool:
        references = dict(zip(variants, pool.map(functools.partial(make_reference, folder), variants), strict=True))
        print(f"{len(references)} references; every kill: SIGKILL, then once more with --resume_from_checkpoint latest")
        print(f"{'kill':>4}  {'variant':<33}{'phase':<9}{'call':>9} {'where':<7}{'in update':>10}{'resumed from':>13}  result")

        def attempt(number: int) -> Kill:
            variant, phase = variants[number % len(variants)], phases[number % len(phases)]
            point = references[variant].draw(phase, random.Random(f"{seed} {number}"))
            kill = kill_once(folder / f"killed{number}", variant, references[variant], point)
            shutil.rmtree(folder / f"killed{number}", ignore_errors=True)
            return kill

        for number, kill in zip(numbers, pool.map(attempt, numbers), strict=True):
            done.append(kill)
            call = f"{kill.point.call + 1}/{len(references[kill.variant].seconds[kill.point.phase])}"
            place = f"{kill.variant!s:<33}{kill.point.phase:<9}{call:>9} {kill.point.where:<7}{kill.update:>10}{kill.checkpoint:>13}"
            remark = f"; left over: {len(kill.left)} files" if kill.left else ""
            print(f"{number:>4}  {place}  {'; '.join(kill.wrong) or 'identical'}{remark}", flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each of which uses all cores")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(**json.loads(args.child))
        return
    with tempfile.TemporaryDirectory() as folder:
        done = kill_often(Path(folder), args.kills, args.seed, args.jobs)
    wrong, left = (sum(map(bool, found)) for found in zip(*((kill.wrong, kill.left) for kill in done), strict=True))
    print(f"{len(done)} kills: {len(done) - wrong} identical, {wrong} not; files were left over after {left}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
