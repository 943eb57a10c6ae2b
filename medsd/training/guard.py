"""What may stop a run from outside: signals, a launcher that dies, and too little memory.

From the first update to the written model a signal is only noted, but during looks; the run stops at the next boundary between two
updates, with a checkpoint. At any other time it stops at once.
"""

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch

from medsd.errors import InputError
from medsd.output import alone_in
from medsd.runtime import LONGEST_WAIT

EXIT_CODES = {signal.SIGHUP: 129, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
"""Signals that ask a run to stop. Of several the last one here counts: a launcher that dies of SIGINT or SIGUSR1 sends SIGTERM, too.
SIGUSR1 asks to be started again (75: EX_TEMPFAIL)."""
IMPATIENT = 2.0
"""A SIGINT so many seconds after another stops at once. (Terminal and launcher may both send one for the same Ctrl-C.)"""
ENOUGH = 1
"""What `Guard.agreed` says where the run asked itself to stop; signals are `ASKED` and more."""
ASKED = 2
Config = TypeVar("Config", bound=Any)


class Preempted(SystemExit):
    """A signal stopped the run; `code` is the process's exit code."""

    def __init__(self, received: signal.Signals, told: str = "") -> None:
        super().__init__(EXIT_CODES[received])
        self.signal, self.told = received, told

    def __str__(self) -> str:
        return f"{self.signal.name}{': ' if self.told else ''}{self.told}"


class OutOfMemory(Exception):
    """Neither the device nor the host had room for an update."""


class Guard:
    """Context manager in which signals raise Preempted at once; between `hold` and `release` they are kept until `agreed` is asked."""

    def __init__(self) -> None:
        self.level, self.decided, self.holds, self.first = 0, 0, False, math.inf
        self.saved = False
        """Whether this start has saved a checkpoint."""
        self.updating = False
        """Whether an update is being made."""
        self.group: Any = None
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Guard":
        for number in EXIT_CODES if threading.current_thread() is threading.main_thread() else ():
            if number not in {signal.SIGHUP, signal.SIGINT} or signal.getsignal(number) != signal.SIG_IGN:  # As by nohup and by &.
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        received, now = signal.Signals(number), time.monotonic()
        impatient = received == signal.SIGINT and now - self.first > IMPATIENT
        if received == signal.SIGINT:
            self.first = min(self.first, now)
        self.level = max(self.level, ASKED + list(EXIT_CODES).index(received))
        if not self.holds or impatient:
            raise Preempted(received)

    def hold(self) -> None:
        """From now on signals are kept for `agreed`, but for a SIGINT that is repeated."""
        self.holds = True

    def release(self) -> None:
        """From now on signals stop the run at once again. One that was kept does not."""
        self.holds = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, a signal, also one that was kept, stops the run at once; afterwards they are kept again."""
        try:
            self.release()
            if self.level >= ASKED:
                raise self.preempted()
            yield
        finally:
            self.hold()

    def enough(self) -> None:
        """Let the run stop by itself."""
        self.level = max(self.level, ENOUGH)

    def agreed(self, accelerator: Any) -> int:
        """0, `ENOUGH`, or more: why the run has to stop, the same on every process. Every process has to ask at the same time.

        `decided` keeps the answer; a signal that comes while they agree, or later, counts when they are asked again.
        """
        self.decided = self._highest() if accelerator.num_processes > 1 else self.level
        return self.decided

    def _highest(self) -> int:
        """Over all processes; by a group of its own on the CPU, so that no device is waited for."""
        if self.group is None:
            self.group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        level = torch.tensor(self.level)
        torch.distributed.all_reduce(level, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(level)

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Within, the errors of a device or a host without memory become OutOfMemory; Preempted where the run had to stop anyway."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            if self.level >= ASKED:
                raise self.preempted("memory did not suffice, either") from None
            raise OutOfMemory(str(error).partition("\n")[0] or "out of memory") from None

    def preempted(self, told: str = "") -> Preempted:
        """The exception to end with, once a signal has come."""
        return Preempted(list(EXIT_CODES)[max(self.decided, self.level) - ASKED], told)


def guarded(train: Callable[[Config, Guard], None], config: Config) -> None:
    """Call `train(config, guard)`, alone in the config's output folder.

    Where an update raises OutOfMemory and the config has `auto_batch_size`, it is called again, from the last checkpoint, with fewer
    images in a micro-batch and so many more micro-batches that an update sees as many. Raises InputError where that is not possible,
    and where another run is in the folder.
    """
    first = os.environ.get("RANK", "0") == "0"
    with alone_in(Path(config.output_dir)) if first else nullcontext():
        try:
            again: Config | None = config
            while again is not None:
                again = _attempt(train, again)
        except Preempted as stopped:
            if first:
                print(f"stopped by {stopped}")
            raise


def _attempt(train: Callable[[Config, Guard], None], config: Config) -> Config | None:
    """Train; the config to go on with where an update needs more memory than there is."""
    from accelerate import PartialState

    try:
        with Guard() as guard:
            train(config, guard)
        return None
    except OutOfMemory as error:
        if not guard.updating:
            raise InputError(
                f"out of memory outside of an update ({error}): a smaller --preset or --resolution, or --rank with --mixed_precision bf16, "
                "need less"
            ) from None
        config = smaller(config, str(error), guard.saved, PartialState().num_processes)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return config


def smaller(config: Config, reason: str, saved: bool, processes: int = 1) -> Config:
    """The config with the next smaller micro-batch for the same effective batch, to go on from what it `saved`.

    Raises InputError where that is not wanted or possible.
    """
    images, accumulation = config.train_batch_size, config.gradient_accumulation_steps
    less = next((size for size in range(images // 2, 0, -1) if images % size == 0), None)
    if not config.auto_batch_size or less is None:
        wanted = "--auto_batch_size, " if less and not config.auto_batch_size and processes == 1 else ""
        raise InputError(
            f"out of memory with --train_batch_size {images} ({reason}): {wanted}--gradient_checkpointing, --mixed_precision bf16 or "
            "--use_8bit_adam need less"
        )
    more = accumulation * (images // less)
    print(f"out of memory with {images} images in a micro-batch: on with {less}, and {more} micro-batches in an update")
    changes = {"train_batch_size": less, "gradient_accumulation_steps": more}
    checkpoint = "latest" if saved else config.resume_from_checkpoint or "latest"
    return replace(config, **changes, overwrite=False, resume_from_checkpoint=checkpoint)
