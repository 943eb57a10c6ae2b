"""Checkpoints `checkpoint-N/`: everything a run needs to go on after update N, in safetensors and JSON (no pickle).

A checkpoint is written under another name and renamed when it is complete, so a folder called `checkpoint-N` is whole.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from medsd.errors import InputError


class TrainState:
    """Trained parameters by name, their moving average, the optimizer and the learning-rate schedule."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, schedule: Any, ema_decay: float | None
    ) -> None:
        self.parameters = parameters
        self.optimizer, self.schedule = optimizer, schedule
        self.losses: list[torch.Tensor] = []
        self.memory: dict[str, torch.Tensor] = {}
        """What else is changed in place while training, and saved with it."""
        self.partners: dict[str, TrainState] = {}
        """What learns beside this one, such as a discriminator: advanced once it learns, saved and restored with it."""
        self.learning = False
        self.ema = EMAModel(self.parameters.values(), decay=ema_decay, foreach=True) if ema_decay is not None else None

    def mean_loss(self, accelerator: Any) -> float:
        """Over all micro-batches and processes since the last call."""
        mean = torch.stack(self.losses).mean()
        self.losses.clear()
        return accelerator.reduce(mean, reduction="mean").item()

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return self.schedule.get_last_lr()[0]

    def learn(self, accelerator: Any, loss: torch.Tensor, max_grad_norm: float) -> None:
        """Backward pass of one micro-batch, and the optimizer's update after the last one."""
        self.learning = True
        self.losses.append(loss.detach())
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            self._clip(accelerator, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self, accelerator: Any, max_grad_norm: float) -> None:
        """Clip this state's gradients; accelerate's own would also unscale those of partners, which are not complete yet (fp16)."""
        parameters = list(self.parameters.values())
        if accelerator.scaler is None:
            accelerator.clip_grad_norm_(parameters, max_grad_norm)
        else:
            accelerator.unscale_gradients(self.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)

    def finish_update(self) -> None:
        """Advance the learning rate and the moving average."""
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters.values())
        for partner in self.partners.values():
            if partner.learning:
                partner.finish_update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the modules hold the averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters.values())
        self.ema.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    def adopt_average(self) -> None:
        """For good: the modules' weights become the averaged ones."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters.values())

    def save(self, run: Path, step: int, limit: int | None) -> None:
        """Write `run/checkpoint-STEP`, then remove the oldest beyond `limit`."""
        partial, final = run / f".checkpoint-{step}.partial", run / f"checkpoint-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        self._write(partial, step)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(run)[: -limit if limit else 0]:
            shutil.rmtree(old)

    def _write(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True)
        save_file({name: value.detach().contiguous() for name, value in self.parameters.items()}, folder / "weights.safetensors")
        tensors: dict[str, torch.Tensor] = {}
        record = _take_tensors(self.optimizer.state_dict(), "optimizer", tensors)
        save_file(tensors, folder / "optimizer.safetensors")
        state = {"step": step, "optimizer": record, "schedule": self.schedule.last_epoch}
        if self.ema is not None:
            averages = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
            save_file({name: value.contiguous() for name, value in averages.items()}, folder / "ema.safetensors")
            state["ema_step"] = self.ema.optimization_step
        save_file(self.memory, folder / "memory.safetensors")
        (folder / "state.json").write_text(json.dumps(state))
        for name, partner in self.partners.items():
            partner._write(folder / name, step)

    def load(self, checkpoint: Path) -> int:
        """Restore everything; returns the number of updates done. Raises InputError where it does not fit this run."""
        saved = {path.name for path in checkpoint.iterdir() if path.is_dir()}
        for name in saved ^ self.partners.keys():
            there = "has a" if name in saved else "has no"
            raise InputError(f"{checkpoint} {there} {name}: resume with the flags it was trained with, or --overwrite")
        for name, partner in self.partners.items():
            partner.load(checkpoint / name)
        weights = load_file(checkpoint / "weights.safetensors")
        if weights.keys() != self.parameters.keys() or any(weights[name].shape != value.shape for name, value in self.parameters.items()):
            raise InputError(f"{checkpoint} is of another model: resume with the flags it was trained with, or --overwrite")
        state = json.loads((checkpoint / "state.json").read_text())
        if self.ema is not None and "ema_step" not in state:
            raise InputError(f"{checkpoint} has no moving average: resume with --no_use_ema")
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(weights[name])
        self.optimizer.load_state_dict(_put_tensors(state["optimizer"], load_file(checkpoint / "optimizer.safetensors")))
        self.schedule.last_epoch = state["schedule"]
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.ema is not None:
            averages = load_file(checkpoint / "ema.safetensors")
            for name, shadow in zip(self.parameters, self.ema.shadow_params, strict=True):
                shadow.copy_(averages[name])
            self.ema.optimization_step = state["ema_step"]
        self._load_memory(checkpoint / "memory.safetensors")
        return state["step"]

    def _load_memory(self, file: Path) -> None:
        saved = load_file(file)
        if any(saved[name].shape != value.shape for name, value in self.memory.items()):
            raise InputError(f"{file.parent} was saved with another --timestep_sampling: resume with the one it was trained with")
        for name, value in self.memory.items():
            value.copy_(saved[name])


def trained_parameters(modules: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Parameters that require a gradient, as MODULE.NAME."""
    return {f"{part}.{name}": value for part, module in modules.items() for name, value in module.named_parameters() if value.requires_grad}


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names; None to start anew."""
    if wanted is None:
        return None
    if wanted == "latest":
        return checkpoints(run)[-1] if checkpoints(run) else None
    found = next((path for path in (Path(wanted), run / wanted) if (path / "state.json").is_file()), None)
    if found is None:
        raise InputError(f"--resume_from_checkpoint {wanted}: no checkpoint there; {run} has {[path.name for path in checkpoints(run)]}")
    return found


def _take_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Copy of nested dicts and lists for JSON; each tensor moves to `tensors` under its path, which stands in its place."""
    if torch.is_tensor(value):
        tensors[path] = value.detach().clone().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {str(key): _take_tensors(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _put_tensors(record: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Inverse of `_take_tensors`; keys that were numbers become numbers again."""
    if isinstance(record, dict):
        if record.keys() == {"tensor"}:
            return tensors[record["tensor"]]
        return {int(key) if key.isdigit() else key: _put_tensors(item, tensors) for key, item in record.items()}
    return [_put_tensors(item, tensors) for item in record] if isinstance(record, list) else record
