"""How good class probabilities are: ranking, calibration and selective prediction, by image and by patient.

Words. A *statistic* is a function of weighted images. A *weight* is how often an image counts: 1 in
the data as they are, 0, 1, 2, ... in a resample. Every statistic takes weights `(R, N)` and returns
`(R,)`, so a number and its bootstrap are one computation and scores are sorted once for all resamples.
A *resample* draws patients with replacement, not images: images of one patient are not independent.
NaN stands for "has no meaning here" (a class that no image has) until `classification_metrics` turns
it into None with a reason.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.errors import InputError
from medsd.evaluation.groups import join_classes

Floats = NDArray[np.float64]

CALIBRATION_BINS = 15
SMALLEST_PROBABILITY = 1e-12
FLOOR_SIMULATIONS = 1000
DEFINED_SHARE = 0.8
BLOCK_ELEMENTS = 2**22


def classification_metrics(
    probabilities: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    patients: Sequence[str],
    resamples: int = 1000,
    seed: int = 0,
    answers: ArrayLike | None = None,
) -> dict:
    """Statistics of single-label class probabilities with 95 % intervals, ready for `metrics.json`.

    Args:
        probabilities: `(N, K)`, K >= 2, in [0, 1], each row sums to 1 (within 0.001).
        labels: `(N,)`, the true class of each image as an index into `class_names`.
        class_names: K names.
        patients: N patient ids; the unit that is resampled.
        resamples: bootstrap resamples, at least 1.
        seed: of the bootstrap and of `ece_floor`. The intervals do not depend on the order of images.
        answers: `(N,)`, the class that was answered; default the most probable. `accuracy` and `balanced_accuracy` are about it.

    Returns:
        A dictionary of plain Python numbers:

        - `n`: images.
        - `accuracy`, `balanced_accuracy` (mean recall of the classes that occur).
        - `auroc`, `average_precision`: two classes, of the second; several, mean one-vs-rest over
          the classes that some images have and some lack. `auroc/CLASS`: one-vs-rest.
        - `ece`: top-label expected calibration error, 15 bins of equal width (Guo et al., ICML 2017).
          `ece_floor`: what a perfectly calibrated model shows at this n; it has no interval.
        - `nll`: mean negative log-likelihood, nats; probabilities below 1e-12 count as 1e-12.
        - `brier`: squared error summed over all K classes, in [0, 2] (Brier 1950); for two classes
          twice the one-class form.
        - `aurc`: area under the risk-coverage curve by top probability, lower is better (Geifman et
          al., ICLR 2019). `risk_coverage`: that curve, see `risk_coverage_points`.
        - `patient_accuracy`, `patient_auroc`: of the mean log-probability of a patient's images,
          renormalised; None where a patient has images of several classes.
        - `NAME_ci`: [low, high], the 2.5th and 97.5th percentiles over resamples. A resample that
          lacks a class has no `auroc/CLASS` and is left out there, and averages `auroc` over the other
          classes; with fewer than 80 % left the interval is None. Resampling adds calibration error
          of its own, so `ece_ci` lies high.
        - `reasons`: for each name above that is None, one sentence that says why.

    Raises:
        InputError: shapes, values or names that do not fit together.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    _check(probabilities, labels, class_names, patients, resamples)
    labels = labels.astype(np.int64)
    patient_of = np.unique(np.asarray(patients, str), return_inverse=True)[1]
    bootstrap, floor = np.random.default_rng(seed).spawn(2)

    said = probabilities.argmax(1) if answers is None else np.asarray(answers)
    if said.shape != labels.shape:
        raise InputError(f"{said.shape} answers for {len(labels)} images: one per image is expected")
    blocks = [
        _statistics(probabilities, said, labels, class_names, patient_of, counts)
        for counts in count_blocks(patient_of, resamples, bootstrap)
    ]
    series = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    top, wrong = probabilities.max(1), probabilities.argmax(1) != labels
    metrics: dict = {
        "n": len(labels),
        "ece_floor": calibration_floor(probabilities, floor),
        "risk_coverage": risk_coverage_points(top, wrong),
    }
    for name, values in series.items():
        metrics[name] = None if np.isnan(values[0]) else float(values[0])
        metrics[f"{name}_ci"] = interval(values) if patient_of.max() > 0 else None
    return metrics | {"reasons": _reasons(metrics, list(series), labels, class_names, patient_of)}


