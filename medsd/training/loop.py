"""What surrounds the training step in every recipe: the bar, and what happens once in a while."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from medsd.training.checkpoint import TrainState
from medsd.training.record import RunRecord


@dataclass(frozen=True)
class Cadence:
    """The last update, and how many updates lie between two of a kind (0: none, not even after the last one)."""

    last: int
    logging: int
    validation: int
    checkpointing: int
    checkpoints_kept: int | None


def updates(
    accelerator: Any, state: TrainState, record: RunRecord, done: int, cadence: Cadence, look: Callable[[int, Callable[[str], None]], None]
) -> Iterator[int]:
    """Numbers of the updates after `done`, behind a bar; the caller learns from the micro-batches of each.

    After it the main process calls `look(update, write)` with the averaged weights and saves a checkpoint, when these are due.
    """
    record.step, main = done, accelerator.is_main_process
    bar = tqdm(range(done + 1, cadence.last + 1), initial=done, total=cadence.last, disable=not main)
    for step in bar:
        yield step
        state.finish_update()
        if due(step, cadence.logging, cadence.last):
            mean_loss = state.mean_loss(accelerator)
            others = {f"{name}_loss": partner.mean_loss(accelerator) for name, partner in state.partners.items() if partner.losses}
            record.log(step, loss=mean_loss, learning_rate=state.learning_rate, **others)
            bar.set_postfix(loss=f"{mean_loss:.4f}")
        if due(step, cadence.validation, cadence.last) and main:
            with state.averaged(), accelerator.autocast():
                look(step, bar.write)
        if due(step, cadence.checkpointing, cadence.last) and main:
            state.save(record.folder, step, cadence.checkpoints_kept)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens `every` so many updates (0: never), and after the last one, happens now."""
    return every > 0 and (step % every == 0 or step == last)
