"""What every training recipe does once, before its loop."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.data.transforms import TrainingOrder, TrainingRows, training_loader
from medsd.errors import InputError
from medsd.randomness import Part, Randomness, normal
from medsd.runtime import use_all_cores
from medsd.training.checkpoint import TrainState, find_checkpoint, trained_parameters

EMA_DECAY = 0.999
LONGEST_WAIT = timedelta(hours=12)
"""For another process, which may look at held-out images or encode a whole data set meanwhile."""


def build_accelerator(mixed_precision: str, accumulation: int, seed: int) -> Any:
    """An Accelerator, with weights' initialisation seeded; raises InputError for fp16 without a GPU."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    set_seed(seed)
    patient = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation, kwargs_handlers=[patient])
    use_all_cores(accelerator)
    return accelerator


def clear_output(accelerator: Any, folder: Path, overwrite: bool) -> None:
    """With `overwrite`, empty a folder that `check_output` allowed; everything that can be refused has been refused by then."""
    if overwrite and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Optimisation:
    """AdamW, its learning rate over the updates, and whether weights are averaged."""

    learning_rate: float
    use_8bit_adam: bool
    lr_scheduler: str
    lr_warmup_steps: int
    max_train_steps: int
    use_ema: bool


def start(accelerator: Any, modules: dict[str, torch.nn.Module], chosen: Optimisation) -> tuple[TrainState, dict[str, torch.nn.Module]]:
    """Optimizer, schedule and average for what learns in `modules`.

    Returns the state, and the modules prepared for the accelerator and in training mode.
    """
    parameters = trained_parameters(modules)
    optimizer = build_optimizer(parameters.values(), chosen.learning_rate, chosen.use_8bit_adam)
    schedule = build_schedule(optimizer, chosen.lr_scheduler, chosen.lr_warmup_steps, chosen.max_train_steps)
    state = TrainState(parameters, optimizer, schedule, EMA_DECAY if chosen.use_ema else None)
    networks = {name: accelerator.prepare(module).train() for name, module in modules.items()}
    state.optimizer = accelerator.prepare(optimizer)
    return state, networks


def resume(state: TrainState, run: Path, wanted: str | None) -> int:
    """Restore the checkpoint that `--resume_from_checkpoint` names, if any; returns the number of updates done."""
    checkpoint = find_checkpoint(run, wanted)
    return state.load(checkpoint) if checkpoint else 0


def batches(
    accelerator: Any, rows: TrainingRows, classes: np.ndarray, batch_size: int, class_sampling: str, seed: int, done: int, num_workers: int
) -> Iterator[tuple[dict[str, torch.Tensor], Part]]:
    """Endless (batch of `rows`, its random numbers), from after `done` updates.

    An update's images and all their numbers depend on (seed, number of the update) alone, however its effective batch is split over
    micro-batches and processes. `classes` `(N,)` are those of `row_classes`.
    """
    splits, rank, world = accelerator.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    order = TrainingOrder(classes, batch_size, class_sampling, seed, done * splits, rank, world)
    for number, batch in enumerate(training_loader(rows, order, num_workers), start=done * splits):
        on_device = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        update, part = divmod(number, splits)
        first = (part * world + rank) * batch_size
        yield on_device, Part(numbers_of(seed, update, accelerator.device), first, splits * world * batch_size)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], learning_rate: float, use_8bit: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay, so that a parameter without a gradient stays where it is."""
    if use_8bit:
        return eight_bit_adam()(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


def eight_bit_adam() -> type[torch.optim.Optimizer]:
    """bitsandbytes' 8-bit AdamW; raises InputError where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(f'--use_8bit_adam needs bitsandbytes: pip install -c constraints.txt -e ".[gpu]" ({error})') from error
    return AdamW8bit


def build_schedule(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int) -> Any:
    """Learning-rate schedule that advances once per update."""
    from diffusers.optimization import get_scheduler

    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def numbers_of(seed: int, update: int, device: torch.device) -> torch.Generator:
    """Generator of all random numbers of one update, so that any can be repeated."""
    key = np.random.SeedSequence([seed, update, 0]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))


def latent_noise(codec: Any, images: torch.Tensor, draws: Randomness) -> torch.Tensor:
    """Unit noise of the shape that images `(B, C, H, W)` have as latents, `(B, c, H / factor, W / factor)`."""
    height, width = (side // codec.factor for side in images.shape[-2:])
    return normal((len(images), codec.latent_channels, height, width), draws)
