"""Which timesteps a training step looks at: objects that draw them, and may learn from the errors where to look.

T is the number of training timesteps. A draw carries weights where it must be paid back for the objective to stay the same.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from medsd.errors import InputError
from medsd.randomness import Randomness, choices, integers, normal

Gather = Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]
"""Tensors `(B, ...)` of this process -> those of all processes, one behind the other."""


class TimestepSampler(Protocol):
    """Draws timesteps, and learns from their errors."""

    state: torch.Tensor
    """float32, changed in place: all that a checkpoint has to keep; empty where nothing is learnt."""

    def sample(self, count: int, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`, integers, and the factors of their errors, `(count,)` float32, both where `draws` draws."""

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Take note of the errors `(B,)` of `(B,)` timesteps: what is averaged into the loss, without the factors of `sample`."""


class UniformTimesteps:
    """Every timestep equally often (Ho et al., 2020, algorithm 1)."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.state = torch.zeros(0)

    def sample(self, count: int, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`; the factors are 1."""
        return integers(0, self.steps, (count,), draws), torch.ones(count, device=draws.device)

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

    def sample(self, count: int, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)`; the factors are 1."""
        share = torch.sigmoid(self.mean + self.std * normal((count,), draws))
        return (self.steps * share).long().clamp(max=self.steps - 1), torch.ones(count, device=draws.device)

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Nothing is learnt."""


class RunningSquares:
    """Mean squares of numbers that come with timesteps, in `bins` equal stretches of the T = `steps` of them.

    Each is an exponential average with a memory of about 1 / (1 - `decay`) numbers. `gather` brings together what several processes saw.
    Everything stays on `device`, so that nobody waits for it.
    """

    def __init__(self, steps: int, bins: int, decay: float, device: torch.device | str, gather: Gather) -> None:
        self.decay, self.gather = decay, gather
        self.bin_of = torch.arange(steps, device=device) * bins // steps
        """`(T,)`."""
        self.state = torch.zeros(bins, 2, device=device)
        """Per bin, the decaying sum of squares and the sum of its weights."""

    def means(self) -> torch.Tensor:
        """`(bins,)`; 0 where nothing was seen."""
        squares, weights = self.state.unbind(1)
        return squares / weights.clamp(min=1e-6)

    def learn(self, timesteps: torch.Tensor, values: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Take note of values `(B,)`, all or those `counted` `(B,)`; one that overflowed in half precision is passed over."""
        counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
        timesteps, values, counted = self.gather((timesteps, values.detach(), counted))
        squares, none = values.double() ** 2, torch.zeros(len(self.state), dtype=torch.float64, device=values.device)
        usable = squares.isfinite() & counted
        bins = self.bin_of[timesteps]
        counts = none.index_add(0, bins, usable.double())
        means = none.index_add(0, bins, torch.where(usable, squares, 0.0)) / counts.clamp(min=1)
        kept = self.decay**counts
        self.state.mul_(kept[:, None]).add_((1 - kept)[:, None] * torch.stack([means, torch.ones_like(means)], 1))


class ImportanceTimesteps:
    """Timesteps of large errors more often, with factors that keep the objective (Nichol & Dhariwal, 2021, section 3.3, eq. 18).

    p_t is proportional to sqrt(E[L_t^2]), mixed with a uniform share that bounds the factors by 1 / `uniform`. The paper keeps
    the last 10 losses of each timestep; here neighbouring timesteps share a bin (`RunningSquares`). Until every bin has seen a loss, the
    draw is uniform.
    """

    def __init__(
        self,
        steps: int,
        bins: int = 50,
        decay: float = 0.99,
        uniform: float = 0.1,
        device: torch.device | str = "cpu",
        gather: Gather = lambda tensors: tensors,
    ) -> None:
        self.steps, self.uniform = steps, uniform
        self.squares = RunningSquares(steps, min(bins, steps), decay, device, gather)
        self.state = self.squares.state

    def probabilities(self) -> torch.Tensor:
        """p_t of every timestep, `(T,)` float32, sum 1."""
        size = self.squares.means().sqrt()[self.squares.bin_of]
        learnt = (1 - self.uniform) * size / size.sum() + self.uniform / self.steps
        return torch.where(self.state[:, 1].all(), learnt, 1 / self.steps)

    def sample(self, count: int, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(count,)` and factors (1 / T) / p_t."""
        probabilities = self.probabilities()
        timesteps = choices(probabilities, count, draws)
        return timesteps, 1 / (self.steps * probabilities[timesteps])

    def learn(self, timesteps: torch.Tensor, errors: torch.Tensor) -> None:
        """Average squared errors into their bins."""
        self.squares.learn(timesteps, errors)


SAMPLERS = {"uniform": UniformTimesteps, "logit_normal": LogitNormalTimesteps, "importance": ImportanceTimesteps}


def timestep_sampler(
    kind: str, steps: int, device: torch.device | str = "cpu", gather: Gather = lambda tensors: tensors
) -> TimestepSampler:
    """The sampler by its name, `uniform`, `logit_normal` or `importance`, for T = `steps`. Raises InputError for another name."""
    if kind not in SAMPLERS:
        raise InputError(f"timestep sampling {kind} is none of {', '.join(SAMPLERS)}")
    return ImportanceTimesteps(steps, device=device, gather=gather) if kind == "importance" else SAMPLERS[kind](steps)
