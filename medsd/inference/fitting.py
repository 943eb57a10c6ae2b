"""How a model's losses become probabilities: everything that is fitted on labelled, held-out images.

A *pilot* is a scoring of few images on a regular grid of timesteps, each with two noises and their opposites. It tells where the
classes differ, where opposite noises cancel errors, and whether half precision is good enough. It needs no labels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from medsd.evaluation.classification import auroc
from medsd.evaluation.groups import any_findings, common_labels, join_classes, join_findings
from medsd.inference.calibration import Answers, Belief, Calibration, Risk, Weighting, choose_weighting, log_softmax
from medsd.inference.likelihood import NotFinite, Scores
from medsd.inference.plan import Plan, Proposal, make_plan, nats_per_error, pair_noise
from medsd.inference.race import Decide, differences_to_leader, replay, variance_of_mean
from medsd.objectives.diffusion import log_snr

Score = Callable[[torch.Tensor, Plan, str], Scores]
"""Images (places in the calibration set), plan and precision -> all losses."""

VERSION = 2
"""Of this file: another one may make another calibration of the same images."""
PILOT_ROWS = 24_000
"""At most, and at most half of what scoring the calibration set takes; but `FEWEST_IMAGES` at least."""
FEWEST_IMAGES = 8
PILOT_BINS = 25
UNIFORM_SHARE = 0.1
"""Of a proposal, so that no pair counts more than ten times."""
ENOUGH_CANCELLED = -0.1
"""Correlation of opposite noises from which on they are worth giving up a second timestep."""
LARGEST_DEVIATION = 0.25
"""Of half precision from fp32 in an image's log-odds, in standard errors of a full plan."""
LEVELS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3)
CONFIDENCE = 0.95
"""That a risk is not above its bound."""
ENOUGH_GROUPS = 5
"""To tell from their images that went wrong how much those go together."""
MIN_SNR_GAMMA = 5.0
"""Hang et al. (2023)."""


def fit(
    score: Score,
    scheduler: Any,
    latent_shape: tuple[int, ...],
    answers: Answers,
    weighting: str,
    pairs: int,
    seed: int,
    fast: str,
) -> Calibration:
    """A calibration for plans of `pairs` pairs; `fast` is the half precision to try, or fp32.

    Weights over timesteps and votes (Favero et al., MIDL 2025) are taken only where cross-validated NLL gains more than one standard error.
    """
    plan = pilot_plan(scheduler, latent_shape, weighting, seed)
    chosen = pilot_images(answers.numbers, pilot_size(len(answers.numbers), len(answers.design), pairs))
    exact, some = score(chosen, plan, "fp32").losses, slice(0, None, 2)
    deviation = 0.0 if fast == "fp32" else half_deviation(exact[some], partial(score, chosen[some], plan, fast), pairs)
    precision = fast if deviation <= LARGEST_DEVIATION else "fp32"
    places = plan.places.numpy()

    def score_all(proposal: Proposal) -> tuple[np.ndarray, np.ndarray]:
        nonlocal precision, deviation
        planned = make_plan(scheduler, pairs, latent_shape, weighting, seed, proposal)
        try:
            return score(torch.arange(len(answers.numbers)), planned, precision).losses, planned.places.numpy()
        except NotFinite:
            if precision == "fp32":
                raise
            precision, deviation = "fp32", np.inf
            return score_all(proposal)

    proposal = fit_proposal(exact)
    found = score_all(proposal)
    candidates = {
        weighting: Weighting(),
        "fitted": Weighting(fitted=True),
        "vote": Weighting(vote=True),
    }
    if weighting == "uniform":
        candidates["min_snr"] = Weighting(min_snr_stretches(scheduler))
    name, compared = choose_weighting(candidates, *found, answers)
    report = {"weighting": name, "candidates": compared, "images": len(answers.numbers)}
    report[f"deviation of {fast}"] = deviation if np.isfinite(deviation) else None
    made = candidates[name].fit(*found, answers)
    if len(made.weights) > 1:
        # The pairs follow the weights, which are kept.
        proposal = fit_proposal(made.losses(exact, places))
        found = score_all(proposal)
        made = Weighting(made.weights).fit(*found, answers)
    losses, places = found
    made = replace(made, weighting=weighting, proposal=proposal, pairs=pairs, precision=precision)
    made = fit_groups(made, -Belief(made).nats(losses, places).mean(2), answers)
    belief = Belief(made, answers.prior)
    made = replace(made, spread=usual_spread(belief.nats(losses, places), places), report=report)
    return replace(made, risks=race_risks(losses, places, Belief(made, answers.prior), answers.groups))


