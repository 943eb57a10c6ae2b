"""What surrounds the training step in every recipe: the bar, and what happens once in a while."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medsd.errors import InputError
from medsd.runtime import partial_folder, replace_folder
from medsd.training.best import Best
from medsd.training.checkpoint import save_checkpoint
from medsd.training.guard import ASKED, Guard, Preempted
from medsd.training.record import RunRecord
from medsd.training.state import MOST_SKIPPED, TrainState, random_states
from medsd.training.stopwatch import FlopCounter, described, profile

Write = Callable[[str], None]


@dataclass(frozen=True)
class Cadence:
    """The last update, and how many updates lie between two of a kind (0: none, not even after the last one)."""

    last: int
    logging: int
    validation: int
    checkpointing: int
    checkpoints_kept: int | None


@dataclass
class Loop:
    """A run's updates, and what happens between two of them."""

    accelerator: Any
    state: TrainState
    record: RunRecord
    guard: Guard
    cadence: Cadence
    best: Best
    look: Callable[[int, Write], dict[str, float]]
    """Told the step and where to write a line: what held-out images say of the averaged weights."""
    keep: Callable[[Path], None]
    """Writes the present model, with averaged weights, to an empty folder."""
    images: int
    """That this process sees in an update."""
    settings: dict[str, Any]
    """What determines the result, for checkpoints."""
    flops: FlopCounter | None

    def updates(self, done: int, looked: int) -> Iterator[int]:
        """Numbers of the updates after `done`, behind a bar; the caller learns from the micro-batches of each.

        After it the main process looks with the averaged weights, and all processes save a checkpoint, when these are due. `looked` is
        the step of the last look: one that a signal broke off is made up for first. Raises Preempted after a signal, and InputError
        where too many updates in a row were skipped; both with a checkpoint.
        """
        self.looked, main = looked, self.accelerator.is_main_process
        bar = tqdm(range(done + 1, self.cadence.last + 1), initial=done, total=self.cadence.last, disable=not main)
        with self.guard.waits():
            if looked < done and self._due(done, self.cadence.validation):
                self._look(done, bar.write)
            self.state.watch.mark("other")
            for step in bar:
                yield step
                self.state.finish_update()
                self.record.step = step
                self._between(step, bar)
                self.state.watch.mark("other")
                if self.guard.level:
                    break
        bar.close()
        if self.guard.level >= ASKED:
            raise self.guard.preempted(f"checkpoint-{self.record.step} is saved; go on with --resume_from_checkpoint latest")
        if self.record.step > done:
            self._tell_speed((self.record.step - done) * self.images)

    def _between(self, step: int, bar: tqdm) -> None:
        """What is due after an update."""
        if self._due(step, self.cadence.logging):
            self._log(step, bar)
        if self._due(step, self.cadence.validation):
            self._look(step, bar.write)
        self._refuse_nonsense(step)
        if self.guard.agreed(self.accelerator) or self._due(step, self.cadence.checkpointing):
            self._save(step)

    def _due(self, step: int, every: int) -> bool:
        """Whether something that happens `every` so many updates (0: never), and after the last one, happens now."""
        return every > 0 and (step % every == 0 or step == self.cadence.last)

    def _log(self, step: int, bar: tqdm) -> None:
        numbers = {"loss": self.state.mean_loss(self.accelerator), "learning_rate": self.state.learning_rate}
        numbers |= {f"{name}_loss": partner.mean_loss(self.accelerator) for name, partner in self.state.partners.items() if partner.losses}
        if skipped := self.state.skipped_at_all():
            numbers["skipped"] = skipped
        self.record.log(step, **numbers)
        self.state.watch.settle()
        shown = {"loss": "not finite" if numbers["loss"] is None else f"{numbers['loss']:.4f}"}
        bar.set_postfix(shown | ({"skipped": skipped} if skipped else {}))

    def _look(self, step: int, write: Write) -> None:
        """By the main process. A signal breaks it off: it can be made up for, and the checkpoint comes first."""
        with self.state.averaged():
            if not self.accelerator.is_main_process:
                return
            try:
                with self.guard.waits(False), self.accelerator.autocast():
                    if self.best.improved(step, self.look(step, write)):
                        self._keep_best()
            except Preempted:
                return
        self.looked = step
        if self.best.hopeless:
            self.record.reason = f"no better look in {self.best.patience}: the best one was {self.best}"
            write(f"{self.record.reason}; see {self.record.folder / 'best'}")
            self.guard.enough()

    def _keep_best(self) -> None:
        final = self.record.folder / "best"
        made = partial_folder(final)
        self.keep(made)
        replace_folder(made, final)

    def _refuse_nonsense(self, step: int) -> None:
        """End a run whose updates are all skipped. On a GPU, where the host would have to wait, it is asked only now and then."""
        if self.accelerator.device.type != "cpu" and step % MOST_SKIPPED and step != self.cadence.last:
            return
        if self.state.skipped_in_a_row() >= MOST_SKIPPED:
            self.state.forget_row()
            self._save(step)
            raise InputError(
                f"loss or gradient was not finite in {MOST_SKIPPED} updates in a row, all of which were skipped; checkpoint-{step} has "
                "the weights from before them: look at the data, or go on with a smaller --learning_rate or with --mixed_precision no"
            )

    def _save(self, step: int) -> None:
        """A checkpoint: all processes gather, the main one writes."""
        scaler = self.accelerator.scaler
        record = {
            "step": step,
            "looked": self.looked,
            "settings": self.settings,
            "state": self.state.record(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        files = chain(self.state.files(), [("random", random_states(self.accelerator))])
        if self.accelerator.is_main_process:
            save_checkpoint(self.record.folder, step, files, record, self.cadence.checkpoints_kept)
        else:
            deque(files, maxlen=0)

    def _tell_speed(self, images: int) -> None:
        """A line, and a part of `environment.json`."""
        flops = self.flops.per_image() if self.flops is not None else None
        numbers = profile(self.state.watch, images, self.accelerator.num_processes, flops, self.accelerator.mixed_precision)
        self.record.environment(profile=numbers)
        self.accelerator.print(f"speed: {described(numbers)}")
