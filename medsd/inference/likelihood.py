"""Class likelihoods from denoising errors: the Diffusion Classifier (Li et al., ICCV 2023), pure and without a pipeline.

A *pair* is one (timestep, noise), shared by all classes and all images, so that only differences between classes are
read. A *row* is one image x class x pair through the UNet: the unit of cost. A *look* is a number of pairs after which
classes may be dropped. Log-likelihoods are in nats, up to a constant that all classes share.

    plan = make_plan(scheduler, 64, latents.shape[1:])
    scores = score_classes(predict, scheduler, latents, conditions, plan)
    posterior(scores, calibration).probabilities
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medsd.errors import InputError
from medsd.inference.calibration import Belief, Calibration, fit_calibration, log_softmax
from medsd.inference.plan import Plan, make_plan
from medsd.inference.race import Decide, Full, Rule, Settle, common_share, differences_to_leader, error_correlation, race, variance_of_mean
from medsd.objectives.diffusion import denoising_error

__all__ = ["Decide", "Full", "Settle", "Scores", "fit_calibration", "make_plan", "posterior", "score_classes"]

Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]

ROWS = 64
"""Rows of a call of the denoiser on a CPU."""
NOT_FINITE = "the model's error is not finite for an image: its weights or the image are damaged, or its precision too low"
UNKNOWN_VARIANCE = 1e12
"""Variance, nats squared, of what one slot tells nothing of."""
DRAWS = 256
"""Of what pairs that were not computed might have said."""
INTERVAL = (0.025, 0.975)
"""Quantiles of those draws."""


class NotFinite(InputError):
    """A denoising error that is not a number says nothing of any class.

    `images`: places of those that have one, as far as they were scored.
    """

    def __init__(self, message: str, images: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.images = images


@dataclass(frozen=True)
class Scores:
    """Of N images and K classes."""

    losses: np.ndarray
    """`(N, K, P)` float32 nats: weight x denoising error of each pair, NaN where it was not computed."""
    places: np.ndarray
    """`(P,)`: where the pairs' timesteps lie, see `Plan.places`."""

    @property
    def log_likelihoods(self) -> np.ndarray:
        """`(N, K)` nats, up to a constant per image: differences are read on common pairs."""
        return self._summary[0]

    @property
    def standard_errors(self) -> np.ndarray:
        """`(N, K)` nats: of the difference to the leading class, hence 0 for that one."""
        return self._summary[1]

    @property
    def pairs(self) -> np.ndarray:
        """`(N, K)` pairs that each class was scored on."""
        return np.isfinite(self.losses).sum(2)

    @property
    def rows(self) -> np.ndarray:
        """`(N,)` rows spent per image."""
        return self.pairs.sum(1)

    @property
    def _summary(self) -> tuple[np.ndarray, np.ndarray]:
        leader, means, differences = differences_to_leader(self.losses)
        level = np.nanmean(self.losses[np.arange(len(self.losses)), leader], axis=1, keepdims=True)
        return -(level + means).astype(np.float64), np.sqrt(variance_of_mean(differences, self.places)[0])


@torch.no_grad()
def score_classes(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    conditions: torch.Tensor,
    plan: Plan,
    rule: Rule | None = None,
    belief: Belief | None = None,
    batch_size: int = ROWS,
    progress: Callable[[int], None] = lambda rows: None,
) -> Scores:
    """Losses of every class for latents `(N, c, h, w)`.

    Args:
        predict: `predict(x_t, timesteps, condition)`; any denoiser will do.
        conditions: `(K, tokens, dim)`, one per class, on the latents' device.
        rule: which classes need more pairs after a look; default `Full`, all of them.
        belief: what makes a log-likelihood a log-posterior, on which the rule decides.
        batch_size: every call of `predict` has exactly so many rows, padded where fewer are left, so that a row's bits depend on
            no other row.
        progress: called with the number of rows of every call.

    Raises NotFinite, an InputError, where an error is not finite.
    """

    def measure(rows: np.ndarray) -> np.ndarray:
        return _nats(predict, scheduler, latents, conditions, plan, rows, batch_size, progress)

    belief, places = belief or Belief(Calibration.none(len(conditions))), plan.places.numpy()
    return Scores(race(measure, len(latents), len(conditions), places, rule or Full(), belief), places)


