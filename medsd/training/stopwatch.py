"""Where the time of training goes, without waiting for the device."""

import resource
import time
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medsd.models.unet import attention_kernel

PHASES = ("data", "forward", "backward", "optimizer")
"""Of a training step; everything else (logging, looks, checkpoints) is `other`."""
PEAKS = {
    ("A100", "bf16"): 312e12,
    ("H100", "bf16"): 989e12,
    ("H200", "bf16"): 989e12,
    ("L40S", "bf16"): 362e12,
    ("4090", "bf16"): 165e12,
    ("A100", "tf32"): 156e12,
    ("H100", "tf32"): 494e12,
    ("H200", "tf32"): 494e12,
    ("A100", "no"): 19.5e12,
    ("H100", "no"): 67e12,
    ("H200", "no"): 67e12,
}
"""(part of the device's name, precision) -> dense FLOP/s of its data sheet; fp16 is as fast as bf16."""


class Stopwatch:
    """Seconds by phase: `mark(phase)` gives the time since the last mark to that phase. On a GPU it is the device's own time.

    `flops` counts what the network takes of a training step, where that can be counted.
    """

    def __init__(self, device: torch.device, flops: "FlopCounter | None" = None) -> None:
        self.device, self.flops = device, flops
        self.seconds = dict.fromkeys((*PHASES, "other"), 0.0)
        self._open: list[tuple[str, Any, Any]] = []
        self._last = self._now()

    def mark(self, phase: str) -> None:
        """End `phase` here."""
        now = self._now()
        if self.device.type == "cuda":
            self._open.append((phase, self._last, now))
        else:
            self.seconds[phase] += now - self._last
        self._last = now

    def settle(self) -> None:
        """Read what the device has measured; called where the host waits for it anyway."""
        if self._open:
            self._open[-1][2].synchronize()
        for phase, begin, end in self._open:
            self.seconds[phase] += begin.elapsed_time(end) / 1000
        self._open.clear()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class FlopCounter:
    """FLOPs of a network's training: those of its forward passes, and of backward passes that take twice as many.

    (As many, where most weights are frozen.) What is computed outside the network, such as latents, is not among them. All passes count
    as the first, since micro-batches are of one size.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.example, self.passes = network, (), 0
        self.handle = network.register_forward_pre_hook(self._note)

    def _note(self, network: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self.passes += 1
        self.example = self.example or tuple(torch.empty_like(argument) for argument in arguments)

    @torch.no_grad()
    def total(self) -> float | None:
        """Call it once, when the training is over. None where it cannot be counted: xformers, and shapes that depend on the prompts."""
        if attention_kernel(self.network) == "xformers":
            return None
        # Of shapes alone, which takes neither time nor memory. The counter knows the products within plain attention, but not every
        # kernel that stands for them.
        shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self.handle.remove()
        try:
            with shapes, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self.network(*map(shapes.from_tensor, self.example))
        except RuntimeError:
            return None
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.network.parameters()]
        mostly_learns = sum(size for size, learns in sizes if learns) > sum(size for size, learns in sizes if not learns)
        return counter.get_total_flops() * (3 if mostly_learns else 2) * self.passes


def profile(watch: Stopwatch, images: int, processes: int, precision: str) -> dict[str, Any]:
    """Share of each phase, images/s of the training steps, peak memory in GB, and FLOP/s where they were counted. Call it at the end.

    `images` are those that one process has seen. Images/s are those of all processes together, the others those of one;
    `peak_share` is of the device's data sheet, None where that is not known.
    """
    watch.settle()
    busy = sum(watch.seconds[phase] for phase in PHASES)
    rate = images / busy if busy else 0.0
    numbers = {f"share_{phase}": round(watch.seconds[phase] / busy, 4) if busy else 0.0 for phase in PHASES}
    numbers |= {"images_per_second": round(rate * processes, 3), "peak_memory_gb": round(peak_memory(watch.device) / 1e9, 3)}
    if busy and watch.flops is not None and (flops := watch.flops.total()):
        peak = peak_flops(watch.device, precision)
        numbers |= {"flops_per_second": flops / busy, "peak_share": flops / busy / peak if peak else None}
    return numbers


def described(numbers: dict[str, Any]) -> str:
    """One line for a reader."""
    shares = ", ".join(f"{phase} {numbers[f'share_{phase}']:.0%}" for phase in PHASES)
    line = f"{numbers['images_per_second']:.1f} images/s: {shares}; peak memory {numbers['peak_memory_gb']:.1f} GB"
    if "flops_per_second" in numbers:
        line += f"; {numbers['flops_per_second'] / 1e12:.2f} TFLOP/s"
        line += f", {numbers['peak_share']:.0%} of the device's peak" if numbers["peak_share"] else ""
    return line


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of the device's data sheet; None where it is not in `PEAKS`."""
    if device.type != "cuda":
        return None
    single = "tf32" if torch.get_float32_matmul_precision() == "high" else "no"
    name, kind = torch.cuda.get_device_name(device), single if precision == "no" else "bf16"
    return next((peak for (part, known), peak in PEAKS.items() if part in name and known == kind), None)
