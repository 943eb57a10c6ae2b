"""A paired discriminative term: an image's own prompt should explain it better than a rival's, on the same pair.

The classifier reads the difference of two denoising errors on one (timestep, noise), d = e_rival - e_own. Training on the errors alone
cares little about it, since it is a small part of either; here log(1 + exp(-s d)) is added, as logistic regression on d would.
s = `SHARPNESS` / RMS(d) follows the differences of the last batches, by timestep, so that it needs no tuning.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

from medsd.objectives.timesteps import Gather
from medsd.randomness import Randomness, uniform

SHARPNESS = 2.0
"""s in units of 1 / RMS(d); logistic regression on a normal d of mean m and deviation v has s = 2 m / v^2."""
STRETCHES = 20
DECAY = 0.999
"""Of what was seen, per difference."""

ErrorOf = Callable[..., torch.Tensor]
"""`error_of(condition=prompts (B,))` -> `(B,)`: denoising errors of a batch, on its own pairs, under other prompts."""


class Contrast(Protocol):
    """What is added to the mean error."""

    memory: dict[str, torch.Tensor]
    """What is changed in place, by name: all that a checkpoint has to keep."""

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """A number, from the errors `(B,)` of the batch's own `prompts` `(B,)`."""


class NoContrast:
    """Nothing."""

    def __init__(self) -> None:
        self.memory: dict[str, torch.Tensor] = {}

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """0."""
        return error.new_zeros(())


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
        self.weight, self.rivals, self.gather = weight, rivals.to(device), gather
        self.stretch_of = torch.arange(steps, device=device) * STRETCHES // steps
        self.state = torch.zeros(STRETCHES, 2, device=device)
        """Per stretch of timesteps, the decaying sum of squared differences and of their weights."""
        self.memory = {"contrast": self.state}

    def __call__(
        self, error_of: ErrorOf, error: torch.Tensor, prompts: torch.Tensor, timesteps: torch.Tensor, draws: Randomness
    ) -> torch.Tensor:
        """weight x mean of log(1 + exp(-s d)), 0 for an image without a rival."""
        drawn = (uniform(prompts.shape, draws) * self.rivals.shape[1]).long()
        rival = self.rivals[prompts, drawn]
        there = rival >= 0
        difference = error_of(condition=torch.where(there, rival, prompts)) - error
        stretches = self.stretch_of[timesteps]
        self._learn(stretches, difference.detach(), there)
        squares, weights = self.state.unbind(1)
        scale = SHARPNESS / (squares / weights.clamp(min=1e-6)).sqrt().clamp(min=1e-12)
        terms = F.softplus(-scale[stretches] * difference)
        return self.weight * (terms * there).mean()

    def _learn(self, stretches: torch.Tensor, difference: torch.Tensor, there: torch.Tensor) -> None:
        """Average squares into their stretches; a difference that overflowed is passed over, like its update."""
        stretches, difference, there = self.gather((stretches, difference.detach(), there))
        usable = (there & difference.isfinite()).double()
        squares = torch.where(usable > 0, difference.double() ** 2, 0.0)
        none = torch.zeros(STRETCHES, dtype=torch.float64, device=squares.device)
        counts = none.index_add(0, stretches, usable)
        means = none.index_add(0, stretches, squares) / counts.clamp(min=1)
        kept = DECAY**counts
        self.state.mul_(kept[:, None]).add_((1 - kept)[:, None] * torch.stack([means, torch.ones_like(means)], 1))
