"""How good the probabilities of findings are, several of which can hold in one image: ranking of each, calibration of all.

A *cell* is one image and one finding: it holds, does not, or is not known. Words, weights and resamples are those of
`medsd.evaluation.classification`, whose statistics these are, by finding.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.errors import InputError
from medsd.evaluation.classification import (
    SMALLEST_PROBABILITY,
    Floats,
    auroc,
    average_precision,
    calibration_error,
    calibration_floor,
    count_blocks,
    interval,
    mean_of_defined,
    risk_coverage_area,
    risk_coverage_points,
    why_no_interval,
)

UNKNOWN = -1


def findings_metrics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    names: Sequence[str],
    patients: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    answers: ArrayLike | None = None,
) -> dict:
    """Statistics of the probabilities of F findings with 95 % intervals, ready for `metrics.json`.

    Args:
        probabilities: `(N, F)` in [0, 1].
        labels: `(N, F)`: 1 holds, 0 does not, -1 is not known.
        names, patients, resamples, seed: as in `classification_metrics`.
        answers: `(N, F)` of 0 and 1, what was answered; default whether the probability is above 0.5. `accuracy` and
            `balanced_accuracy` are about it.

    Returns:
        As `classification_metrics`, with these meanings: `auroc`, `average_precision` are means over the findings that some images have
        and some lack, `auroc/FINDING` and `average_precision/FINDING` of one; `accuracy` is the share of images whose known findings are
        all answered rightly (subset accuracy), `balanced_accuracy` the mean over findings of (sensitivity + specificity) / 2;
        `ece`, `nll`, `brier`, `aurc` count cells: each a question of two answers, whose confidence is the larger probability.

    Raises:
        InputError: shapes, values or names that do not fit together.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels).astype(int)
    _check(probabilities, labels, names, patients)
    patient_of = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    bootstrap, floor = np.random.default_rng(seed).spawn(2)
    said_yes = probabilities > 0.5 if answers is None else np.asarray(answers) == 1
    if said_yes.shape != labels.shape:
        raise InputError(f"Expected answers {labels.shape}, got {said_yes.shape}: one row per image.")
    blocks = [
        _statistics(probabilities, said_yes, labels, names, counts[:, patient_of])
        for counts in count_blocks(patient_of, resamples, bootstrap)
    ]
    series = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    known = labels != UNKNOWN
    said = probabilities[known]
    confidence, wrong = np.maximum(said, 1 - said), (said > 0.5) != (labels[known] == 1)
    metrics: dict = {
        "n": len(labels),
        "ece_floor": calibration_floor(np.stack([said, 1 - said], 1), floor),
        "risk_coverage": risk_coverage_points(confidence, wrong),
    }
    reasons = {}
    for name, values in series.items():
        metrics[name] = None if np.isnan(values[0]) else float(values[0])
        metrics[f"{name}_ci"] = interval(values) if patient_of.max() > 0 else None
        if metrics[name] is None:
            reasons[name] = "No finding has images that show it and images that do not."
        if metrics[f"{name}_ci"] is None:
            reasons[f"{name}_ci"] = reasons.get(name, why_no_interval(patient_of))
    return metrics | {"reasons": reasons}


def _statistics(probabilities: Floats, answers: NDArray, labels: NDArray, names: Sequence[str], weights: Floats) -> dict[str, Floats]:
    """Every statistic `(R,)` under `weights` `(R, N)`."""
    known, holds = labels != UNKNOWN, labels == 1
    right = answers == holds
    ranked = {"auroc": auroc, "average_precision": average_precision}
    of_each = {
        kind: np.stack([_of_known(statistic, probabilities[k, f], holds[k, f], weights[:, k]) for f, k in enumerate(known.T)], 1)
        for kind, statistic in ranked.items()
    }
    cells = np.repeat(weights, known.sum(1), axis=1)
    said, right_cells = probabilities[known], ((probabilities > 0.5) == holds)[known]
    confidence = np.maximum(said, 1 - said)
    of_truth = np.clip(np.where(holds, probabilities, 1 - probabilities)[known], SMALLEST_PROBABILITY, None)
    return {
        "accuracy": _mean((right | ~known).all(1), weights * known.any(1)),
        "balanced_accuracy": mean_of_defined(_balanced(right, holds, known, weights)),
        **{kind: mean_of_defined(values) for kind, values in of_each.items()},
        "ece": calibration_error(confidence, right_cells, cells),
        "nll": _mean(-np.log(of_truth), cells),
        "brier": _mean((said - holds[known]) ** 2, cells),
        "aurc": risk_coverage_area(confidence, ~right_cells, cells),
        **{f"{kind}/{name}": column for kind, values in of_each.items() for name, column in zip(names, values.T, strict=True)},
    }


def _of_known(statistic: Callable[..., Floats], scores: Floats, holds: NDArray, weights: Floats) -> Floats:
    """A ranking `(R,)` over the images whose value is known; NaN where there is none."""
    return statistic(scores, holds, weights) if len(scores) else np.full(len(weights), np.nan)


def _balanced(right: NDArray, holds: NDArray, known: NDArray, weights: Floats) -> Floats:
    """(sensitivity + specificity) / 2 of each finding, `(R, F)`; NaN where one is not defined."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = [(weights @ (right & kind)) / (weights @ kind) for kind in (holds & known, ~holds & known)]
    return (rates[0] + rates[1]) / 2


def _mean(values: NDArray, weights: Floats) -> Floats:
    total = weights.sum(1)
    return np.divide(weights @ values.astype(np.float64), total, out=np.full(len(total), np.nan), where=total > 0)


def _check(probabilities: Floats, labels: NDArray, names: Sequence[str], patients: Sequence[str]) -> None:
    expected = (len(patients), len(names))
    if not len(patients) or not (labels != UNKNOWN).any():
        raise InputError("No labelled image to compute metrics on: choose a --split that has labels.")
    if probabilities.shape != expected or labels.shape != expected:
        raise InputError(f"Expected probabilities and labels {expected}, got {probabilities.shape} and {labels.shape}: one row per image.")
    if not np.isin(labels, (UNKNOWN, 0, 1)).all():
        raise InputError("Labels of findings must be 1, 0, or -1 where it is not known.")
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-9)).all():
        raise InputError("Probabilities of findings must be within 0 and 1.")
