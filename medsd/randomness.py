"""Random numbers of a batch, which do not depend on how an effective batch is split over processes and micro-batches.

Shapes are `(B, ...)`, B images. A `Part` draws for the whole effective batch and keeps the numbers of its own images; a
`torch.Generator` draws for the B images alone. Both give the same where the batch is not split.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Images `first`, `first` + 1, ... of an effective batch of `total` images, all of whose numbers come from `generator`."""

    generator: torch.Generator
    first: int
    total: int

    @property
    def device(self) -> torch.device:
        """Where numbers are drawn."""
        return self.generator.device


Randomness = torch.Generator | Part


def normal(shape: tuple[int, ...], draws: Randomness) -> torch.Tensor:
    """Standard normal numbers, float32."""
    return _kept(shape, draws, torch.randn)


def uniform(shape: tuple[int, ...], draws: Randomness) -> torch.Tensor:
    """Uniform in `[0, 1)`, float32."""
    return _kept(shape, draws, torch.rand)


def integers(low: int, high: int, shape: tuple[int, ...], draws: Randomness) -> torch.Tensor:
    """`low`, ..., `high` - 1, equally often."""
    return _kept(shape, draws, lambda shape, **options: torch.randint(low, high, shape, **options))


def choices(probabilities: torch.Tensor, count: int, draws: Randomness) -> torch.Tensor:
    """`(count,)` places in `probabilities` `(N,)`, with replacement."""
    weights = probabilities.to(draws.device)
    return _kept((count,), draws, lambda shape, generator, device: torch.multinomial(weights, shape[0], True, generator=generator))


def _kept(shape: tuple[int, ...], draws: Randomness, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    if isinstance(draws, torch.Generator):
        return draw(shape, generator=draws, device=draws.device)
    return draw((draws.total, *shape[1:]), generator=draws.generator, device=draws.device)[draws.first : draws.first + shape[0]]
