"""What every training recipe does once, before its loop."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.data.transforms import TrainingOrder, TrainingRows, row_classes, training_loader
from medsd.errors import InputError
from medsd.runtime import use_all_cores
from medsd.training.checkpoint import TrainState, trained_parameters

EMA_DECAY = 0.999


def build_accelerator(mixed_precision: str, accumulation: int, seed: int) -> Any:
    """An Accelerator, with weights' initialisation seeded; raises InputError for fp16 without a GPU."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    set_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)
    use_all_cores(accelerator)
    return accelerator


def clear_output(accelerator: Any, folder: Path, overwrite: bool) -> None:
    """With `overwrite`, empty a folder that `check_output` allowed; everything that can be refused has been refused by then."""
    if overwrite and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()


def start(
    accelerator: Any,
    modules: dict[str, torch.nn.Module],
    learning_rate: float,
    use_8bit: bool,
    lr_scheduler: str,
    warmup: int,
    steps: int,
    use_ema: bool,
    checkpoint: Path | None,
) -> tuple[TrainState, dict[str, torch.nn.Module], int]:
    """Optimizer, schedule and average for what learns in `modules`, restored from a checkpoint where there is one.

    Returns the state, the modules prepared for the accelerator and in training mode, and the number of updates already done.
    """
    parameters = trained_parameters(modules)
    optimizer = build_optimizer(parameters.values(), learning_rate, use_8bit)
    state = TrainState(parameters, optimizer, build_schedule(optimizer, lr_scheduler, warmup, steps), EMA_DECAY if use_ema else None)
    done = state.load(checkpoint) if checkpoint else 0
    networks = {name: accelerator.prepare(module).train() for name, module in modules.items()}
    state.optimizer = accelerator.prepare(optimizer)
    return state, networks, done


def batches(
    accelerator: Any,
    dataset: Any,
    batch_size: int,
    class_sampling: str,
    seed: int,
    updates_done: int,
    num_workers: int,
    prompts: np.ndarray | None = None,
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Generator]]:
    """Endless (batch of `TrainingRows`, generator of its random numbers); both depend on (seed, number of the micro-batch, process) alone.

    `prompts` `(N,)` is the number of each row's prompt.
    """
    first, rows = updates_done * accelerator.gradient_accumulation_steps, TrainingRows(dataset, prompts)
    classes = row_classes(dataset)
    order = TrainingOrder(classes, batch_size, class_sampling, seed, first, accelerator.process_index, accelerator.num_processes)
    for number, batch in enumerate(training_loader(rows, order, num_workers), start=first):
        on_device = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        yield on_device, draws(seed, number, accelerator.process_index, accelerator.device)


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


def draws(seed: int, micro_batch: int, rank: int, device: torch.device) -> torch.Generator:
    """Generator of all random numbers of one micro-batch, so that any step can be repeated."""
    key = np.random.SeedSequence([seed, micro_batch, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))
