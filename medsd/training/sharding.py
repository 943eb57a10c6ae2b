"""Tensors of which each process holds a shard (FSDP2); plain tensors pass through as they are.

What gathers, `whole` and `Mirror.follow`, has to be called by all processes in the same order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

LAYERS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of layers whose weights are gathered together, one layer at a time."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part that this process holds; it shares the tensor's memory, and requires a gradient where that does."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rejoined(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor of parts that lie as the shards of `like` do."""
    if not isinstance(like, DTensor):
        return part
    layout = {"device_mesh": like.device_mesh, "placements": like.placements, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, run_check=False, **layout).full_tensor()


def alike(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def configure(accelerator: Any, module: torch.nn.Module) -> None:
    """Tell accelerate which layers of `module` to shard; in mixed precision, to add up gradients in float32 (it does not autocast here)."""
    plugin, kinds = accelerator.state.fsdp_plugin, {type(part).__name__ for part in module.modules()}
    plugin.transformer_cls_names_to_wrap = [name for name in LAYERS if name in kinds]
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        module.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(module.forward)


class Mirror:
    """Plain parameters that are to follow sharded ones, since sharded modules cannot be used by one process alone."""

    def __init__(self, plain: Mapping[str, torch.nn.Parameter], writes: bool) -> None:
        self.plain, self.writes = plain, writes

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, torch.Tensor], averages: list[torch.Tensor] | None) -> None:
        """Take the values of `parameters`, or of their `averages`, of which each process has its shards."""
        for number, (name, parameter) in enumerate(parameters.items()):
            value = whole(parameter) if averages is None else rejoined(averages[number], parameter)
            if self.writes:
                self.plain[name].copy_(value)
