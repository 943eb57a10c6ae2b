"""What every training recipe does once, before its loop."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.errors import InputError
from medsd.training.checkpoint import checkpoints


def quiet_libraries() -> None:
    """Keep libraries' notices about what is not installed from the user; warnings that matter still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import diffusers
    import transformers

    datasets.disable_progress_bars()
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def check_output(folder: Path, overwrite: bool, resume: str | None) -> None:
    """Raise InputError for a folder in use; empty it where `overwrite` says so."""
    if not folder.is_dir() or not any(folder.iterdir()) or resume:
        return
    if not overwrite:
        hint = " (--resume_from_checkpoint latest goes on)" if checkpoints(folder) else ""
        raise InputError(f"{folder} is not empty: choose another --output_dir or add --overwrite{hint}")
    shutil.rmtree(folder)


def build_accelerator(mixed_precision: str, accumulation: int, seed: int) -> Any:
    """An Accelerator, with weights' initialisation seeded; raises InputError for fp16 without a GPU."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    set_seed(seed)
    return Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], learning_rate: float, use_8bit: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay, so that a parameter without a gradient stays where it is."""
    if not use_8bit:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(f'--use_8bit_adam needs bitsandbytes: pip install -c constraints.txt -e ".[gpu]" ({error})') from error
    return AdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)


def build_schedule(optimizer: torch.optim.Optimizer, name: str, warmup: int, steps: int) -> Any:
    """Learning-rate schedule that advances once per update."""
    from diffusers.optimization import get_scheduler

    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(kind, optimizer, num_warmup_steps=min(warmup, steps // 2), num_training_steps=steps)


def draws(seed: int, micro_batch: int, rank: int, device: torch.device) -> torch.Generator:
    """Generator of all random numbers of one micro-batch, so that any step can be repeated."""
    key = np.random.SeedSequence([seed, micro_batch, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(key >> np.uint64(1)))
