"""What surrounds the training step in every recipe: the bar, and what happens once in a while."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medsd.errors import InputError
from medsd.models.unet import attention_kernel
from medsd.output import replacing
from medsd.training.best import Best
from medsd.training.checkpoint import clear_rests, later, read_tensors, save_checkpoint
from medsd.training.guard import ASKED, Guard, Preempted
from medsd.training.record import AGAIN, RunRecord
from medsd.training.state import MOST_SKIPPED, TrainState, process_states
from medsd.training.stopwatch import described, profile

Write = Callable[[str], None]


@dataclass(frozen=True)
class Cadence:
    """The last update, the images that a process sees in one, and how many lie between two of a kind (0: none, not even at the end)."""

    last: int
    images: int
    logging: int
    validation: int
    checkpointing: int
    checkpoints_kept: int | None


@dataclass
class Loop:
    """A run's updates, and what happens between two of them."""

    accelerator: Any
    network: torch.nn.Module
    """What learns, as `start` returned it."""
    state: TrainState
    record: RunRecord
    guard: Guard
    cadence: Cadence
    best: Best
    look: Callable[[int, Write], dict[str, float]]
    """Told the step and where to write a line: what held-out images say of the averaged weights."""
    keep: Callable[[Path], None]
    """Writes the present model, with averaged weights, to an empty folder."""
    settings: dict[str, Any]
    """What determines the result, for checkpoints."""
    looked: int = 0
    """Step of the last look of this start."""
    saved: int = 0
    """Step of the last checkpoint of this start."""
    abandoned: list[Path] = field(default_factory=list)
    """Checkpoints of more updates than this start began with; they are removed once it has one of its own."""
    trained: int = 0
    """Updates that this call of the recipe has made."""

    def updates(self, done: int, owes_look: bool) -> Iterator[int]:
        """Numbers of the updates after `done`, behind a bar; the caller learns from the micro-batches of each.

        After it all processes save a checkpoint, and the main process looks with the averaged weights, when these are due. A look
        that was due after update `done` and is not in the checkpoint is made up for first. Raises Preempted after a signal, and InputError
        where too many updates in a row were skipped; both with a checkpoint. Signals are kept until `finish`, so that the model can be
        written.
        """
        main, kernel = self.accelerator.is_main_process, attention_kernel(self.network)
        self.record.begin(done, owes_look, device=str(self.accelerator.device), attention=kernel, trained_parameters=self.state.size)
        if main:
            clear_rests(self.record.folder, done, self.cadence.checkpoints_kept)
            self.best.compare(self.record.folder / "best")
        self.abandoned = later(self.record.folder, done)
        self.guard.hold()
        with tqdm(range(done + 1, self.cadence.last + 1), initial=done, total=self.cadence.last, disable=not main) as bar:
            if owes_look:
                self._look(done, bar.write)
            self._notice_hopeless()
            steps = iter(() if self.guard.agreed(self.accelerator) else bar)
            self.state.watch.mark("other")
            for step in steps:
                self.guard.updating = True
                yield step
                self.state.finish_update()
                self.guard.updating = False
                self.record.step, self.trained = step, step - done
                stops = self._between(step, bar)
                self.state.watch.mark("other")
                if stops:
                    break
        if self.guard.decided >= ASKED:
            told = f"checkpoint-{self.saved} is saved; go on with --resume_from_checkpoint latest"
            raise self.guard.preempted(told if self.saved else f"no update was made; {AGAIN}")

    def _between(self, step: int, bar: tqdm) -> bool:
        """What is due after an update; whether it was the last one. The checkpoint comes first, since a look may fail."""
        if self._due(step, self.cadence.logging):
            self._log(step, bar)
        self._refuse_nonsense(step)
        if self._due(step, self.cadence.checkpointing):
            self._save(step)
        if self._due(step, self.cadence.validation):
            self._look(step, bar.write)
            self._notice_hopeless()
        stops = self.guard.agreed(self.accelerator) > 0
        if stops and self.saved != step:
            self._save(step)
        return stops

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
        """By the main process. A signal breaks it off, since it can be made up for; not once there is something to keep."""
        with self.state.averaged():
            if not self.accelerator.is_main_process:
                return
            try:
                with self.guard.interruptible(), self.accelerator.autocast():
                    numbers = self.look(step, write)
            except Preempted:
                return
            if self.best.improved(step, numbers):
                with replacing(self.record.folder / "best") as made:
                    self.keep(made)
                    self.best.sign(made)
        self.looked = step

    def _notice_hopeless(self) -> None:
        """Stop where the looks do not get better."""
        if self.accelerator.is_main_process and self.best.hopeless and self.record.step < self.cadence.last:
            self.record.reason = self.best.verdict
            self.guard.enough()

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
        """A checkpoint: all processes gather, the main one writes, and nobody goes on (or ends) before it is there."""
        scaler = self.accelerator.scaler
        record = {
            "step": step,
            "owes_look": self._due(step, self.cadence.validation) and self.looked != step,
            "settings": self.settings,
            "state": self.state.record(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        files = chain(self.state.files(), [("processes", process_states(self.accelerator, self.state))])
        if self.accelerator.is_main_process:
            save_checkpoint(self.record.folder, step, files, record, self.cadence.checkpoints_kept, self.abandoned)
        else:
            deque(files, maxlen=0)
        self.accelerator.wait_for_everyone()
        self.saved, self.guard.saved, self.abandoned = step, True, []

    def rebuild(self, checkpoint: Path, folder: Path) -> None:
        """Write the model as it was at a checkpoint to an empty folder; every process has to call it, the main one writes.

        The network is that of the checkpoint afterwards.
        """
        self.state.recall(partial(read_tensors, checkpoint))
        if self.accelerator.is_main_process:
            self.keep(folder)

    @property
    def idle(self) -> bool:
        """Whether an earlier start has finished this run, and this one had nothing to add; its model is there, and may be calibrated."""
        return not self.trained and self.record.finished == self.record.step

    def finish(self) -> None:
        """Once the model is written: why the run stopped early, and a line about its speed, which `environment.json` keeps."""
        self.guard.release()
        if self.idle:
            self.accelerator.print(f"{self.record.step} of {self.cadence.last} updates are done: there was nothing to train")
        if self.record.reason:
            best = self.record.folder / "best"
            self.accelerator.print(f"stopped early: {self.record.reason}" + (f", see {best}" if best.is_dir() else ""))
        if self.trained:
            images, accelerator = self.trained * self.cadence.images, self.accelerator
            numbers = profile(self.state.watch, images, accelerator.num_processes, accelerator.mixed_precision)
            self.record.environment(profile=numbers)
            self.accelerator.print(f"speed: {described(numbers)}")
