"""What learns: trained parameters, their average, their optimizer and learning rate; and one step of learning.

An update whose loss or gradient is not finite is skipped on the device, without the host's looking: weights and the optimizer's
state stay as they are, and it is counted.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from medsd.errors import InputError
from medsd.training.checkpoint import Tensors
from medsd.training.sharding import Mirror, alike, rejoined, shard, whole
from medsd.training.stopwatch import Stopwatch

MOST_SKIPPED = 20
"""So many skipped updates in a row end a run. Mixed precision fp16 skips some in its first steps, while it looks for its scale."""


class TrainState:
    """Trained parameters by name, their moving average, the optimizer and the learning-rate schedule."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: Any,
        schedule: Any,
        ema_decay: float | None,
        watch: Stopwatch,
        masks: Tensors,
        mirror: Mirror | None = None,
    ) -> None:
        self.parameters, self.optimizer, self.schedule, self.watch = parameters, optimizer, schedule, watch
        self.masks, self.mirror = masks, mirror
        self.losses: list[torch.Tensor] = []
        self.skipped = torch.zeros(2, dtype=torch.int64, device=watch.device)
        """Updates that were skipped: all, and how many in a row."""
        self.memory: Tensors = {"skipped": self.skipped}
        """What else is changed in place while training, and saved with it."""
        self.partners: dict[str, TrainState] = {}
        """What learns beside this one, such as a discriminator: advanced once it learns, saved and restored with it."""
        self.learning = False
        self.ema = EMAModel(self._shards(), decay=ema_decay, foreach=True) if ema_decay is not None else None

    def _shards(self) -> list[torch.Tensor]:
        """What this process holds of each parameter."""
        return [shard(parameter) for parameter in self.parameters.values()]

    def parts(self) -> dict[str, "TrainState"]:
        """This state, under the name of no partner, and its partners."""
        return {"": self, **self.partners}

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def learning_rate(self) -> float:
        """The present one."""
        return self.schedule.get_last_lr()[0]

    def mean_loss(self, accelerator: Any) -> float | None:
        """Over all micro-batches and processes since the last call, without those that are not finite; None where none is."""
        losses = torch.stack(self.losses)
        self.losses.clear()
        finite = losses.isfinite()
        total, count = accelerator.reduce(torch.stack([torch.where(finite, losses, 0.0).sum(), finite.sum()]), reduction="sum")
        return (total / count).item() if count else None

    def learn(self, accelerator: Any, loss: torch.Tensor, max_grad_norm: float) -> None:
        """Backward pass of one micro-batch, and the optimizer's update after the last one."""
        self.learning = True
        self.losses.append(loss.detach())
        self.watch.mark("forward")
        # A loss that is not finite can have a finite gradient; here it becomes one that every process sees.
        accelerator.backward(loss * torch.where(loss.isfinite(), 1.0, torch.nan))
        self.watch.mark("backward")
        if accelerator.sync_gradients:
            self._update(accelerator, max_grad_norm)
        self.watch.mark("optimizer")

    def _update(self, accelerator: Any, max_grad_norm: float) -> None:
        """One step of the optimizer with clipped gradients, skipped where their norm is not finite."""
        if accelerator.scaler is not None:
            accelerator.unscale_gradients(self.optimizer)
        for name, mask in self.masks.items():
            self.parameters[name].grad.mul_(mask)
        norm = whole(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), max_grad_norm))
        bad = ~norm.isfinite()
        self.skipped.copy_(torch.stack([self.skipped[0] + bad, (self.skipped[1] + 1) * bad]))
        self._step_unless(bad, accelerator.scaler is not None)
        self.optimizer.zero_grad()

    def _step_unless(self, bad: torch.Tensor, scaled: bool) -> None:
        """The optimizer's step; a gradient scaler looks for itself, and a fused optimizer on the device. Others make the host wait."""
        optimizer = self.optimizer.optimizer
        if scaled:
            self.optimizer.step()
        elif optimizer.defaults.get("fused"):
            optimizer.found_inf = bad.float()
            self.optimizer.step()
        elif not bad.item():
            self.optimizer.step()

    def finish_update(self) -> None:
        """Advance the learning rate and the moving average."""
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self._shards())
        for partner in self.partners.values():
            if partner.learning:
                partner.finish_update()
        self.watch.mark("optimizer")

    def skipped_in_a_row(self) -> int:
        """The host waits for the device here."""
        return max(int(part.skipped[1]) for part in self.parts().values())

    def skipped_at_all(self) -> int:
        """Updates that were skipped since the run began. The host waits for the device here."""
        return sum(int(part.skipped[0]) for part in self.parts().values())

    def forget_row(self) -> None:
        """Count skipped updates in a row anew."""
        for part in self.parts().values():
            part.skipped[1] = 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the plain modules hold the averaged weights. Every process has to enter."""
        if self.ema is None or self.mirror is not None:
            self.adopt_average()
            yield
            return
        self.ema.store(self.parameters.values())
        self.adopt_average()
        try:
            yield
        finally:
            self.ema.restore(self.parameters.values())

    def adopt_average(self) -> None:
        """For good: the plain modules' weights become the averaged ones. Every process has to call it."""
        if self.mirror is not None:
            self.mirror.follow(self.parameters, None if self.ema is None else self.ema.shadow_params)
        elif self.ema is not None:
            self.ema.copy_to(self.parameters.values())

    def files(self) -> Iterator[tuple[str, Tensors]]:
        """All that changes, as (name, whole tensors), one file after the other; every process has to go through all of them."""
        yield "weights", {name: whole(value) for name, value in self.parameters.items()}
        if self.ema is not None:
            averages = zip(self.parameters.items(), self.ema.shadow_params, strict=True)
            yield "ema", {name: rejoined(average, parameter) for (name, parameter), average in averages}
        yield "optimizer", {name: whole(value) for name, value in take_tensors(self.optimizer.state_dict())[1].items()}
        yield "memory", self.memory
        for name, partner in self.partners.items():
            yield from ((f"{name}/{file}", tensors) for file, tensors in partner.files())

    def record(self) -> dict[str, Any]:
        """What changes and is no tensor, for JSON."""
        return {
            "optimizer": take_tensors(self.optimizer.state_dict())[0],
            "schedule": self.schedule.last_epoch,
            "ema_step": None if self.ema is None else self.ema.optimization_step,
            "learning": self.learning,
            "partners": {name: partner.record() for name, partner in self.partners.items()},
        }

    def restore(self, read: Callable[[str], Tensors], record: dict[str, Any]) -> None:
        """Inverse of `files` and `record`; raises InputError where they are not of this model."""
        for name in record["partners"].keys() ^ self.partners.keys():
            there = "has a" if name in record["partners"] else "has no"
            raise InputError(f"the checkpoint {there} {name}: resume with the flags it was trained with, or --overwrite")
        for name, partner in self.partners.items():
            partner.restore(lambda file, folder=name: read(f"{folder}/{file}"), record["partners"][name])
        if self.ema is not None and record["ema_step"] is None:
            raise InputError("the checkpoint has no moving average: resume with --no_use_ema")
        self._put(self.parameters, read("weights"), "another model")
        self._put(self.memory, read("memory"), "a run with another --timestep_sampling")
        tensors, parameters = read("optimizer"), list(self.parameters.values())
        self.optimizer.load_state_dict(put_tensors(record["optimizer"], tensors, lambda path, value: spread(value, path, parameters)))
        self.schedule.last_epoch, self.learning = record["schedule"], record["learning"]
        groups = self.optimizer.param_groups
        for group, base, factor in zip(groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in groups]
        if self.ema is not None:
            self._put_average(read("ema"))
            self.ema.optimization_step = record["ema_step"]

    def recall(self, read: Callable[[str], Tensors]) -> None:
        """For good: the plain modules' weights become those of a checkpoint, averaged ones where there are any."""
        if self.ema is not None:
            self._put_average(read("ema"))
        else:
            self._put(self.parameters, read("weights"), "another model")
        self.adopt_average()

    def _put_average(self, averages: Tensors) -> None:
        shards = {name: shard(alike(averages[name], parameter)) for name, parameter in self.parameters.items()}
        self._put(dict(zip(self.parameters, self.ema.shadow_params, strict=True)), shards, "another model")

    @staticmethod
    @torch.no_grad()
    def _put(targets: Mapping[str, torch.Tensor], values: Tensors, origin: str) -> None:
        """Copy `values` into tensors of the same names."""
        if values.keys() != targets.keys() or any(values[name].shape != target.shape for name, target in targets.items()):
            raise InputError(f"the checkpoint is of {origin}: resume with the flags it was trained with, or --overwrite")
        for name, target in targets.items():
            target.copy_(alike(values[name], target))


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that require a gradient, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def spread(value: torch.Tensor, path: str, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """A tensor of an optimizer's state, `optimizer/state/NUMBER/NAME`: where it has its parameter's shape, it lies in memory as it does."""
    parts = path.split("/")
    parameter = parameters[int(parts[2])] if parts[1] == "state" else None
    if parameter is None or parameter.shape != value.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(alike(value, parameter))


def process_states(accelerator: Any, state: TrainState) -> Tensors:
    """What each process has of its own, one row each: torch's global generators (models with dropout draw from them), and the losses
    since the last log line."""
    device = accelerator.device
    own = {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})
    own |= {
        f"losses/{name}": torch.stack(part.losses).view(-1, accelerator.gradient_accumulation_steps)
        for name, part in state.parts().items()
        if part.losses
    }
    return {name: accelerator.gather(tensor[None].to(device)).cpu() for name, tensor in own.items()}


