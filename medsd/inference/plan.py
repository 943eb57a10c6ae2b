"""Which (timestep, noise) pairs a classifier looks at, in which order, and what each counts.

A *slot* is a timestep of the plan: one pair, or two with opposite noise (*antithetic*). A *bin* is one of B equal stretches of
the timesteps at which there is a signal. Bins are numbered from the least noise up.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medsd.errors import InputError
from medsd.objectives.diffusion import epsilon_error_factor, log_snr

WEIGHTINGS = ("uniform", "elbo")


@dataclass(frozen=True)
class Proposal:
    """Where the pairs of a plan lie."""

    density: tuple[float, ...] = (1.0,)
    """Share of the pairs in each bin, above 0, sum 1."""
    antithetic: tuple[bool, ...] = (False,)
    """Of each bin, whether noise comes in opposite twos there."""

    def locate(self, position: float) -> float:
        """Position in `[0, 1)` among slots -> position in `[0, 1)` among timesteps: the inverse of the slots' distribution function."""
        slots = np.array(self.density) / (1 + np.array(self.antithetic))
        ends = np.cumsum(slots / slots.sum())
        place = min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)
        start = ends[place - 1] if place else 0.0
        within = (position - start) / (ends[place] - start)
        return float((place + min(within, np.nextafter(1, 0))) / len(ends))


@dataclass(frozen=True)
class Plan:
    """P pairs, in an order in which every prefix is spread over the timesteps."""

    timesteps: torch.Tensor
    """`(P,)` integers."""
    noise: torch.Tensor
    """`(P, c, h, w)`."""
    weights: torch.Tensor
    """`(P,)` float32: nats per unit of the prediction's error, so that a log-likelihood is minus the mean of weight x error over pairs."""
    places: torch.Tensor
    """`(P,)` float64: position of each timestep in `[0, 1)` among those with a signal; the two pairs of a slot share theirs."""

    def __len__(self) -> int:
        return len(self.timesteps)


def make_plan(
    scheduler: Any,
    pairs: int,
    latent_shape: tuple[int, ...],
    weighting: str = "uniform",
    seed: int = 0,
    proposal: Proposal | None = None,
) -> Plan:
    """Timesteps in low-discrepancy order and noise keyed by (seed, pair), so that a score depends on neither batch nor order.

    t_i = F^-1(van der Corput(i) + shift), F the distribution function of the proposal's slots (default: all timesteps alike), and each
    pair is weighted by how often its timestep should come over how often it does, so that the score does not depend on the
    proposal. A shorter plan is the beginning of a longer one.

    Weights for latents of d = c h w numbers: `uniform` d/2 (lambda_max - lambda_min), a surrogate that ranks best; `elbo`
    d/2 T |d lambda/dt|, the evidence lower bound itself (Kingma et al., 2021, eq. 17 in lambda). Raises InputError for another one.
    """
    if weighting not in WEIGHTINGS:
        raise InputError(f"weighting {weighting} is none of {', '.join(WEIGHTINGS)}")
    if pairs < 1:
        raise InputError(f"{pairs} pairs: 1 or more are expected")
    proposal = proposal or Proposal()
    lambdas = log_snr(scheduler)
    usable = int(torch.isfinite(lambdas).sum())
    shift = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
    places: list[float] = []
    signs: list[int] = []
    slot = 0
    while len(places) < pairs:
        place = proposal.locate((_van_der_corput(slot) + shift) % 1)
        twice = proposal.antithetic[int(place * len(proposal.antithetic))]
        places += [place] * (1 + twice)
        signs += [1, -1][: 1 + twice]
        slot += 1
    where = torch.tensor(places[:pairs], dtype=torch.float64)
    timesteps = (where * usable).long()
    weights = nats_per_error(scheduler, weighting, latent_shape)[timesteps] / _relative_density(proposal, where)
    noise = [sign * pair_noise(seed, pair - (sign < 0), latent_shape) for pair, sign in enumerate(signs[:pairs])]
    return Plan(timesteps, torch.stack(noise), weights.float(), where)


def nats_per_error(scheduler: Any, weighting: str, latent_shape: tuple[int, ...]) -> torch.Tensor:
    """`(T',)` float64 for the T' timesteps with a signal: nats per unit of the prediction's mean squared error; see `make_plan`."""
    lambdas = log_snr(scheduler)
    lambdas = lambdas[torch.isfinite(lambdas)]
    usable, half_dimension = len(lambdas), 0.5 * float(np.prod(latent_shape))
    span = (lambdas.max() - lambdas.min()).expand(usable)
    of_noise = {"uniform": span, "elbo": usable * torch.gradient(lambdas)[0].abs()}[weighting] * half_dimension
    return of_noise * epsilon_error_factor(scheduler, torch.arange(usable)).double()


def _relative_density(proposal: Proposal, places: torch.Tensor) -> torch.Tensor:
    density = torch.tensor(proposal.density, dtype=torch.float64)
    return len(density) * density[(places * len(density)).long()]


def _van_der_corput(index: int) -> float:
    """Bit-reversed fraction of `index` in [0, 1)."""
    value, base = 0.0, 0.5
    while index:
        value, index, base = value + base * (index & 1), index >> 1, base / 2
    return value


def pair_noise(seed: int, pair: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise that only (seed, pair) determine."""
    key = int(np.random.SeedSequence([seed, pair]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))
