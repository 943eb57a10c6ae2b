"""Which timesteps a training step looks at: objects that draw them, and may learn from the errors where to look.

T is the number of training timesteps. A draw carries weights where it must be paid back for the objective to stay the same.
"""

from typing import Protocol

import torch

from medsd.errors import InputError


class TimestepSampler(Protocol):
    """Draws timesteps, and learns from their errors."""

    state: torch.Tensor
    """float32, on the CPU, changed in place: all that a checkpoint has to keep; empty where nothing is learnt."""

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`, integers, and the factors of their errors, `(count,)` float32, both on the generator's device."""

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Take note of the errors `(B,)` of `(B,)` timesteps: what is averaged into the loss, without the factors of `sample`."""


class UniformTimesteps:
    """Every timestep equally often (Ho et al., 2020, algorithm 1)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.state = torch.zeros(0)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`; the factors are 1."""
        timesteps = torch.randint(0, self.steps, (count,), generator=generator, device=generator.device)
        return timesteps, torch.ones(count, device=generator.device)

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Nothing is learnt."""


class LogitNormalTimesteps:
    """t = floor(T sigmoid(n)), n normal: more often in the middle (Esser et al., 2024, eq. 19).

    A mean above 0 looks more at noisy timesteps. There are no factors: like the authors, this changes what is minimised.
    Raises InputError for a standard deviation that is not positive.
    """

    def __init__(self, steps: int, mean: float = 0.0, std: float = 1.0) -> None:
        if std <= 0:
            raise InputError(f"logit-normal timesteps need a positive standard deviation, not {std}")
        self.steps, self.mean, self.std = steps, mean, std
        self.state = torch.zeros(0)

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`; the factors are 1."""
        normal = torch.randn(count, generator=generator, device=generator.device)
        share = torch.sigmoid(self.mean + self.std * normal)
        return (self.steps * share).long().clamp(max=self.steps - 1), torch.ones(count, device=generator.device)

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Nothing is learnt."""


class ImportanceTimesteps:
    """Timesteps of large errors more often, with factors that keep the objective (Nichol & Dhariwal, 2021, section 3.3, eq. 18).

    p_t is proportional to sqrt(E[L_t^2]), mixed with a uniform share that bounds the factors by 1 / `uniform`. The paper keeps
    the last 10 losses of each timestep; here neighbouring timesteps share a bin, and a bin keeps an exponential average with
    a memory of about 1 / (1 - `decay`) losses. Until every bin has seen a loss, the draw is uniform.
    """

    def __init__(self, steps: int, bins: int = 50, decay: float = 0.99, uniform: float = 0.1) -> None:
        self.steps, self.decay, self.uniform = steps, decay, uniform
        bins = min(bins, steps)
        self.bin_of = torch.arange(steps) * bins // steps
        self.state = torch.zeros(bins, 2)
        """Per bin, the decaying sum of squared losses and the sum of its weights: their ratio estimates E[L^2]."""

    def probabilities(self) -> torch.Tensor:
        """p_t of every timestep, `(T,)` float32, sum 1."""
        moment, weight = self.state.unbind(1)
        if not weight.all():
            return torch.full((self.steps,), 1 / self.steps)
        size = (moment / weight).sqrt()[self.bin_of]
        return (1 - self.uniform) * size / size.sum() + self.uniform / self.steps

    def sample(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)` and factors (1 / T) / p_t."""
        probabilities = self.probabilities().to(generator.device)
        timesteps = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        return timesteps, 1 / (self.steps * probabilities[timesteps])

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Average squared errors into their bins; an error that overflowed in half precision is passed over, like its update."""
        errors = errors.detach().cpu().double()
        usable = errors.isfinite()
        bins, squares = self.bin_of[timesteps.cpu()[usable]], errors[usable] ** 2
        counts = torch.bincount(bins, minlength=len(self.state))
        means = torch.bincount(bins, squares, minlength=len(self.state)) / counts.clamp(min=1)
        kept = self.decay ** counts.double()
        self.state.mul_(kept[:, None]).add_((1 - kept)[:, None] * torch.stack([means, torch.ones_like(means)], 1))


SAMPLERS = {"uniform": UniformTimesteps, "logit_normal": LogitNormalTimesteps, "importance": ImportanceTimesteps}


def timestep_sampler(kind: str, steps: int) -> TimestepSampler:
    """The sampler by its name, `uniform`, `logit_normal` or `importance`, for T = `steps`. Raises InputError for another name."""
    if kind not in SAMPLERS:
        raise InputError(f"timestep sampling {kind} is none of {', '.join(SAMPLERS)}")
    return SAMPLERS[kind](steps)
