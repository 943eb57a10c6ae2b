"""Is there always a whole checkpoint to go on from, however a save is cut off and whatever happens to a file later?

    python benchmarks/damaged_checkpoints.py --saves 200 --seed 0
    python benchmarks/damaged_checkpoints.py --damages 200 --seed 0

Both train the tiny preset with a checkpoint after each update, and look closer at that.

The first lets a fork of the process save, and kills it with SIGKILL: at a random moment, or right before one of the saves' requests
to the file system (open, mkdir, rename, remove, rmdir). Then `latest` has to find a whole checkpoint, with the same bytes as the one
before or as the one that the process itself saves next; and that save must leave no hidden folder.

The second truncates, changes a bit of, deletes or appends to a random file of the newest checkpoint. `damage` has to tell, and
`latest` to find the one before, untouched. Exit code 1 otherwise.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.kill_prepare import digests
from benchmarks.kill_training import FLAGS, prepare_data
from medsd.config import FinetuneUNetConfig
from medsd.errors import InputError
from medsd.training import loop
from medsd.training.checkpoint import checkpoints, damage, newest_whole, save_checkpoint
from recipes import finetune_unet

REQUESTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Audit events of sys.addaudithook; an fsync has none, but the file is opened for it right before."""
Save = Callable[..., Path]


class Requests:
    """Counts what this process asks of the file system, and kills it right before request number `fatal`."""

    def __init__(self) -> None:
        self.count, self.fatal = 0, 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in REQUESTS:
            self.count += 1
            if self.count == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


class KilledSaves:
    """In the place of `save_checkpoint`: after the first save, each is tried by a fork that is killed, and then done."""

    def __init__(self, seed: int) -> None:
        self.rng, self.requests, self.lines = random.Random(seed), Requests(), sys.stdout
        self.before: dict[str, str] = {}
        """Files of the last checkpoint."""
        self.seconds, self.count = 0.0, 0
        """How long the last save took, and how many requests."""
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0

    def __call__(self, run: Path, step: int, *content: Any) -> Path:
        found = self._try(run, step, *content) if self.before else None
        begin, first = time.perf_counter(), self.requests.count
        final = save_checkpoint(run, step, *content)
        self.seconds, self.count = time.perf_counter() - begin, self.requests.count - first
        after = digests(final)
        if found is not None:
            self._judge(step, *found, after, sorted(path.name for path in run.glob(".checkpoint-*")))
        self.before = after
        return final

    def _try(self, run: Path, step: int, *content: Any) -> tuple[str, str, dict[str, str]]:
        """Save in a fork that is killed; returns when, hidden folders that are left, and files of the checkpoint that `latest` finds.

        A fork that has saved before it could be killed is followed by another, which saves over that.
        """
        code = 0
        while code != -signal.SIGKILL:
            by_time, seconds, request = self.rng.random() < 0.5, self.rng.uniform(0, self.seconds), self.rng.randint(1, self.count)
            pid = os.fork()
            if pid == 0:
                self.requests.fatal = 0 if by_time else self.requests.count + request
                save_checkpoint(run, step, *content)
                os._exit(0)
            if by_time:
                time.sleep(seconds)
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        left = " ".join(sorted(path.name for path in run.glob(".checkpoint-*")))
        return f"after {seconds:.3f} s" if by_time else f"at request {request}", left, found_by_latest(run)

    def _judge(self, step: int, when: str, left: str, found: dict[str, str], after: dict[str, str], hidden: list[str]) -> None:
        """A line about an attempt."""
        legitimate = {"the one before": self.before, "the new one": after}
        outcome = next((name for name, files in legitimate.items() if files == found), "WRONG")
        self.wrong += outcome == "WRONG" or bool(hidden)
        self.outcomes[outcome] += 1
        remark = f"; NOT cleaned: {' '.join(hidden)}" if hidden else ""
        print(f"{step - 1:>4}  {when:<16}{left or '-':<46}{outcome}{remark}", file=self.lines, flush=True)


def found_by_latest(run: Path) -> dict[str, str]:
    """sha256 of the files of the newest whole checkpoint; none where all are damaged."""
    with contextlib.suppress(InputError):
        found = newest_whole(run)
        return {} if found is None else digests(found)
    return {}


def train(folder: Path, updates: int, save: Save = save_checkpoint) -> Path:
    """Train the tiny preset on a phantom, with a checkpoint after each update, by way of `save`."""
    flags = {"max_train_steps": updates, "validation_steps": 0, "checkpointing_steps": 1, "lr_scheduler": "constant"}
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), patch.object(loop, "save_checkpoint", save):
        finetune_unet.main(FinetuneUNetConfig(dataset_name=str(prepare_data(folder)), output_dir=str(run), **(FLAGS | flags)))
    return run


def kill_saves(folder: Path, saves: int, seed: int) -> int:
    """Kill so many saves; prints a line for each, and returns how many went wrong."""
    print(f"{'save':>4}  {'killed':<16}{'hidden folders left by the kill':<46}latest finds")
    killed = KilledSaves(seed)
    train(folder, saves + 1, killed)
    print(f"{killed.outcomes.total()} saves, {killed.count} requests each: latest found {dict(killed.outcomes)}; {killed.wrong} wrong")
    return killed.wrong


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 64))


def delete(content: bytes, rng: random.Random) -> None:
    return None


def damage_once(run: Path, rng: random.Random) -> tuple[str, str | None, bool]:
    """Spoil a file for a while; returns what was done, what `damage` says, and whether `latest` finds the checkpoint before, whole."""
    before, newest = checkpoints(run)
    whole, file = digests(before), rng.choice(sorted(newest.iterdir()))
    spoil, content = rng.choice([truncate, flip, append, delete]), file.read_bytes()
    spoiled = spoil(content, rng)
    file.unlink() if spoiled is None else file.write_bytes(spoiled)
    with contextlib.redirect_stdout(io.StringIO()):
        said, found = damage(newest), newest_whole(run)
    file.write_bytes(content)
    if damage(newest) is not None:
        raise SystemExit(f"{newest} was to be whole again")
    return f"{spoil.__name__} {file.name}", said, found == before and digests(before) == whole


def damage_often(folder: Path, damages: int, seed: int) -> int:
    """Damage a checkpoint so often; prints a line for each, and returns how many went wrong."""
    run, rng = train(folder, 3), random.Random(seed)
    unnoticed = unusable = 0
    for number in range(damages):
        done, said, usable = damage_once(run, rng)
        unnoticed, unusable = unnoticed + (said is None), unusable + (not usable)
        print(f"{number:>4}  {done:<34}{said or 'NOT NOTICED':<52}{'latest takes the one before' if usable else 'UNUSABLE'}", flush=True)
    print(f"{damages} damages: {damages - unnoticed} detected, {unusable} unusable")
    return unnoticed + unusable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=0)
    parser.add_argument("--damages", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    wrong = 0
    for attempt, count in ((kill_saves, args.saves), (damage_often, args.damages)):
        with tempfile.TemporaryDirectory() as folder:
            wrong += attempt(Path(folder), count, args.seed) if count else 0
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
