"""Which classes of which images need more pairs: rules that a scoring asks after each look.

Losses here are calibrated nats `(N, K, n)`: their mean over pairs is minus the logit (see `calibration.Belief`). Classes are dropped for
good, so that a class's pairs are the first ones of the plan, and all classes of an image share those of the one with fewest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import numpy as np

from medsd.inference.calibration import Belief, Calibration

PRIOR_SLOTS = 4.0
"""Weight, in slots, of the variance that a calibration found usual."""
NEGLIGIBLE = 1e-3
"""A class whose probability is surely below this needs no more pairs."""

Measure = Callable[[np.ndarray], np.ndarray]
"""Rows (image, pair, class) `(R, 3)` -> their losses `(R,)`."""


class Rule(Protocol):
    """When to look, and what to go on with."""

    def looks(self, pairs: int) -> list[int]:
        """Numbers of pairs after which classes may be dropped, rising; the last is `pairs`."""

    def unsettled(self, losses: np.ndarray, active: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Which of the `active` classes `(N, K)` need more, after `(N, K, n)` losses of the first n pairs at `places` `(P,)`, n < P; NaN
        where dropped earlier."""


class Full:
    """Every class on every pair."""

    def looks(self, pairs: int) -> list[int]:
        """One, at the end."""
        return [pairs]

    def unsettled(self, losses: np.ndarray, active: np.ndarray, places: np.ndarray) -> np.ndarray:
        """All."""
        return active


