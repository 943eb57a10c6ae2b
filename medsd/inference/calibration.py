"""From losses to log-posteriors: temperature, class bias, weights over timesteps, prior; and how they are fitted.

A *loss* is what a pair says against a class, in nats: weight x denoising error. A *logit* is a log-posterior up to a constant per
image: logit_c = -(mean loss of c) / temperature + bias_c + log prior_c.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medsd.errors import InputError
from medsd.inference.plan import Proposal

SMALLEST_PRIOR = 1e-12
FEW_IMAGES = 50
FOLDS = 5
BINS = 8
"""Stretches of timesteps whose weights are fitted."""


@dataclass(frozen=True)
class Risk:
    """How often a race at some level (`race.Decide`) answers otherwise than all pairs."""

    level: float
    rate: float
    """Of the calibration images."""
    bound: float
    """Of all images like them, from above."""


@dataclass(frozen=True)
class Calibration:
    """How a model's losses become probabilities, and where its pairs lie."""

    temperature: float
    bias: tuple[float, ...]
    """Of each class, nats."""
    weights: tuple[float, ...] = (1.0,)
    """Of the losses in each of some equal stretches of the timesteps; mean 1."""
    vote: bool = False
    """Whether a pair's loss only says which class is not the best (1) and which is (0): Favero et al. (MIDL 2025)."""
    weighting: str = "uniform"
    """Weighting of the plan that it was fitted on."""
    proposal: Proposal = Proposal()
    pairs: int | None = None
    """Pairs an image and class that it was fitted on."""
    spread: float | None = None
    """Usual variance of a pair's difference between a class and the leader, calibrated nats squared."""
    risks: tuple[Risk, ...] = ()
    """Levels rising."""
    precision: str = "fp32"
    """Of the UNet in scoring, checked against float32."""
    group_unit: str = "patient"
    """What a group is: patient or series."""
    group_temperature: float | None = None
    """By which the summed logits of a group's images are divided."""
    group_rule: str = "mean"
    """How findings of a group's images are joined: mean or max."""
    source: str = ""
    """What it was fitted on."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """What was compared when it was fitted."""

    def losses(self, losses: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Weighted losses, or votes, `(N, K, P)`, of losses at `places` `(P,)` in `[0, 1)`; NaN stays NaN."""
        weighted = losses * np.array(self.weights)[(places * len(self.weights)).astype(int)]
        return np.where(np.isnan(weighted), np.nan, weighted > _smallest(weighted)) if self.vote else weighted

    def fits(self, pairs: int) -> bool:
        """Whether it was fitted for plans of so many pairs."""
        return self.pairs in {None, pairs}

    def joins(self, unit: str) -> "tuple[float | None, str]":
        """Temperature and rule for the groups of a unit; the mean where they were fitted to groups of another."""
        return (self.group_temperature, self.group_rule) if unit == self.group_unit else (None, "mean")

    def described(self) -> str:
        """One line about what was fitted, and on what."""
        chosen = self.report["weighting"]
        both = sum(self.proposal.antithetic) / len(self.proposal.antithetic)
        few = (
            f"; so few images cannot tell unlikely from impossible: take {FEW_IMAGES} or more" if self.report["images"] < FEW_IMAGES else ""
        )
        return (
            f"calibrated on {self.report['images']} images: temperature {self.temperature:.3g}, weights {chosen} (cross-validated NLL "
            f"{self.report['candidates'][chosen]['nll']:.3f}), opposite noises in {both:.0%} of the timesteps, {self.precision}{few}"
        )

    @classmethod
    def none(cls, classes: int) -> "Calibration":
        """Leaves losses as they are."""
        return cls(1.0, (0.0,) * classes)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Calibration":
        """Inverse of `dataclasses.asdict`, by way of JSON; without risks of an older form."""
        tuples = {name: tuple(record[name]) for name in ("bias", "weights") if name in record}
        if "proposal" in record:
            tuples["proposal"] = Proposal(*(tuple(record["proposal"][name]) for name in ("density", "antithetic")))
        if "risks" in record:
            tuples["risks"] = tuple(Risk(**risk) for risk in record["risks"] if isinstance(risk, dict))
        return cls(**(record | tuples))


