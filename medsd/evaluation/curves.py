"""What curves and tables of class probabilities are drawn from: ROC corners, calibration bins, confusion counts."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.evaluation.classification import CALIBRATION_BINS, Floats


def roc_points(scores: ArrayLike, positive: ArrayLike) -> tuple[Floats, Floats]:
    """Corners of a ROC curve: false and true positive rates, from 0 to 1; equal scores are one corner.

    `scores` `(N,)`, `positive` `(N,)` boolean, some true and some false.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, bool)
    order = np.argsort(-scores, kind="stable")
    corners = np.append(0, np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1)
    hits, alarms = (np.append(0, np.cumsum(kind[order]))[corners] for kind in (positive, ~positive))
    return alarms / alarms[-1], hits / hits[-1]


def calibration_bins(confidence: ArrayLike, right: ArrayLike) -> tuple[NDArray, Floats, Floats]:
    """Counts, mean confidence and share of `right` `(N,)` in 15 bins (low, high] of equal width, `(15,)` each; NaN in an empty bin.

    Those of `medsd.evaluation.classification.calibration_error`: sum of counts / N x |share - confidence| is that error.
    """
    confidence = np.asarray(confidence, np.float64)
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS) - 1, 0, CALIBRATION_BINS - 1).astype(int)
    counts, sums, hits = (np.bincount(bins, weights, CALIBRATION_BINS) for weights in (None, confidence, np.asarray(right, float)))
    empty = np.where(counts > 0, counts, np.nan)
    return counts.astype(int), sums / empty, hits / empty


def wilson_interval(hits: ArrayLike, counts: ArrayLike) -> tuple[Floats, Floats]:
    """95 % bounds of shares hits / counts of independent images (Wilson 1927)."""
    hits, counts = np.asarray(hits, np.float64), np.asarray(counts, np.float64)
    z, share = 1.959964, hits / counts
    centre = (share + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2)) / (1 + z**2 / counts)
    return centre - half, centre + half


def confusion_counts(labels: ArrayLike, answers: ArrayLike, classes: int) -> NDArray:
    """Images of each class (row) answered as each class (column), `(K, K)`; where a label or an answer is -1, the image is left out."""
    labels, answers = np.asarray(labels), np.asarray(answers)
    known = (labels >= 0) & (answers >= 0)
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels[known], answers[known]), 1)
    return counts