@dataclass(frozen=True)
class Decide:
    """Drop a class that is not the full plan's answer, until one is left.

    A class goes when its mean difference to the leader exceeds t x standard error, less `eta` nats of indifference: two classes whose
    logits on all pairs lie closer than that may take each other's place. t is Student's quantile of `level`; the standard error is that
    of a mean of n out of P pairs, which is 0 at the end.
    """

    level: float
    """One-sided error of each comparison; see `promised_rule`."""
    eta: float = 0.1
    spread: float | None = None
    """See `variance_of_mean`."""
    together: bool = False
    """Whether an image's classes only go all at once, as votes among all classes need."""
    certified: bool = False
    """Whether races at this level were tried on labelled images."""

    def looks(self, pairs: int) -> list[int]:
        """2, 3, 4, 6, 8, 12, ..., `pairs`."""
        return often(2, pairs)

    def unsettled(self, losses: np.ndarray, active: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Classes within the radius of the leader; none where that is the leader alone."""
        from scipy.stats import t

        if not self.level:
            return active
        leader, means, differences = differences_to_leader(losses)
        variance, freedom = variance_of_mean(differences, places, self.spread)
        radius = t.ppf(1 - self.level, freedom) * np.sqrt(variance * (1 - losses.shape[2] / len(places)))
        left = active & (means + self.eta <= radius)
        contested = left.sum(1, keepdims=True) - left[np.arange(len(left)), leader][:, None] > 0
        left[np.arange(len(left)), leader] = True
        return (active if self.together else left) & contested


def promised_rule(calibration: Calibration, delta: float, pairs: int) -> Decide:
    """A race over plans of `pairs` pairs that answers otherwise than all pairs with probability `delta` at most.

    Where risks were measured for such plans: at the largest level whose risk, and that of all smaller ones, is below delta (fixed-sequence
    testing, Angelopoulos et al., 2021). Where there are none, or too few images to tell, at Bonferroni's level for all comparisons of an
    image, each with its own variance; but nothing is dropped (level 0) where an image went wrong at a level as small.
    """
    measured = calibration.risks if calibration.pairs == pairs else ()
    certified = list(takewhile(lambda risk: risk.bound <= delta, measured))
    if certified:
        return Decide(certified[-1].level, spread=calibration.spread, together=calibration.vote, certified=True)
    level = delta / (max(len(calibration.bias) - 1, 1) * len(often(2, pairs)))
    refuted = any(risk.rate for risk in measured if risk.level <= max(level, measured[0].level))
    return Decide(0.0 if refuted else level, together=calibration.vote)


@dataclass(frozen=True)
class Settle:
    """Go on until log-posterior differences to the leader are known within `tolerance` x max(1, their size), or are negligible."""

    tolerance: float = 0.1
    spread: float | None = None
    together: bool = False

    def looks(self, pairs: int) -> list[int]:
        """4, 6, 8, 12, 16, ..., `pairs`."""
        return often(4, pairs)

    def unsettled(self, losses: np.ndarray, active: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Classes whose difference is neither known nor surely negligible, and the leader with them."""
        leader, means, differences = differences_to_leader(losses)
        variance, _ = variance_of_mean(differences, places, self.spread)
        deviation = np.sqrt(variance * (1 - losses.shape[2] / len(places)))
        known = deviation <= self.tolerance * np.maximum(1, means)
        unknown = active & ~known & (means - 2 * deviation < -np.log(NEGLIGIBLE))
        unknown[np.arange(len(losses)), leader] = unknown.any(1)
        return active & unknown.any(1, keepdims=True) if self.together else unknown


def race(measure: Measure, count: int, classes: int, places: np.ndarray, rule: Rule, belief: Belief) -> np.ndarray:
    """Losses `(count, classes, P)` float32, NaN where the rule needed none, of the pairs at `places` `(P,)`."""
    pairs = len(places)
    losses = np.full((count, classes, pairs), np.nan, dtype=np.float32)
    active, done = np.ones((count, classes), dtype=bool), 0
    for look in rule.looks(pairs):
        rows = np.argwhere(np.broadcast_to(active[:, None, :], (count, look - done, classes))) + (0, done, 0)
        image, pair, label = rows.T
        losses[image, label, pair] = measure(rows)
        done = look
        if done == pairs:
            break
        going = active.any(1)
        active[going] = rule.unsettled(belief.nats(losses[going, :, :done], places[:done]), active[going], places)
        if not active.any():
            break
    return losses


def replay(losses: np.ndarray, places: np.ndarray, rule: Rule, belief: Belief) -> np.ndarray:
    """What `race` would have computed of losses `(N, K, P)` that are all known."""
    return race(lambda rows: losses[rows[:, 0], rows[:, 2], rows[:, 1]], *losses.shape[:2], places, rule, belief)


def often(first: int, pairs: int) -> list[int]:
    """first, half as many more, twice as many, ...: 2, 3, 4, 6, 8, 12, ...; and at last `pairs`."""
    looks = {step for power in range(pairs.bit_length()) for step in (first << power, (first << power) * 3 // 2)}
    return sorted({look for look in looks if look < pairs} | {pairs})


def differences_to_leader(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading class `(N,)`, mean of (class - leader) on common pairs `(N, K)`, and those differences `(N, K, P)`, NaN where not scored.

    The leader is the class with the smallest loss among those with the most pairs.
    """
    pairs = np.isfinite(losses).sum(2)
    means = np.nanmean(losses, axis=2)
    leader = np.where(pairs == pairs.max(1, keepdims=True), means, np.inf).argmin(1)
    differences = losses - losses[np.arange(len(losses)), leader][:, None]
    return leader, np.nanmean(differences, axis=2), differences


def variance_of_mean(differences: np.ndarray, places: np.ndarray, spread: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the mean of paired differences `(N, K, P)` at `places` `(P,)`, `(N, K)`, and its degrees of freedom `(N, K)`.

    Opposite noises of one slot do not vary independently, so that slots are what varies (the cluster-robust variance). `spread` is
    what a pair's variance is expected to be, and counts `PRIOR_SLOTS` slots; without it one slot tells nothing: the variance is infinite.
    The leader's own, of differences that are all 0, is 0.
    """
    seen = np.isfinite(differences)
    pairs, starts = seen.sum(2), slot_starts(places[: differences.shape[2]])
    residuals = np.where(seen, differences - np.nanmean(differences, axis=2, keepdims=True), 0.0)
    slots = np.add.reduceat(seen, starts, axis=2).astype(bool).sum(2)
    squares = (np.add.reduceat(residuals, starts, axis=2) ** 2).sum(2)
    freedom = slots - 1.0
    if spread is None:
        with np.errstate(divide="ignore", invalid="ignore"):
            per_pair = np.where(freedom > 0, squares * slots / (freedom * pairs), np.inf)
    else:
        freedom = freedom + PRIOR_SLOTS
        per_pair = (PRIOR_SLOTS * spread + squares * slots / pairs) / freedom
    leads = ~(np.nan_to_num(differences) != 0).any(2)
    return np.where(leads, 0.0, per_pair / pairs), np.maximum(freedom, 1.0)


def error_correlation(differences: np.ndarray, places: np.ndarray) -> np.ndarray:
    """How the errors of mean differences to a leader go together, of paired differences `(N, K, P)`: `(N, K, K)`, positive definite.

    All differences share the leader's error; where classes err alike and by themselves, that alone makes a correlation of 1/2, which counts
    `PRIOR_SLOTS` slots beside those that were seen. Pairs that only one of two classes has are its own: they part their means' errors.
    """
    seen, starts = np.isfinite(differences), slot_starts(places[: differences.shape[2]])
    residuals = np.where(seen, differences - np.nanmean(differences, axis=2, keepdims=True), 0.0)
    slots = np.add.reduceat(residuals, starts, axis=2)
    size = np.sqrt((slots**2).sum(2, keepdims=True))
    directions = np.divide(slots, size, out=np.zeros_like(slots), where=size > 0)
    own = np.eye(differences.shape[1])
    found = np.where(own > 0, 1.0, np.einsum("nks,nls->nkl", directions, directions))
    expected = (0.5 + 0.5 * own) * common_share(seen.sum(2))
    freedom = np.add.reduceat(seen, starts, axis=2).astype(bool).sum(2).max(1)[:, None, None] - 1.0
    return (PRIOR_SLOTS * expected + freedom * found) / (PRIOR_SLOTS + freedom)


def common_share(counts: np.ndarray) -> np.ndarray:
    """Root of the smaller over the larger of two counts, `(N, K)` -> `(N, K, K)`: the correlation of means over the first ones of a row."""
    two = counts[:, :, None], counts[:, None]
    return np.sqrt(np.minimum(*two) / np.maximum(np.maximum(*two), 1))


def slot_starts(places: np.ndarray) -> np.ndarray:
    """Where the slots of pairs at `places` `(P,)` begin; the two pairs of one stand side by side."""
    return np.flatnonzero(np.append(True, np.diff(places) != 0))
