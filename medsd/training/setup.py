"""What every training recipe does once, before its loop."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd.data.transforms import TrainingOrder, TrainingRows, training_loader
from medsd.errors import InputError
from medsd.output import check_output, check_writable, unfinished
from medsd.randomness import Part, Randomness, normal
from medsd.runtime import LONGEST_WAIT, to_device, use_all_cores
from medsd.training.best import NO_LOOK
from medsd.training.checkpoint import check_same, checkpoints, find_checkpoint, read_record, read_tensors
from medsd.training.sharding import Mirror, alike, configure
from medsd.training.state import TrainState, restore_process_states, trained_parameters
from medsd.training.stopwatch import FlopCounter, Stopwatch

EMA_DECAY = 0.999
FEW_NUMBERS = 1024
"""Of a frozen tensor that are compared when a run is resumed."""


def build_accelerator(mixed_precision: str, accumulation: int, seed: int, allow_tf32: bool = False) -> Any:
    """An Accelerator, with weights' initialisation seeded; raises InputError for what needs a GPU where there is none."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--mixed_precision fp16 needs a GPU: use bf16 or no")
    if allow_tf32 and not torch.cuda.is_available():
        raise InputError("--allow_tf32 is for a GPU: leave it away")
    torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32
    set_seed(seed)
    # Without `cpu` the launcher's processes would each train alone where there is no GPU, and say nothing of it.
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    use_all_cores(accelerator)
    return accelerator


def check_launch(accelerator: Any, auto_batch_size: bool, may_shard: bool) -> None:
    """Raise InputError for a way of launching that this run does not know."""
    kind, config = accelerator.distributed_type, "recipes/configs/accelerate"
    if kind not in {"NO", "MULTI_GPU", "MULTI_CPU", "FSDP"}:
        known = f"{config}/ddp.yaml, fsdp2.yaml and zero2.yaml (which shares out what DeepSpeed's ZeRO-2 does) are"
        raise InputError(f"a launch as {kind.value} is not known: {known}, and train.sbatch for several nodes")
    if kind == "FSDP" and not (may_shard and accelerator.is_fsdp2):
        known = f"{config}/fsdp2.yaml has version 2" if may_shard else f"an autoencoder fits one GPU, use {config}/ddp.yaml"
        raise InputError(f"a launch as FSDP: {known}")
    if kind == "FSDP" and accelerator.mixed_precision == "fp16":
        raise InputError("a launch as FSDP goes with --mixed_precision bf16 or no")
    if auto_batch_size and accelerator.num_processes > 1:
        raise InputError("--auto_batch_size is for one process: find the micro-batch with one, then give it as --train_batch_size")


def choose_checkpoint(accelerator: Any, run: Path, wanted: str | None) -> Path | None:
    """`find_checkpoint` by the main process, for all: it reads every byte, and on a network disk each might see another list.

    Raises InputError where it may not go on in its folder `run`: that of the checkpoint, of a run that saved none yet, or an empty one.
    """
    from accelerate.utils import broadcast_object_list

    chosen = [find_checkpoint(run, wanted) if accelerator.is_main_process else None]
    checkpoint = broadcast_object_list(chosen)[0]
    if wanted is not None:
        check_writable(run)
        of_this_run = checkpoint is not None and checkpoint.parent.resolve() == run.resolve()
        if not of_this_run and (checkpoints(run) or not unfinished(run)):
            check_output(run, overwrite=False)
        if checkpoint is None:
            accelerator.print(f"no checkpoint in {run}: starting anew")
    return checkpoint


@dataclass(frozen=True)
class Optimisation:
    """AdamW, its learning rate over the updates, whether weights are averaged and the module compiled."""

    learning_rate: float
    use_8bit_adam: bool
    lr_scheduler: str
    lr_warmup_steps: int
    max_train_steps: int
    use_ema: bool
    compile: bool = False


