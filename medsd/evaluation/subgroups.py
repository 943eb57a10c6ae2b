"""Metrics of a classifier in subgroups: by sex, age band, scanner, view."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.tables import class_metrics

FEWEST = 20
"""Images of a subgroup that numbers are made for."""
MEASURES = ("auroc", "balanced_accuracy", "ece", "nll")
OVER_CLASSES = ("auroc", "balanced_accuracy")
"""Means over classes, or findings."""


def subgroup_metrics(
    probabilities: NDArray[np.float64],
    labels: NDArray,
    class_names: Sequence[str],
    patients: Sequence[str],
    columns: Mapping[str, Sequence[str | None]],
    answers: NDArray | None = None,
) -> list[dict[str, Any]]:
    """One row per value of each column that has two or more: `column`, `value`, `n`, `patients`, and each of `MEASURES` with its `_ci`.

    Arguments as in `class_metrics`; `columns` name what is known of each of the N images, None where it is not. A measure without a meaning
    is None, and `reason` says why: fewer than `FEWEST` images leave none, and where a class is missing that the other images have,
    `OVER_CLASSES` would be means over other classes than theirs.
    """
    known = (labels >= 0).any(1) if labels.ndim == 2 else labels >= 0
    rows = []
    for column, values in columns.items():
        kinds = np.array(["" if value is None else value for value in values])
        found = sorted(set(kinds[known]) - {""})
        for value in found if len(found) > 1 else []:
            chosen = np.flatnonzero((kinds == value) & known)
            who = [patients[place] for place in chosen]
            row = {"column": column, "value": value, "n": len(chosen), "patients": len(set(who))}
            said = None if answers is None else answers[chosen]
            missing = _missing(labels[known], labels[chosen], class_names)
            rows.append(row | _measured(probabilities[chosen], labels[chosen], class_names, who, said, missing))
    return rows


def _measured(
    probabilities: NDArray[np.float64],
    labels: NDArray,
    class_names: Sequence[str],
    patients: Sequence[str],
    answers: NDArray | None,
    missing: str | None,
) -> dict[str, Any]:
    names = [*MEASURES, *(f"{name}_ci" for name in MEASURES)]
    if len(labels) < FEWEST:
        return dict.fromkeys(names) | {"reason": f"fewer than {FEWEST} images"}
    metrics = class_metrics(probabilities, labels, class_names, patients, answers)
    if missing:
        metrics |= dict.fromkeys([*OVER_CLASSES, *(f"{name}_ci" for name in OVER_CLASSES)])
    reasons = [missing] * bool(missing) + [metrics["reasons"][name] for name in names if name in metrics["reasons"]]
    return {name: metrics[name] for name in names} | ({"reason": reasons[0]} if reasons else {})


def _missing(every: NDArray, some: NDArray, class_names: Sequence[str]) -> str | None:
    """What of the labels in `every`, classes `(N,)` or findings `(N, K)`, is not in `some`."""
    if every.ndim == 1:
        lost = sorted(set(every.tolist()) - set(some.tolist()))
        return f"no image with {class_names[lost[0]]}" if lost else None
    for value, words in ((1, "with"), (0, "without")):
        lost = np.flatnonzero((every == value).any(0) & ~(some == value).any(0))
        if len(lost):
            return f"no image {words} {class_names[lost[0]]}"
    return None
