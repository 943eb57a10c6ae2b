"""Means of images with bootstrap intervals, in which patients are drawn and not images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.evaluation.classification import interval, why_no_interval

Floats = NDArray[np.float64]


def patient_numbers(patients: Sequence[str]) -> NDArray:
    """`(N,)` the number of each image's patient."""
    return np.unique(np.asarray(patients, str), return_inverse=True)[1]


def drawn_weights(units: NDArray, resamples: int, draws: np.random.Generator) -> Floats:
    """`(1 + R, N)`: each image once, then resamples of whole units `(N,)` (patients) with replacement."""
    count = int(units.max()) + 1
    counts = draws.multinomial(count, np.full(count, 1 / count), size=resamples) if count > 1 else np.ones((0, 1))
    return np.concatenate([np.ones((1, count)), counts])[:, units]


def mean_with_interval(name: str, values: ArrayLike, patients: Sequence[str], resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """`name`, the mean of values `(N,)`, and `name_ci`, its 95 % interval by patient; None of one patient, which `reasons` then say."""
    values, units = np.asarray(values, np.float64), patient_numbers(patients)
    counts = drawn_weights(units, resamples, np.random.default_rng(seed))
    series = counts @ values / counts.sum(1)
    found = {name: float(series[0]), f"{name}_ci": interval(series) if len(series) > 1 else None, "reasons": {}}
    return found if len(series) > 1 else found | {"reasons": {f"{name}_ci": why_no_interval(units)}}


def together(parts: Iterable[Mapping[str, Any]], before: str = "") -> dict[str, Any]:
    """The numbers of several parts and the `reasons` of each, every name with `before` in front."""
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for part in parts:
        found |= {f"{before}{name}": value for name, value in part.items() if name != "reasons"}
        reasons |= {f"{before}{name}": reason for name, reason in part.get("reasons", {}).items()}
    return found | {"reasons": reasons}