def _nats(
    predict: Predict,
    scheduler: Any,
    latents: torch.Tensor,
    conditions: torch.Tensor,
    plan: Plan,
    rows: np.ndarray,
    batch_size: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """Loss of each (image, pair, class) of `rows` `(R, 3)`: `(R,)` float32 nats. The host waits for the device once."""
    device = latents.device
    padded = np.resize(rows, (-(-len(rows) // batch_size) * batch_size, 3))
    images, pairs, labels = torch.from_numpy(padded).to(device).unbind(1)
    timesteps, noise, weights = plan.timesteps.to(device), plan.noise.to(device), plan.weights.to(device)
    nats = torch.empty(len(padded), device=device)
    for start in range(0, len(padded), batch_size):
        call = slice(start, start + batch_size)
        image, pair, label = images[call], pairs[call], labels[call]
        errors = denoising_error(predict, scheduler, latents[image], noise[pair], timesteps[pair], conditions[label])
        nats[call] = weights[pair] * errors
        progress(min(batch_size, len(rows) - start))
    found = nats[: len(rows)].cpu().numpy()
    wrong = np.unique(rows[~np.isfinite(found), 0])
    if len(wrong):
        raise NotFinite(NOT_FINITE, wrong.tolist())
    return found


@dataclass(frozen=True)
class Posterior:
    """Of N images and K classes."""

    probabilities: np.ndarray
    """`(N, K)`, rows sum to 1: expected over what pairs that were not computed might have said."""
    logits: np.ndarray
    """`(N, K)` calibrated nats: log-posterior up to a constant per image."""
    standard_errors: np.ndarray
    """`(N, K)` calibrated nats: of the difference to the leading class, against infinitely many pairs."""
    leader: np.ndarray
    """`(N,)`: the class that a race ends on, and of which `decide` promises: the best of those with the most pairs."""
    p_flip: np.ndarray
    """`(N,)`: probability that infinitely many pairs would put another class first; 0 where the classes' pairs say all the same."""
    intervals: np.ndarray
    """`(N, F, 2)`: where infinitely many pairs would put the probabilities in 95 of 100 cases: those of the classes, or of `sums`.
    Wide enough for the probabilities themselves."""

    @property
    def entropy(self) -> np.ndarray:
        """`(N,)` nats: what is uncertain of the class, whatever is computed."""
        return -(self.probabilities * np.log(np.maximum(self.probabilities, np.finfo(float).tiny))).sum(1)


def posterior(
    scores: Scores, calibration: Calibration | None = None, prior: np.ndarray | None = None, sums: np.ndarray | None = None
) -> Posterior:
    """Class probabilities by Bayes' rule, under a calibration (default none) and a prior `(K,)` (default uniform).

    `sums` `(K, F)` of 0 and 1 asks for intervals of sums of classes instead: of findings, each the sum of the sets that hold it.

    Differences between classes are taken on common pairs. What is left of the plan would move them by normal errors, which share the
    leader's, and over which probabilities are averaged; all of the plan moves nothing, so that a calibration fitted on full plans holds.
    """
    belief = Belief(calibration or Calibration.none(scores.losses.shape[1]), prior)
    leader, means, differences = differences_to_leader(belief.nats(scores.losses, scores.places))
    variance = np.minimum(variance_of_mean(differences, scores.places, belief.calibration.spread)[0], UNKNOWN_VARIANCE)
    correlation = error_correlation(differences, scores.places)
    unseen = len(scores.places) - scores.pairs
    rest = np.where(unseen > 0, variance, 0.0) * unseen / len(scores.places)
    remaining = _errors(rest, correlation * common_share(np.maximum(unseen, 1)))
    averaged = np.array([np.exp(log_softmax(errors - mean)).mean(0) for mean, errors in zip(means, remaining, strict=True)])
    endless = [errors - mean for mean, errors in zip(means, _errors(variance, correlation), strict=True)]
    flips = [(logits.argmax(1) != place).mean() for logits, place in zip(endless, leader, strict=True)]
    intervals = np.array([_interval(logits, own, sums) for logits, own in zip(endless, averaged, strict=True)])
    return Posterior(averaged, -means, np.sqrt(variance), leader, np.array(flips), intervals)


def _interval(logits: np.ndarray, averaged: np.ndarray, sums: np.ndarray | None) -> np.ndarray:
    """Of the probabilities in draws of logits `(DRAWS, K)`, or of sums of them, and around their own `(K,)`: `(F, 2)`."""
    draws = np.exp(log_softmax(logits))
    draws, averaged = (draws, averaged) if sums is None else (draws @ sums, averaged @ sums)
    low, high = np.quantile(draws, INTERVAL, axis=0)
    return np.stack([np.minimum(low, averaged), np.maximum(high, averaged)], 1).clip(0, 1)


def _errors(variance: np.ndarray, correlation: np.ndarray) -> Iterator[np.ndarray]:
    """For each image `DRAWS` draws of its classes' errors `(DRAWS, K)`, of variance `(N, K)` and correlation `(N, K, K)`."""
    draws = np.random.default_rng(0).standard_normal((DRAWS, variance.shape[1]))
    for deviation, root in zip(np.sqrt(variance), np.linalg.cholesky(correlation), strict=True):
        yield deviation * (draws @ root.T)
