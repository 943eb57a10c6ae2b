"""Class likelihoods from denoising errors: the Diffusion Classifier (Li et al., ICCV 2023), pure and without a pipeline.

A *pair* is one (timestep, noise), shared by all classes and all images, so that only differences between classes are
read. A *row* is one image x class x pair through the UNet: the unit of cost. A *look* is a number of pairs after which
classes may be dropped. Log-likelihoods are in nats, up to a constant that all classes share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medsd.errors import InputError
from medsd.objectives.diffusion import denoising_error, epsilon_error_factor, log_snr

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]

SMALLEST_PRIOR = 1e-12
NEGLIGIBLE = 1e-3
"""A class whose probability is surely below this needs no more pairs."""
POSTERIOR_TOLERANCE = 0.1
"""Standard error, in calibrated nats, at which log-posterior differences are known well enough."""
PRIOR_PAIRS = 4.0
"""Weight, in pairs, of the variance pooled over classes in a class's own variance."""


@dataclass(frozen=True)
class Plan:
    """The pairs, in an order in which every prefix is spread over the timesteps."""

    timesteps: torch.Tensor
    """`(P,)` integers."""
    noise: torch.Tensor
    """`(P, c, h, w)`."""
    weights: torch.Tensor
    """`(P,)`: nats per unit of noise error, so that a log-likelihood is minus the mean of weight x error over pairs."""