@dataclass(frozen=True)
class Belief:
    """A calibration under a class prior."""

    calibration: Calibration
    prior: np.ndarray | None = None
    """`(K,)`, default uniform."""

    @property
    def favour(self) -> np.ndarray:
        """Bias and log prior of each class `(K,)`."""
        bias = np.asarray(self.calibration.bias)
        return bias if self.prior is None else bias + np.log(np.maximum(self.prior, SMALLEST_PRIOR))

    def nats(self, losses: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Losses `(N, K, P)` at `places` `(P,)` -> `(N, K, P)`, whose mean over pairs is minus the logit."""
        return self.calibration.losses(losses, places) / self.calibration.temperature - self.favour[:, None]


def _smallest(losses: np.ndarray) -> np.ndarray:
    """Over classes, `(N, 1, P)`; NaN where no class has a loss."""
    filled = np.where(np.isnan(losses), np.inf, losses)
    return filled.min(1, keepdims=True)


@dataclass(frozen=True)
class Answers:
    """What calibrations are fitted to: the true hypothesis of each of N images, one of H."""

    numbers: np.ndarray
    """`(N,)` 0 ... H-1."""
    design: np.ndarray
    """`(H, J)`: the bias of a hypothesis is this times J numbers, one for each class or finding."""
    prior: np.ndarray | None = None
    """`(H,)` that the images were drawn with; None counts all hypotheses equally, so that the fit holds for a uniform prior."""
    groups: np.ndarray | None = None
    """`(N,)`: images that must not be parted by a fold, such as a patient's."""

    def __getitem__(self, chosen: np.ndarray) -> "Answers":
        """Of some images."""
        return replace(self, numbers=self.numbers[chosen], groups=None if self.groups is None else self.groups[chosen])

    @property
    def weights(self) -> np.ndarray:
        """Of each image `(N,)`; they sum to 1."""
        if self.prior is not None:
            return np.full(len(self.numbers), 1 / len(self.numbers))
        counts = np.bincount(self.numbers)
        return 1 / (np.count_nonzero(counts) * counts[self.numbers])

    @property
    def offset(self) -> np.ndarray:
        """Log prior `(H,)`, or zeros."""
        return np.zeros(len(self.design)) if self.prior is None else np.log(self.prior)

    def loss(self, logits: np.ndarray) -> float:
        """Mean negative log posterior, nats, of logits `(N, H)` without the prior."""
        chosen = log_softmax(logits + self.offset)[np.arange(len(logits)), self.numbers]
        return float(-(self.weights * chosen).sum())

    @classmethod
    def of_classes(cls, labels: np.ndarray, classes: int, groups: np.ndarray | None = None) -> "Answers":
        """Class indices `(N,)` of classes that exclude each other. Raises InputError where one has no image."""
        counts = np.bincount(labels, minlength=classes)
        if (counts == 0).any():
            raise InputError(f"class number {int(counts.argmin())} has no image to calibrate on: use a larger calibration set")
        return cls(np.asarray(labels), np.eye(classes), None, groups)


@dataclass(frozen=True)
class Weighting:
    """A candidate: how losses of pairs are weighed before they are averaged."""

    weights: tuple[float, ...] = (1.0,)
    vote: bool = False
    fitted: bool = False
    """Whether weights of `BINS` stretches are fitted."""

    def fit(self, losses: np.ndarray, places: np.ndarray, answers: Answers) -> Calibration:
        """Weights, temperature and bias for losses `(N, H, P)`."""
        weights = fit_weights(losses, places, answers) if self.fitted else self.weights
        plain = Calibration(1.0, (0.0,) * losses.shape[1], weights, self.vote)
        temperature, bias = fit_temperature(-plain.losses(losses, places).mean(2), answers)
        return replace(plain, temperature=temperature, bias=bias)


def choose_weighting(
    candidates: Mapping[str, Weighting], losses: np.ndarray, places: np.ndarray, answers: Answers
) -> tuple[str, dict[str, Any]]:
    """The name of the candidate to use, and what was found: cross-validated NLL of each, and its gain over the first.

    The first is kept unless another's gain is above one standard error.
    """
    found = {name: cross_validated_nll(candidate.fit, losses, places, answers) for name, candidate in candidates.items()}
    first = chosen = next(iter(candidates))
    report: dict[str, Any] = {}
    for name, nll in found.items():
        gain, error = mean_of_groups(found[first] - nll, answers)
        report[name] = {"nll": float(answers.weights @ nll), "gain": gain, "standard_error": error}
        if gain > max(error, report[chosen]["gain"]):
            chosen = name
    return chosen, report


def mean_of_groups(values: np.ndarray, answers: Answers) -> tuple[float, float]:
    """Mean of `values` `(N,)` as the fit weighs images, and its standard error, for which a group counts as one."""
    mean = float(answers.weights @ values)
    residuals = answers.weights * (values - mean)
    summed = residuals if answers.groups is None else np.bincount(np.unique(answers.groups, return_inverse=True)[1], residuals)
    return mean, float(np.sqrt((summed**2).sum() * len(summed) / max(len(summed) - 1, 1)))


def cross_validated_nll(
    fit: Callable[[np.ndarray, np.ndarray, Answers], Calibration], losses: np.ndarray, places: np.ndarray, answers: Answers
) -> np.ndarray:
    """Negative log posterior `(N,)`, nats, of each image's hypothesis by a calibration that was fitted without its fold."""
    folds = assign_folds(answers.numbers, answers.groups)
    nll = np.empty(len(folds))
    for fold in np.unique(folds):
        held = folds == fold
        calibration = fit(losses[~held], places, answers[~held])
        logits = -Belief(calibration, answers.prior).nats(losses[held], places).mean(2)
        nll[held] = -log_softmax(logits)[np.arange(held.sum()), answers.numbers[held]]
    return nll


def assign_folds(numbers: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Fold of each image `(N,)`, hypotheses dealt out evenly, images of a group together; but those of a hypothesis that a single group
    has are dealt out one by one, since it could not be fitted without them."""
    groups = np.arange(len(numbers)) if groups is None else np.unique(groups, return_inverse=True)[1]
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        if len(set(groups[members])) == 1:
            groups[members] = groups.max() + 1 + np.arange(len(members))
    groups = np.unique(groups, return_inverse=True)[1]
    first = np.unique(groups, return_index=True)[1]
    order = np.lexsort((np.random.default_rng(0).permutation(len(first)), numbers[first]))
    fold = np.empty(len(first), int)
    fold[order] = np.arange(len(first)) % FOLDS
    return fold[groups]


def fit_calibration(log_likelihoods: np.ndarray, labels: np.ndarray) -> Calibration:
    """Temperature and class bias for log-likelihoods `(N, K)` and class indices `(N,)`; see `fit_temperature`."""
    return Calibration(*fit_temperature(log_likelihoods, Answers.of_classes(labels, log_likelihoods.shape[1])))


def fit_temperature(log_likelihoods: np.ndarray, answers: Answers, ridge: float = 1e-2) -> tuple[float, tuple[float, ...]]:
    """Temperature and the bias of each hypothesis that minimise the mean negative log posterior (Guo et al., 2017).

    `ridge` x |bias|^2 keeps small validation sets from running away.
    """
    centred = log_likelihoods - log_likelihoods.max(1, keepdims=True)
    scale = max(float(-centred.mean()), 1e-12)

    def loss(parameters: np.ndarray) -> float:
        logits = centred / scale * np.exp(parameters[0]) + answers.design @ parameters[1:]
        return answers.loss(logits) + ridge * float((parameters[1:] ** 2).sum())

    best = _minimise(loss, 1, answers.design.shape[1])
    bias = answers.design @ best[1:]
    return float(scale / np.exp(best[0])), tuple(float(value) for value in bias - bias.mean())


def fit_weights(losses: np.ndarray, places: np.ndarray, answers: Answers, ridge: float = 1e-2) -> tuple[float, ...]:
    """Weights, mean 1, of the losses in `BINS` stretches of timesteps, that minimise what `fit_temperature` does.

    `ridge` x the squares of their logarithms' deviations from the mean draws them together.
    """
    bins = (places * BINS).astype(int)
    parts = np.stack([np.where(bins == number, losses, 0).mean(2) for number in range(BINS)], 2)
    parts -= parts.mean(1, keepdims=True)
    scale = max(float(np.abs(parts.sum(2)).mean()), 1e-12)

    def loss(parameters: np.ndarray) -> float:
        logits = -parts @ np.exp(parameters[:BINS]) / scale + answers.design @ parameters[BINS:]
        spread = BINS * parameters[:BINS].var() + (parameters[BINS:] ** 2).sum()
        return answers.loss(logits) + ridge * float(spread)

    fitted = np.exp(_minimise(loss, BINS, answers.design.shape[1])[:BINS])
    return tuple(float(weight) for weight in fitted / fitted.mean())


def _minimise(loss: Callable[[np.ndarray], float], logarithms: int, biases: int) -> np.ndarray:
    """The parameters, first `logarithms` of positive numbers, then biases, at which the loss is least."""
    from scipy.optimize import minimize

    bounds = [(-8.0, 12.0)] * logarithms + [(None, None)] * biases
    return minimize(loss, np.zeros(logarithms + biases), method="L-BFGS-B", bounds=bounds).x


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