def pilot_size(images: int, hypotheses: int, pairs: int) -> int:
    """Images of a pilot."""
    rows = min(PILOT_ROWS, images * hypotheses * pairs // 2)
    return min(images, max(FEWEST_IMAGES, rows // (4 * PILOT_BINS * hypotheses)))


def usual_rows(images: int, hypotheses: int, pairs: int, fast: str) -> int:
    """Rows that `fit` takes, unless weights of its own ask for another plan."""
    pilot = pilot_size(images, hypotheses, pairs)
    tried = pilot if fast == "fp32" else pilot + (pilot + 1) // 2
    return hypotheses * (images * pairs + tried * 4 * PILOT_BINS)


def pilot_plan(scheduler: Any, latent_shape: tuple[int, ...], weighting: str, seed: int) -> Plan:
    """Two noises and their opposites in the middle of each of `PILOT_BINS` stretches of the timesteps."""
    usable = int(torch.isfinite(log_snr(scheduler)).sum())
    places = ((torch.arange(PILOT_BINS, dtype=torch.float64) + 0.5) / PILOT_BINS).repeat_interleave(4)
    timesteps = (places * usable).long()
    # Noise numbers that no plan has reached, so that the pilot is not scored with the noise of what it plans.
    noise = [sign * pair_noise(seed, 2**31 + couple, latent_shape) for couple in range(2 * PILOT_BINS) for sign in (1, -1)]
    return Plan(timesteps, torch.stack(noise), nats_per_error(scheduler, weighting, latent_shape)[timesteps].float(), places)


def pilot_images(numbers: np.ndarray, most: int) -> torch.Tensor:
    """Up to `most` places, of the hypotheses in turn."""
    rank = np.zeros(len(numbers), dtype=int)
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        rank[members] = np.arange(len(members))
    return torch.from_numpy(np.sort(np.lexsort((numbers, rank))[:most]))


def fit_proposal(losses: np.ndarray) -> Proposal:
    """Where classes differ most, from losses `(N, K, 4 B)` of a `pilot_plan`: density in proportion to the RMS difference between classes.

    Opposite noises are taken in stretches where they cancel each other's errors. The density minimises the variance of the mean
    difference between classes (importance sampling), but for the share that is uniform.
    """
    between = _between(losses)
    size = np.sqrt((between**2).mean((0, 1, 3, 4)))
    if not size.any():
        return Proposal()
    density = (1 - UNIFORM_SHARE) * size / size.sum() + UNIFORM_SHARE / len(size)
    # The difference of two noises at one timestep has no part that is the image's own.
    noise = between[..., 0, :] - between[..., 1, :]
    correlation = noise.prod(-1).mean((0, 1)) / np.sqrt((noise**2).mean((0, 1)).prod(-1))
    smooth = np.convolve(np.pad(correlation, 2, "edge"), np.ones(5) / 5, "valid")
    return Proposal(tuple(map(float, density)), tuple(bool(value < ENOUGH_CANCELLED) for value in smooth))


def half_deviation(exact: np.ndarray, score_half: Callable[[], Scores], pairs: int) -> float:
    """RMS over images and classes of what half precision changes of a mean difference between classes, in its standard errors.

    Infinite where half precision overflows.
    """
    try:
        half = score_half().losses
    except NotFinite:
        return np.inf
    true, changed = (_between(losses).reshape(*losses.shape[:2], -1) for losses in (exact, half))
    error = np.sqrt((true.var(2) / pairs).mean())
    return float(np.sqrt(((changed - true).mean(2) ** 2).mean()) / error)


def _between(losses: np.ndarray) -> np.ndarray:
    """Losses of a `pilot_plan` less their mean over classes, `(N, K, B, 2 noises, 2 signs)` float64."""
    centred = losses.astype(np.float64) - losses.mean(1, keepdims=True)
    return centred.reshape(*losses.shape[:2], PILOT_BINS, 2, 2)


def min_snr_stretches(scheduler: Any) -> tuple[float, ...]:
    """Min-SNR-gamma weights of the noise's error in `PILOT_BINS` stretches of the timesteps, mean 1 (Hang et al., 2023)."""
    lambdas = log_snr(scheduler)
    snr = lambdas[torch.isfinite(lambdas)].exp()
    weights = (MIN_SNR_GAMMA / snr).clamp(max=1)
    stretches = np.array([part.mean().item() for part in torch.tensor_split(weights, PILOT_BINS)])
    return tuple(map(float, stretches / stretches.mean()))


def usual_spread(losses: np.ndarray, places: np.ndarray) -> float:
    """Median over images and rivals of the variance of a pair's difference to the leader, of calibrated losses `(N, K, P)`."""
    variance, _ = variance_of_mean(differences_to_leader(losses)[2], places)
    per_pair = variance[np.isfinite(variance) & (variance > 0)] * len(places)
    return float(np.median(per_pair)) if len(per_pair) else 1.0


def race_risks(losses: np.ndarray, places: np.ndarray, belief: Belief, groups: np.ndarray | None = None) -> tuple[Risk, ...]:
    """How often a race at each of `LEVELS` answers otherwise than all pairs, with upper bounds that hold with `CONFIDENCE`.

    `losses` `(N, K, P)` are all known. Answers whose logits on all pairs are within the race's eta count as the same. The bound is Clopper
    and Pearson's (1934), of as many images as there would be if those of a group (`groups` `(N,)`) were independent (Kish's design
    effect, see `design_effects`); it holds for images drawn like these.
    """
    count = len(losses)
    logits = -belief.nats(losses, places).mean(2)
    wrong = np.empty((len(LEVELS), count), dtype=bool)
    for number, level in enumerate(LEVELS):
        rule = Decide(level, spread=belief.calibration.spread, together=belief.calibration.vote)
        raced = belief.nats(replay(losses, places, rule, belief), places)
        answer = differences_to_leader(raced)[0]
        wrong[number] = logits.max(1) - logits[np.arange(count), answer] > rule.eta
    effects = np.ones(len(LEVELS)) if groups is None else design_effects(wrong, groups)
    return tuple(
        Risk(level, float(row.mean()), upper_bound(row, effect)) for level, row, effect in zip(LEVELS, wrong, effects, strict=True)
    )


def design_effects(wrong: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """By how much the variance of each rate of `wrong` `(L, N)` exceeds that of independent images, `(L,)`, at least 1 (Kish, 1965).

    That of all levels together, which says something of the levels at which few images or none went wrong, or the level's own where it is
    larger; with Korn and Graubard's (1998) correction for few groups. Where fewer than `ENOUGH_GROUPS` groups have an image that went
    wrong, nothing is known of how they go together, and a group counts as one image.
    """
    from scipy.stats import t

    sizes, group_of = np.unique(groups, return_counts=True)[1], np.unique(groups, return_inverse=True)[1]
    count, several = wrong.shape[1], len(sizes)
    rates = wrong.mean(1)
    told = wrong[(rates > 0) & (rates < 1)].any(0)
    if len(set(group_of[told])) < min(ENOUGH_GROUPS, several) or several == 1:
        return np.full(len(wrong), float((sizes**2).sum() / count))
    summed = np.stack([np.bincount(group_of, row) for row in wrong - rates[:, None]])
    clustered, independent = (summed**2).sum(1) * several / (several - 1), count * rates * (1 - rates)
    together = clustered.sum() / independent.sum()
    own = np.divide(clustered, independent, out=np.zeros(len(wrong)), where=independent > 0)
    few = (t.ppf(CONFIDENCE, several - 1) / t.ppf(CONFIDENCE, count - 1)) ** 2
    return np.maximum(np.maximum(own, together) * few, 1.0)


def upper_bound(wrong: np.ndarray, effect: float = 1.0) -> float:
    """Of the rate of `wrong` `(N,)`, one-sided, with `CONFIDENCE`; see `race_risks`."""
    from scipy.stats import beta

    count, hits = len(wrong) / effect, wrong.sum() / effect
    return 1.0 if wrong.all() else float(beta.ppf(CONFIDENCE, hits + 1, count - hits))


def fit_groups(calibration: Calibration, logits: np.ndarray, answers: Answers) -> Calibration:
    """With what joins the images of a group, from logits `(N, H)` without a prior; as it was where no group has several images.

    Hypotheses that are single classes: a temperature, see `fit_group_temperature`. Sets of findings: mean or max over images, whichever
    ranks the groups of the calibration set better.
    """
    if answers.groups is None or len(np.unique(answers.groups)) == len(answers.groups):
        return calibration
    group_of = np.unique(answers.groups, return_inverse=True)[1]
    if answers.prior is None:
        numbers = common_labels(answers.numbers, group_of)
        one = np.flatnonzero(numbers[group_of] >= 0)
        if not len(one):
            return calibration
        group_of, numbers = np.unique(group_of[one], return_inverse=True)[1], numbers[numbers >= 0]
        return replace(calibration, group_temperature=fit_group_temperature(logits[one], group_of, numbers))
    probabilities = np.exp(log_softmax(logits + answers.offset)) @ answers.design
    truth = any_findings(answers.design[answers.numbers].astype(int), group_of) == 1
    weights = np.ones((1, len(truth)))
    areas = {}
    for rule in ("mean", "max"):
        joined = join_findings(probabilities, group_of, rule)
        areas[rule] = np.nanmean([auroc(score, holds, weights) for score, holds in zip(joined.T, truth.T, strict=True)])
    return replace(calibration, group_rule="max" if areas["max"] > areas["mean"] else "mean")


def fit_group_temperature(logits: np.ndarray, group_of: np.ndarray, numbers: np.ndarray) -> float:
    """The temperature at which `join_classes` has the least mean negative log posterior of each group's class `(G,)`."""
    from scipy.optimize import minimize_scalar

    def loss(log_temperature: float) -> float:
        joined = join_classes(logits, group_of, float(np.exp(log_temperature)))
        return -np.log(np.maximum(joined[np.arange(len(numbers)), numbers], np.finfo(float).tiny)).mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 6.0), method="bounded").x))
