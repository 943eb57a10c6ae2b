"""Shares of images, and their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.resampling import mean_with_interval, together


def binomial_interval(hits: int, count: int) -> tuple[float, float]:
    """The exact 95 % interval of a share (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0


def agreement(
    name: str, answers: NDArray, labels: NDArray, class_names: Sequence[str], patients: Sequence[str] | None = None
) -> dict[str, Any]:
    """`name`, the share of answers `(N,)` that are the labels `(N,)`, and `name/CLASS` of each class that occurs; with `_ci` and `reasons`.

    Intervals are by patient, and `binomial_interval` without `patients`: generated images are nobody's, and drawn one by one.
    """
    right = answers == labels
    chosen = {name: np.arange(len(labels))}
    chosen |= {f"{name}/{own}": np.flatnonzero(labels == number) for number, own in enumerate(class_names) if (labels == number).any()}
    return together(
        _binomial(key, right[places]) if patients is None else mean_with_interval(key, right[places], [patients[place] for place in places])
        for key, places in chosen.items()
    )


def _binomial(name: str, right: NDArray) -> dict[str, Any]:
    hits = int(right.sum())
    return {name: hits / len(right), f"{name}_ci": list(binomial_interval(hits, len(right)))}