def restore_process_states(accelerator: Any, state: TrainState, saved: Tensors) -> None:
    """Inverse of `process_states`; a process that was not there takes one of the others' rows."""
    own = {name: saved[name][accelerator.process_index % len(saved[name])].clone() for name in {"cpu", "cuda"} & saved.keys()}
    torch.set_rng_state(own["cpu"])
    if accelerator.device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)
    for name, part in state.parts().items():
        if f"losses/{name}" in saved:
            part.losses[:] = _shared_out(saved[f"losses/{name}"], accelerator).to(accelerator.device).unbind()


def _shared_out(losses: torch.Tensor, accelerator: Any) -> torch.Tensor:
    """What this process has of losses `(processes, updates, micro-batches)`: their mean, where updates are split in another way now."""
    split = (accelerator.num_processes, accelerator.gradient_accumulation_steps)
    if (losses.shape[0], losses.shape[2]) != split:
        losses = losses[losses.isfinite()].mean().expand(split[0], losses.shape[1], split[1])
    return losses[accelerator.process_index].flatten()


def take_tensors(value: Any, path: str = "optimizer") -> tuple[Any, Tensors]:
    """Nested dicts and lists for JSON, in which each tensor's path stands in its place; and the tensors by path."""
    tensors: Tensors = {}

    def take(value: Any, path: str) -> Any:
        if torch.is_tensor(value):
            tensors[path] = value.detach()
            return {"tensor": path}
        if isinstance(value, dict):
            return {str(key): take(item, f"{path}/{key}") for key, item in value.items()}
        return [take(item, f"{path}/{index}") for index, item in enumerate(value)] if isinstance(value, list | tuple) else value

    return take(value, path), tensors


def put_tensors(record: Any, tensors: Tensors, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Any:
    """Inverse of `take_tensors`, `change(path, tensor)` in each one's place; keys that were numbers become numbers again."""
    if isinstance(record, dict):
        if record.keys() == {"tensor"}:
            return change(record["tensor"], tensors[record["tensor"]])
        return {int(key) if key.isdigit() else key: put_tensors(item, tensors, change) for key, item in record.items()}
    return [put_tensors(item, tensors, change) for item in record] if isinstance(record, list) else record
