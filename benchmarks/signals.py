"""Does a run that is told to stop leave a checkpoint of its last update, no process behind, and the same result once resumed?

    python benchmarks/signals.py --signals 20 --seed 0

Sends SIGTERM to `accelerate launch`, or to a training process that it started, of runs with one and with two processes, at a random
moment after a random update was logged. Checked is:

- how many updates the newest checkpoint has more than the last line of metrics.jsonl that was written before the signal: 0 where it
  came after that line and before the end of that update, 1 where it came within the next update, 2 for the one after. Not more.
- status.json says preempted, at the checkpoint's update.
- seconds from the signal to the end of the last process that has the run's folder on its command line: 5 at most.
- the run, resumed to its end, leaves the files and losses of an uninterrupted one with as many processes, byte by byte.

Each training process has a core of its own. Exit code 1 where anything is not so.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.kill_prepare import children
from benchmarks.kill_training import FLAGS, HOME, QUIET, last_line, outcome, prepare_data
from medsd.training.checkpoint import newest_whole, step_of

RECIPE = HOME / "recipes" / "finetune_unet.py"
KINDS = tuple(product((1, 2), ("launcher", "child")))
UPDATES, LATEST = 40, 30
"""Of a run, and the last one after which a signal comes."""
RUN = {"max_train_steps": UPDATES, "gradient_accumulation_steps": 4, "checkpointing_steps": 15, "validation_steps": 20, "logging_steps": 1}
PATIENCE, LONGEST = 5.0, 60.0
"""Seconds in which all processes have to end, and after which they are killed."""
MOST_LATER = 2


@dataclass(frozen=True)
class Stop:
    """What one signal led to."""

    processes: int
    target: str
    update: int
    """The last one that was logged before the signal."""
    checkpoint: int
    """Updates in the newest checkpoint."""
    seconds: float
    """Until no process was left."""
    wrong: list[str]


def launch(data: Path, run: Path, processes: int, *flags: str) -> subprocess.Popen:
    """`accelerate launch` of the recipe; what it says is in a file beside `run`."""
    several = ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:processes]))
    command = ["taskset", "-c", cores, "accelerate", "launch", "--num_processes", str(processes), *several, str(RECIPE)]
    named = FLAGS | RUN | {"dataset_name": data, "output_dir": run}
    settings = [word for name, value in named.items() for word in (f"--{name}", str(value))]
    environment = os.environ | QUIET | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with run.with_suffix(".log").open("a") as words:
        return subprocess.Popen([*command, *settings, *flags], stdout=words, stderr=words, env=environment)


def logged(run: Path, before: float = float("inf")) -> int:
    """The last update with a line in metrics.jsonl from before a moment (seconds since 1970); 0 without any."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return max((line["step"] for line in lines if line["time"] < before), default=0)


def trainers(run: Path) -> list[int]:
    """Processes with the run's folder on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(run).encode() in (place / "cmdline").read_bytes().split(b"\0"):  # Of a zombie it is empty.
                found.append(int(place.name))
        except OSError:  # It ended while we looked.
            continue
    return found


def wait_until_gone(process: subprocess.Popen, run: Path, seconds: float) -> list[int]:
    """Trainers that are alive after so many seconds; returns as soon as there are none."""
    until = time.monotonic() + seconds
    while (process.poll() is None or trainers(run)) and time.monotonic() < until:
        time.sleep(0.02)
    return trainers(run)


def stop_once(data: Path, run: Path, processes: int, target: str, rng: random.Random) -> Stop:
    """Launch, wait for an update, send the signal, and look at what is left."""
    process, update, pause = launch(data, run, processes), rng.randint(1, LATEST), rng.uniform(0, 0.2)
    while process.poll() is None and logged(run) < update:
        time.sleep(0.005)
    time.sleep(pause)
    started = children(process.pid)
    pid, begin, sent = process.pid if target == "launcher" else rng.choice(started), time.monotonic(), time.time()
    os.kill(pid, signal.SIGTERM)
    orphans = wait_until_gone(process, run, LONGEST)
    seconds, update = time.monotonic() - begin, logged(run, sent)
    wrong = [f"processes lived on for {seconds:.1f} s"] if seconds > PATIENCE else []
    for orphan in {*orphans} & {*started, process.pid}:
        os.kill(orphan, signal.SIGKILL)
    process.wait()
    found = newest_whole(run)
    checkpoint = step_of(found) if found else 0
    if not 0 <= checkpoint - update <= MOST_LATER:
        wrong.append("the checkpoint is of another update")
    status = json.loads((run / "status.json").read_text())
    if (status["state"], status["step"]) != ("preempted", checkpoint):
        wrong.append(f"status.json says {status}")
    return Stop(processes, target, update, checkpoint, seconds, wrong)


def resume(data: Path, run: Path, processes: int, reference: dict[str, str]) -> list[str]:
    """Go on to the end; returns files that are not the reference's."""
    if code := launch(data, run, processes, "--resume_from_checkpoint", "latest").wait():
        return [f"the resumed run ended with {code}: {last_line(run.with_suffix('.log'))}"]
    found = outcome(run)
    return [f"{name} differs" for name, digest in reference.items() if found.get(name) != digest]


def stop_often(folder: Path, signals: int, seed: int) -> list[Stop]:
    """The references, then so many signals; prints a line for each."""
    data, references, done = prepare_data(folder), {}, []
    for processes in sorted({KINDS[number % len(KINDS)][0] for number in range(signals)}):
        run = folder / f"reference{processes}"
        if launch(data, run, processes).wait():
            raise SystemExit(run.with_suffix(".log").read_text())
        references[processes] = outcome(run)
    print(f"{'signal':>6}{'processes':>11}  {'to':<10}{'in update':>9}{'checkpoint':>12}{'later':>7}{'gone after':>12}  resumed")
    for number in range(signals):
        (processes, target), run = KINDS[number % len(KINDS)], folder / f"stopped{number}"
        stop = stop_once(data, run, processes, target, random.Random(f"{seed} {number}"))
        stop.wrong.extend(resume(data, run, processes, references[processes]))
        done.append(stop)
        place = f"{stop.update:>9}{stop.checkpoint:>12}{stop.checkpoint - stop.update:>7}{stop.seconds:>10.2f} s"
        print(f"{number:>6}{processes:>11}  {target:<10}{place}  {'; '.join(stop.wrong) or 'identical'}", flush=True)
        shutil.rmtree(run)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = stop_often(Path(folder), args.signals, args.seed)
    wrong = sum(bool(stop.wrong) for stop in done)
    later, slowest = max(stop.checkpoint - stop.update for stop in done), max(stop.seconds for stop in done)
    print(f"{len(done)} signals: {wrong} wrong; checkpoint at most {later} updates later, all processes gone after at most {slowest:.1f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
