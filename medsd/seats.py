"""Other recipes as processes side by side, each on its share of the machine, and none outlives the one that started it.

A *seat* is a share of the machine. A *job* is an iterator that starts one process after the other: it is asked for the next when the one
before has ended, and stops when there is none.
"""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from medsd.errors import InputError
from medsd.output import alone_in
from medsd.runtime import FOLLOWS

LOOK_SECONDS = 0.2
"""Between two looks at whether a process has ended."""
LAST_WORDS = 60.0
"""Seconds in which a process that is stopped may save what it has."""
Job = Iterator[subprocess.Popen]


@dataclass(frozen=True)
class Seat:
    """Cores, and a GPU as `CUDA_VISIBLE_DEVICES` names it or None."""

    cores: tuple[int, ...]
    device: str | None = None

    def __str__(self) -> str:
        return f"{len(self.cores)} core{'s' * (len(self.cores) > 1)}" + (" and a GPU" if self.device else "")


def seats(parallel: int | None, most: int) -> list[Seat]:
    """As many as `parallel`, else as GPUs, else as cores, but at most `most`: GPUs one by one, cores as evenly as that goes."""
    cores, devices = sorted(os.sched_getaffinity(0)), visible_devices()
    count = min(parallel or len(devices) or len(cores), most)
    shares = [tuple(cores[place::count]) or (cores[place % len(cores)],) for place in range(count)]
    return [Seat(share, devices[place % len(devices)] if devices else None) for place, share in enumerate(shares)]


def visible_devices() -> list[str]:
    """GPUs as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(place) for place in range(torch.cuda.device_count())]


def side_by_side(jobs: Sequence[Callable[[Seat], Job]], places: Sequence[Seat], ended: Callable[[], None]) -> None:
    """All jobs, as many at once as there are `places`; `ended` is called after each. What one raises stops all."""
    waiting, free = deque(jobs), list(range(len(places)))
    running: dict[int, tuple[Job, subprocess.Popen | None]] = {}
    try:
        while waiting or running:
            while waiting and free:
                place = free.pop(0)
                running[place] = (waiting.popleft()(places[place]), None)
            for place, (job, process) in list(running.items()):
                if process is None or process.poll() is not None:
                    running[place] = (job, next(job, None))
                    if running[place][1] is None:
                        del running[place]
                        free.append(place)
                        ended()
            time.sleep(LOOK_SECONDS)
    finally:
        end([process for _, process in running.values() if process is not None])


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Ask them to stop, and see to it."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def start(script: Path, flags: Sequence[str], seat: Seat, log: Path, folder: Path) -> subprocess.Popen:
    """A recipe on a seat, what it prints added to `log`; it writes to `folder`, for which it waits where an orphan is in it."""
    command = [sys.executable, str(script), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(len(seat.cores)), FOLLOWS: "1"}
    if seat.device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = seat.device
    wait_for_orphan(folder)
    with log.open("a") as stream, confined(seat.cores):
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment)


@contextmanager
def confined(cores: Sequence[int]) -> Iterator[None]:
    """Within, processes are started that run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def wait_for_orphan(folder: Path) -> None:
    """What a killed process had started saves what it has in `folder`, and ends; raises InputError where it does not."""
    patience = time.monotonic() + LAST_WORDS
    while True:
        try:
            with alone_in(folder):
                return
        except InputError:
            if time.monotonic() > patience:
                raise
            time.sleep(LOOK_SECONDS)


def last_words(log: Path) -> str:
    """The last error of the last process that wrote to a log, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").split("\n") if line.strip()]
    began = max(place for place, line in enumerate(lines) if line.startswith("$ "))
    errors = [line.removeprefix("error: ") for line in lines[began:] if line.startswith("error: ")]
    return errors[-1] if errors else lines[-1] if began < len(lines) - 1 else "it ended without a word"