def auroc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike) -> Floats:
    """Area under the ROC curve: how often a positive image outranks a negative one, ties counting half.

    `scores` `(N,)`, `positive` `(N,)` boolean, `weights` `(R, N)` -> `(R,)`; NaN without either kind.
    """
    hits, alarms = _counts_above(scores, positive, weights)
    area = (np.diff(alarms) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(1)
    return _divide(area, hits[:, -1] * alarms[:, -1])


def average_precision(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike) -> Floats:
    """Mean over the positive images of the precision at their score, tied images taken together.

    `scores` `(N,)`, `positive` `(N,)` boolean, `weights` `(R, N)` -> `(R,)`; NaN without either kind.
    """
    hits, alarms = _counts_above(scores, positive, weights)
    precision = _divide(hits, hits + alarms, undefined=0.0)
    mean = _divide((np.diff(hits) * precision[:, 1:]).sum(1), hits[:, -1])
    return np.where(alarms[:, -1] > 0, mean, np.nan)


def risk_coverage_area(confidence: ArrayLike, wrong: ArrayLike, weights: ArrayLike) -> Floats:
    """Area under the risk-coverage curve: the mean error rate among images at least as confident as each.

    `confidence` `(N,)`, `wrong` `(N,)` boolean, `weights` `(R, N)` -> `(R,)` in [0, 1]. Images of equal
    confidence enter together, so their order does not matter (Geifman et al., ICLR 2019).
    """
    errors, right = _counts_above(confidence, wrong, weights)
    covered = errors + right
    risk = _divide(errors, covered, undefined=0.0)
    return (np.diff(covered) * risk[:, 1:]).sum(1) / covered[:, -1]


def risk_coverage_points(confidence: ArrayLike, wrong: ArrayLike) -> list[list[float]]:
    """[coverage, error rate] of the most confident tenth of the images, two tenths, ..., all: what refusing the others would bring.

    `confidence` `(N,)`, `wrong` `(N,)` boolean. Images of equal confidence share their mean error.
    """
    confidence, wrong = np.asarray(confidence, np.float64), np.asarray(wrong, np.float64)
    values, tied = np.unique(-confidence, return_inverse=True)
    shared = (np.bincount(tied, wrong) / np.bincount(tied))[tied]
    risks = np.cumsum(shared[np.argsort(-confidence, kind="stable")]) / np.arange(1, len(wrong) + 1)
    kept = [max(1, round(len(wrong) * tenth / 10)) for tenth in range(1, 11)]
    return [[tenth / 10, float(risks[count - 1])] for tenth, count in enumerate(kept, start=1)]


def calibration_error(confidence: ArrayLike, right: ArrayLike, weights: ArrayLike) -> Floats:
    """Expected calibration error: gap of confidence and accuracy in a bin, averaged by the bins' weight.

    `confidence` `(N,)` in [0, 1], `right` `(N,)` boolean, `weights` `(R, N)` -> `(R,)`. Fifteen bins
    (low, high] of equal width (Guo et al., ICML 2017).
    """
    gap = np.asarray(right, np.float64) - confidence
    weights = np.asarray(weights, np.float64)
    return _binned(weights * gap, confidence) / weights.sum(1)


def calibration_floor(probabilities: ArrayLike, generator: np.random.Generator) -> float:
    """The calibration error that a perfectly calibrated model shows on these images through chance alone.

    Labels are drawn from `probabilities` `(N, K)` and the error averaged over 1,000 draws. The top class
    of an image is then right with its own probability, so that is all that is drawn. Images are drawn
    independently; where a patient has many alike, the true floor is higher.
    """
    confidence = np.max(probabilities, axis=1)
    n = len(confidence)
    total = 0.0
    for rows in _row_blocks(FLOOR_SIMULATIONS, n):
        right = generator.random((rows, n)) < confidence
        total += (_binned(right - confidence, confidence) / n).sum()
    return float(total / FLOOR_SIMULATIONS)


def _statistics(
    probabilities: Floats, answers: NDArray, labels: NDArray, class_names: Sequence[str], patient_of: NDArray, counts: Floats
) -> dict[str, Floats]:
    """Every statistic `(R,)` under `counts` `(R, P)`, how often each patient was drawn."""
    weights = counts[:, patient_of]
    top, confidence = probabilities.argmax(1), probabilities.max(1)
    right = top == labels
    truth = np.arange(len(class_names)) == labels[:, None]
    of_class = np.clip(probabilities[truth], SMALLEST_PROBABILITY, None)
    recalls = _divide((weights * (answers == labels)) @ truth, weights @ truth)
    areas = _per_class(auroc, probabilities, truth, weights)
    return {
        "accuracy": _mean(answers == labels, weights),
        "balanced_accuracy": mean_of_defined(recalls),
        "auroc": _summary(areas),
        "average_precision": _summary(_per_class(average_precision, probabilities, truth, weights)),
        "ece": calibration_error(confidence, right, weights),
        "nll": _mean(-np.log(of_class), weights),
        "brier": _mean(((probabilities - truth) ** 2).sum(1), weights),
        "aurc": risk_coverage_area(confidence, ~right, weights),
        **_patient_statistics(probabilities, labels, patient_of, counts),
        **{f"auroc/{name}": area for name, area in zip(class_names, areas.T, strict=True)},
    }


def _patient_statistics(probabilities: Floats, labels: NDArray, patient_of: NDArray, counts: Floats) -> dict[str, Floats]:
    if _patients_of_several_classes(labels, patient_of):
        missing = np.full(len(counts), np.nan)
        return {"patient_accuracy": missing, "patient_auroc": missing}
    merged = join_classes(np.log(np.clip(probabilities, SMALLEST_PROBABILITY, None)), patient_of)
    label = np.empty(len(merged), int)
    label[patient_of] = labels
    truth = np.arange(merged.shape[1]) == label[:, None]
    return {
        "patient_accuracy": _mean(merged.argmax(1) == label, counts),
        "patient_auroc": _summary(_per_class(auroc, merged, truth, counts)),
    }


def _patients_of_several_classes(labels: NDArray, patient_of: NDArray) -> int:
    one_label = np.empty(patient_of.max() + 1, int)
    one_label[patient_of] = labels
    return len(np.unique(patient_of[labels != one_label[patient_of]]))


def _per_class(statistic: Callable[..., Floats], probabilities: Floats, truth: NDArray, weights: Floats) -> Floats:
    """A ranking statistic of each class against the rest: `(R, K)`."""
    columns = zip(probabilities.T, truth.T, strict=True)
    return np.stack([statistic(scores, positive, weights) for scores, positive in columns], axis=1)


def _summary(per_class: Floats) -> Floats:
    """One number for all classes, `(R, K)` -> `(R,)`: the second of two, else the mean of the defined."""
    return per_class[:, 1] if per_class.shape[1] == 2 else mean_of_defined(per_class)


def _counts_above(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike) -> tuple[Floats, Floats]:
    """Weight of positive and of negative images at or above each distinct score, from the highest down.

    Both are `(R, distinct scores + 1)` and begin with 0: the corners of a ROC curve before division.
    """
    scores, positive, weights = np.asarray(scores), np.asarray(positive, bool), np.asarray(weights)
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ranked = weights[:, order].astype(np.float64)
    total = _cumulative(ranked)[:, np.append(0, last_of_tie + 1)]
    hits = _cumulative(ranked * positive[order])[:, np.append(0, last_of_tie + 1)]
    return hits, total - hits


def _cumulative(values: Floats) -> Floats:
    sums = np.zeros((len(values), values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums


def _binned(gaps: Floats, confidence: ArrayLike) -> Floats:
    """Sum over confidence bins of the absolute summed gap: `(R, N)` -> `(R,)`."""
    bins = np.clip(np.ceil(np.asarray(confidence) * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1)
    return np.abs(gaps @ (bins[:, None] == np.arange(CALIBRATION_BINS)).astype(np.float64)).sum(1)


def _mean(values: ArrayLike, weights: Floats) -> Floats:
    return weights @ np.asarray(values, np.float64) / weights.sum(1)


def mean_of_defined(values: Floats) -> Floats:
    """`(R, F)` -> `(R,)`, without what is NaN."""
    return _divide(np.nansum(values, axis=1), np.isfinite(values).sum(1))


def _divide(numerator: ArrayLike, denominator: ArrayLike, undefined: float = np.nan) -> Floats:
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, undefined), where=denominator != 0)


def count_blocks(patient_of: NDArray, resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """How often each patient counts, `(rows, P)` at a time: once each in the first row, then resamples."""
    patients = int(patient_of.max()) + 1
    yield np.ones((1, patients))
    for rows in _row_blocks(resamples, len(patient_of)):
        drawn = generator.multinomial(patients, np.full(patients, 1 / patients), size=rows)
        yield drawn.astype(np.float64)


def _row_blocks(rows: int, columns: int) -> Iterator[int]:
    """Cut `rows` into block heights that keep a block of this many columns small in memory."""
    height = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, height):
        yield min(height, rows - start)


def interval(values: Floats) -> list[float] | None:
    """The 95 % percentile interval of `values` `(1 + R,)`, of which the first is the statistic itself; None without resamples."""
    resampled = values[1:][np.isfinite(values[1:])]
    if np.isnan(values[0]) or not len(resampled) or len(resampled) < DEFINED_SHARE * (len(values) - 1):
        return None
    return [float(bound) for bound in np.percentile(resampled, [2.5, 97.5])]


def _reasons(
    metrics: dict,
    statistics: Sequence[str],
    labels: NDArray,
    class_names: Sequence[str],
    patient_of: NDArray,
) -> dict[str, str]:
    """One sentence for every None among the statistics and their intervals."""
    undefined = _why_undefined(labels, class_names, patient_of)
    reasons = {name: undefined[name] for name in statistics if metrics[name] is None}
    no_interval = why_no_interval(patient_of)
    for name in statistics:
        if metrics[f"{name}_ci"] is None:
            reasons[f"{name}_ci"] = reasons.get(name, no_interval)
    return reasons


def _why_undefined(labels: NDArray, class_names: Sequence[str], patient_of: NDArray) -> dict[str, str]:
    """One sentence for every statistic that these labels leave without a meaning."""
    reasons = {}
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count == 0:
            reasons[f"auroc/{name}"] = f"No image has the class '{name}'."
        elif count == len(labels):
            every = f"Every image has the class '{name}'."
            ranking = ("auroc", "average_precision", "patient_auroc", f"auroc/{name}")
            reasons |= dict.fromkeys(ranking, every)
    if mixed := _patients_of_several_classes(labels, patient_of):
        total = patient_of.max() + 1
        why = f"A patient has no single class: {mixed} of {total} have images of several classes."
        reasons |= dict.fromkeys(("patient_accuracy", "patient_auroc"), why)
    return reasons


def why_no_interval(patient_of: NDArray) -> str:
    """One sentence for an interval that is None although its statistic is there."""
    if patient_of.max() == 0:
        return "Only one patient: an interval needs at least 2 to resample."
    return f"Too few patients have the class, or lack it: fewer than {DEFINED_SHARE:.0%} of the resamples hold both kinds."


def _check(
    probabilities: Floats,
    labels: NDArray,
    class_names: Sequence[str],
    patients: Sequence[str],
    resamples: int,
) -> None:
    n, classes = len(labels), len(class_names)
    if n == 0:
        raise InputError("No labelled image to compute metrics on: choose a --split that has labels.")
    if classes < 2 or len(set(class_names)) != classes:
        raise InputError(f"Metrics need two or more classes of different names, got {list(class_names)}.")
    if probabilities.shape != (n, classes) or labels.shape != (n,) or len(patients) != n:
        raise InputError(
            f"Expected probabilities {(n, classes)}, labels {(n,)} and {n} patients, got probabilities "
            f"{probabilities.shape}, labels {labels.shape} and {len(patients)} patients: one row per image."
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"Labels must be class indices 0 to {classes - 1}: leave out the images without a label.")
    if not (np.all(probabilities >= 0) and np.allclose(probabilities.sum(1), 1, rtol=0, atol=1e-3)):
        raise InputError("Probabilities must be at least 0 and sum to 1 in each row: normalise them first.")
    if resamples < 1:
        raise InputError(f"resamples is {resamples}: give at least 1; 1,000 is usual.")