@dataclass(frozen=True)
class Calibration:
    """logit_c = log-likelihood_c / temperature + bias_c."""

    temperature: float
    bias: tuple[float, ...]

    def logits(self, log_likelihoods: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
        """Log-posterior `(N, K)` up to a constant per image, under a class prior `(K,)` (default uniform)."""
        logits = log_likelihoods / self.temperature + np.asarray(self.bias)
        return logits if prior is None else logits + np.log(np.maximum(prior, SMALLEST_PRIOR))

    @classmethod
    def none(cls, classes: int) -> "Calibration":
        """Leaves log-likelihoods as they are."""
        return cls(1.0, (0.0,) * classes)


@dataclass(frozen=True)
class Scores:
    """Of N images and K classes."""

    log_likelihoods: np.ndarray
    """`(N, K)` nats."""
    standard_errors: np.ndarray
    """`(N, K)` nats: of the difference to the leading class, hence 0 for that one."""
    pairs: np.ndarray
    """`(N, K)` pairs that each class was scored on."""

    @property
    def rows(self) -> np.ndarray:
        """`(N,)` rows spent per image."""
        return self.pairs.sum(1)


def make_plan(scheduler: Any, pairs: int, latent_shape: tuple[int, ...], weighting: str = "uniform", seed: int = 0) -> Plan:
    """Timesteps in van der Corput order and noise keyed by (seed, pair), so that a score depends on neither batch nor order.

    Weights for d = c h w: `uniform` d/2 (lambda_max - lambda_min), a surrogate that ranks best; `elbo` d/2 T |d lambda/dt|,
    the evidence lower bound itself (Kingma et al., 2021, eq. 17 in lambda).
    """
    lambdas = log_snr(scheduler)
    usable = int(torch.isfinite(lambdas).sum())
    positions = torch.tensor([_van_der_corput(index) for index in range(pairs)], dtype=torch.float64)
    shift = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    timesteps = (((positions + shift / pairs) % 1) * usable).long()
    half_dimension = 0.5 * float(np.prod(latent_shape))
    slope = torch.gradient(lambdas[:usable])[0].abs()
    span = (lambdas[:usable].max() - lambdas[:usable].min()).expand(usable)
    per_timestep = {"uniform": span, "elbo": usable * slope}[weighting] * half_dimension
    noise = torch.stack([_pair_noise(seed, index, latent_shape) for index in range(pairs)])
    return Plan(timesteps, noise, per_timestep[timesteps].float())


def _van_der_corput(index: int) -> float:
    """Bit-reversed fraction of `index` in [0, 1)."""
    value, base = 0.0, 0.5
    while index:
        value, index, base = value + base * (index & 1), index >> 1, base / 2
    return value


def _pair_noise(seed: int, pair: int, shape: tuple[int, ...]) -> torch.Tensor:
    key = int(np.random.SeedSequence([seed, pair]).generate_state(1, np.uint64)[0] >> 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def score_classes(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    conditions: torch.Tensor,
    plan: Plan,
    mode: str = "full",
    delta: float = 0.05,
    calibration: Calibration | None = None,
    prior: np.ndarray | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Log-likelihood of every class for latents `(N, c, h, w)`.

    Args:
        predict: `predict(x_t, timesteps, condition)`; any denoiser will do.
        conditions: `(K, tokens, dim)`, one per class.
        mode: `full` scores every pair; `decide` drops classes until one is left, so that the class of the largest posterior
            differs from the full plan's with probability `delta` at most; `posterior` stops when probabilities are known well.
        calibration, prior: what makes log-likelihoods a posterior; the race runs on that.
        batch_size: rows per call; every batch is full, so a score does not depend on its neighbours.
        progress: called with the number of rows of every batch.
    """
    if mode not in {"full", "decide", "posterior"}:
        raise InputError(f"mode {mode} is none of full, decide, posterior")
    count, classes, pairs = len(latents), len(conditions), len(plan.timesteps)
    losses = np.full((count, classes, pairs), np.nan, dtype=np.float32)
    active = np.ones((count, classes), dtype=bool)
    looks = [pairs] if mode == "full" else _looks(pairs)
    calibration = calibration or Calibration.none(classes)
    favour = calibration.temperature * calibration.logits(np.zeros((1, classes)), prior)[..., None]
    done = 0
    for look in looks:
        rows = np.argwhere(np.broadcast_to(active[:, None, :], (count, look - done, classes)))
        rows[:, 1] += done
        _score_rows(predict, scheduler, latents, conditions, plan, rows, losses, batch_size, progress)
        done = look
        if mode == "decide":
            active = _undecided(losses[..., :look] - favour, active, delta / (max(classes - 1, 1) * len(looks)), pairs)
        elif mode == "posterior":
            active = _unsettled(losses[..., :look] - favour, active, calibration.temperature)
        if not active.any():
            break
    return _summarise(losses)


def _looks(pairs: int) -> list[int]:
    """4, 8, 16, ... and at last `pairs`."""
    return [2**power for power in range(2, pairs.bit_length()) if 2**power < pairs] + [pairs]


@torch.no_grad()
def _score_rows(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    conditions: torch.Tensor,
    plan: Plan,
    rows: np.ndarray,
    losses: np.ndarray,
    batch_size: int,
    progress: Callable[[int], None],
) -> None:
    """Fill `losses[image, class, pair]` (nats) for every (image, pair, class) of `rows`."""
    device = latents.device
    for start in range(0, len(rows), batch_size):
        wanted = rows[start : start + batch_size]
        padded = torch.from_numpy(wanted[np.arange(batch_size) % len(wanted)])
        image, pair, label = padded.unbind(1)
        timesteps = plan.timesteps[pair].to(device)
        errors = denoising_error(
            predict, scheduler, latents[image.to(device)], plan.noise[pair].to(device), timesteps, conditions[label.to(device)]
        )
        nats = plan.weights[pair].to(device) * epsilon_error_factor(scheduler, timesteps) * errors
        losses[wanted[:, 0], wanted[:, 2], wanted[:, 1]] = nats[: len(wanted)].cpu().numpy()
        progress(len(wanted))


def _against_leader(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading class `(N,)`, mean of (class - leader) on common pairs `(N, K)`, and those differences `(N, K, P)`, NaN where not scored.

    The leader is the class with the smallest loss among those with the most pairs.
    """
    pairs = np.isfinite(losses).sum(2)
    means = np.nanmean(losses, axis=2)
    leader = np.where(pairs == pairs.max(1, keepdims=True), means, np.inf).argmin(1)
    differences = losses - losses[np.arange(len(losses)), leader][:, None]
    return leader, np.nanmean(differences, axis=2), differences


def _variance_of_mean(differences: np.ndarray) -> np.ndarray:
    """Variance `(N, K)` of the mean of paired differences, each class's own shrunk towards the image's pooled one."""
    pairs = np.isfinite(differences).sum(2)
    own = np.nanvar(differences, axis=2) * pairs / np.maximum(pairs - 1, 1)
    pooled = own.sum(1, keepdims=True) / np.maximum((own > 0).sum(1, keepdims=True), 1)
    shrunk = (PRIOR_PAIRS * pooled + (pairs - 1) * own) / (PRIOR_PAIRS + pairs - 1)
    return np.where(own > 0, shrunk, 0.0) / pairs


def _undecided(losses: np.ndarray, active: np.ndarray, error: float, max_pairs: int) -> np.ndarray:
    """Classes that may still be the full plan's answer: not beyond a radius of `error` one-sided error from the leader."""
    from scipy.stats import t

    _, means, differences = _against_leader(losses)
    pairs = losses.shape[2]
    radius = t.ppf(1 - error, pairs - 1 + PRIOR_PAIRS) * np.sqrt(_variance_of_mean(differences) * (1 - pairs / max_pairs))
    active = active & (means <= radius)
    return active & (active.sum(1, keepdims=True) > 1)


def _unsettled(losses: np.ndarray, active: np.ndarray, temperature: float) -> np.ndarray:
    """Classes whose calibrated log-posterior difference to the leader is neither known well nor surely negligible."""
    leader, means, differences = _against_leader(losses)
    deviation, log_odds = np.sqrt(_variance_of_mean(differences)) / temperature, -means / temperature
    unknown = active & (deviation > POSTERIOR_TOLERANCE) & (log_odds + 2 * deviation > np.log(NEGLIGIBLE))
    unknown[np.arange(len(losses)), leader] = unknown.any(1)
    return unknown


def _summarise(losses: np.ndarray) -> Scores:
    leader, means, differences = _against_leader(losses)
    level = np.nanmean(losses[np.arange(len(losses)), leader], axis=1, keepdims=True)
    return Scores(-(level + means).astype(np.float64), np.sqrt(_variance_of_mean(differences)), np.isfinite(losses).sum(2))


def posterior(log_likelihoods: np.ndarray, calibration: Calibration | None = None, prior: np.ndarray | None = None) -> np.ndarray:
    """Class probabilities `(N, K)` by Bayes' rule, under a temperature and class bias and a prior `(K,)` (default uniform)."""
    logits = (calibration or Calibration.none(log_likelihoods.shape[1])).logits(log_likelihoods, prior)
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def fit_calibration(log_likelihoods: np.ndarray, labels: np.ndarray, ridge: float = 1e-2) -> Calibration:
    """Temperature and class bias that minimise the mean negative log posterior of `labels` `(N,)` (Guo et al., 2017).

    The classes are weighted to count equally, so that the fit holds for a uniform prior; `ridge` x |bias|^2 keeps small
    validation sets from running away. Raises InputError where a class has no image.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    count, classes = log_likelihoods.shape
    counts = np.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise InputError(f"class number {int(counts.argmin())} has no image to calibrate on: use a larger calibration set")
    centred = log_likelihoods - log_likelihoods.max(1, keepdims=True)
    scale = max(float(-centred.mean()), 1e-12)
    weights = 1 / (classes * counts[labels])

    def loss(parameters: np.ndarray) -> float:
        logits = centred / scale * np.exp(parameters[0]) + parameters[1:]
        chosen = log_softmax(logits, axis=1)[np.arange(count), labels]
        return float(-(weights * chosen).sum() + ridge * (parameters[1:] ** 2).sum())

    best = minimize(loss, np.zeros(1 + classes), method="L-BFGS-B", bounds=[(-8, 12)] + [(None, None)] * classes).x
    bias = best[1:] - best[1:].mean()
    return Calibration(float(scale / np.exp(best[0])), tuple(float(value) for value in bias))
