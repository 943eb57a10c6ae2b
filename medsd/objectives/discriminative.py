"""A paired discriminative term: an image's own prompt should explain it better than a rival's, on the same pair.

The classifier reads the difference of two denoising errors on one (timestep, noise), d = e_rival - e_own. Training on the errors alone
cares little about it, since it is a small part of either; here log(1 + exp(-s d)) is added, as logistic regression on d would.
s = `SHARPNESS` / RMS(d) follows the differences of the last batches, by timestep, so that it needs no tuning.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from medsd.objectives.timesteps import Gather, RunningSquares
from medsd.randomness import Randomness, uniform

SHARPNESS = 2.0
"""s in units of 1 / RMS(d); logistic regression on a normal d of mean m and deviation v has s = 2 m / v^2."""
STRETCHES = 20
DECAY = 0.999
"""Of what was seen, per difference."""

ErrorOf = Callable[..., torch.Tensor]
"""`error_of(condition=prompts (B,))` -> `(B,)`: denoising errors of a batch, on its own pairs, under other prompts."""


class Contrast(Protocol):
    """What is added to each image's error."""

    memory: dict[str, torch.Tensor]
    """What is changed in place, by name: all that a checkpoint has to keep."""

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """`(B,)`, from the errors `(B,)` of the batch's own `prompts` `(B,)`."""


class NoContrast:
    """Nothing."""

    def __init__(self) -> None:
        self.memory: dict[str, torch.Tensor] = {}

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(error)


class PairedContrast:
    """The term of this module, times `weight`; each image meets one rival prompt a step.

    Args:
        rivals: `(P, R)` numbers of the R prompts that stand against each of P; -1 in the rows of those without rivals, such as the empty
            prompt.
        steps: T, number of timesteps.
        gather: brings together what several processes saw.
    """

    def __init__(
        self, weight: float, rivals: torch.Tensor, steps: int, device: torch.device | str = "cpu", gather: Gather = lambda tensors: tensors
    ) -> None:
        self.weight, self.rivals = weight, rivals.to(device)
        self.squares = RunningSquares(steps, STRETCHES, DECAY, device, gather)
        self.memory = {"contrast": self.squares.state}

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """weight x log(1 + exp(-s d)), 0 for an image without a rival."""
        drawn = (uniform(prompts.shape, draws) * self.rivals.shape[1]).long()
        rival = self.rivals[prompts, drawn]
        there = rival >= 0
        difference = error_of(condition=torch.where(there, rival, prompts)) - error
        self.squares.learn(timesteps, difference, there)
        scale = SHARPNESS / self.squares.means().sqrt().clamp(min=1e-12)
        return self.weight * F.softplus(-scale[self.squares.bin_of[timesteps]] * difference) * there