def start(
    accelerator: Any, module: torch.nn.Module, chosen: Optimisation, watch: Stopwatch | None = None
) -> tuple[TrainState, torch.nn.Module]:
    """Optimizer, schedule and average for what learns in `module`.

    Returns the state, and the module prepared for the accelerator and in training mode.
    """
    masks = {name: value.learns for name, value in trained_parameters(module).items() if hasattr(value, "learns")}
    mirror = None
    if accelerator.distributed_type == "FSDP":
        mirror = Mirror(trained_parameters(module), accelerator.is_main_process)
        original, module = module, deepcopy(module)
        original.to(accelerator.device if accelerator.is_main_process else "cpu")
        configure(accelerator, module)
    elif accelerator.device.type == "cuda":
        module.to(memory_format=torch.channels_last)
    if chosen.compile:
        module.compile()
    optimizer = build_optimizer(trained_parameters(module).values(), chosen.learning_rate, chosen.use_8bit_adam)
    schedule = build_schedule(optimizer, chosen.lr_scheduler, chosen.lr_warmup_steps, chosen.max_train_steps)
    network, prepared = accelerator.prepare(module, optimizer)
    plain = accelerator.unwrap_model(network)
    parameters = trained_parameters(plain)
    masks = {name: alike(mask.to(accelerator.device), parameters[name]) for name, mask in masks.items()}
    watch = watch or Stopwatch(accelerator.device, None if chosen.compile or mirror else FlopCounter(plain))
    return TrainState(parameters, prepared, schedule, EMA_DECAY if chosen.use_ema else None, watch, masks, mirror), network.train()


def resume(
    accelerator: Any, state: TrainState, checkpoint: Path | None, settings: Mapping[str, Any], allow_change: bool
) -> tuple[int, bool]:
    """Restore a checkpoint, if there is one; returns the number of updates done, and whether the look that was due then is missing.

    Raises InputError where `settings`, all that determines the result, are not those it was trained with, unless that is allowed.
    """
    if checkpoint is None:
        return 0, False
    record = read_record(checkpoint)
    check_same(checkpoint, record["settings"], settings, allow_change)
    accelerator.print(f"going on from {checkpoint}")
    state.restore(partial(read_tensors, checkpoint), record["state"])
    if record["settings"]["best_metric"] != settings["best_metric"]:
        state.memory["best"].copy_(NO_LOOK)
    if accelerator.scaler is not None and record["scaler"] is not None:
        accelerator.scaler.load_state_dict(record["scaler"])
    restore_process_states(accelerator, state, read_tensors(checkpoint, "processes"))
    return record["step"], record["owes_look"]


def frozen_hash(modules: Iterable[torch.nn.Module | None]) -> str:
    """Of the weights that do not learn, from a few numbers of each: whether a run goes on with those that it began with."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.named_parameters() if module is not None else ():
            if not value.requires_grad:
                digest.update(f"{name} {tuple(value.shape)}".encode())
                digest.update(value.detach().flatten()[:FEW_NUMBERS].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def batches(
    accelerator: Any,
    watch: Stopwatch,
    rows: TrainingRows,
    classes: np.ndarray,
    batch_size: int,
    class_sampling: str,
    seed: int,
    done: int,
    num_workers: int,
) -> Iterator[tuple[dict[str, torch.Tensor], Part]]:
    """Endless (batch of `rows`, its random numbers), from after `done` updates.

    An update's images and all their numbers depend on (seed, number of the update) alone, however its effective batch is split over
    micro-batches and processes. `classes` `(N,)` are those of `row_classes`.
    """
    splits, rank, world = accelerator.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    order = TrainingOrder(classes, batch_size, class_sampling, seed, done * splits, rank, world)
    for number, batch in enumerate(training_loader(rows, order, num_workers), start=done * splits):
        # The rows' numbers stay on the CPU, where moments are looked up by them.
        on_device = {name: value if name == "rows" else to_device(value, accelerator.device) for name, value in batch.items()}
        update, part = divmod(number, splits)
        first = (part * world + rank) * batch_size
        watch.mark("data")
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
