"""Are the grey values right? Histograms of images in their source's unit, HU for CT, added up batch by batch.

Values lie in the intensity map's range; what it clipped lies at that range's ends.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.reconstruction import TISSUES

BINS, FINE = 40, 25
"""Bins that are drawn, wide enough for several whole HU each, and into how many each is cut to measure distances."""
TISSUE_EDGES = np.array([*(low for low, _ in TISSUES.values()), np.inf])


@dataclass(frozen=True)
class Histogram:
    """Pixels of some images, by value."""

    low: float
    high: float
    """The range, in the unit; what lies outside counts to the first or last bin."""
    counts: NDArray[np.int64]
    """`(BINS * FINE,)`."""
    tissues: NDArray[np.int64]
    """`(len(TISSUES),)`."""

    @classmethod
    def of(cls, values: NDArray, low: float, high: float) -> "Histogram":
        """Of an array of any shape."""
        inside = np.clip(values, low, high)
        return cls(low, high, np.histogram(inside, BINS * FINE, (low, high))[0], np.histogram(inside, TISSUE_EDGES)[0])

    def __add__(self, other: "Histogram") -> "Histogram":
        return Histogram(self.low, self.high, self.counts + other.counts, self.tissues + other.tissues)

    @property
    def centres(self) -> NDArray[np.float64]:
        """`(BINS,)`."""
        return _centres(self.low, self.high, BINS)

    @property
    def shares(self) -> NDArray[np.float64]:
        """`(B,)`, sum 1."""
        return self.counts.reshape(BINS, FINE).sum(1) / self.counts.sum()


def class_histograms(batches: Iterable[NDArray], labels: NDArray, classes: int, low: float, high: float) -> list[Histogram]:
    """One of each class, of images `(B, H, W)` batch by batch with class indices `labels` `(N,)`; empty of a class without images."""
    found, first = [Histogram.of(np.empty(0), low, high)] * classes, 0
    for batch in batches:
        own = labels[first : first + len(batch)]
        for number in np.unique(own):
            found[number] += Histogram.of(batch[own == number], low, high)
        first += len(batch)
    return found


def together(histograms: Sequence[Histogram]) -> Histogram:
    """Of the images of all classes."""
    return reduce(add, histograms)


def intensity_metrics(generated: Sequence[Histogram], real: Sequence[Histogram], class_names: Sequence[str], unit: str) -> dict[str, Any]:
    """`intensity_distance`, overall and of each of several classes: how far pixels would have to move (Wasserstein-1); for HU `tissues`.

    Distances are in the unit, right to a thousandth of the range. `tissues` are the shares of pixels, [generated, real], of each range of
    `TISSUES` within the histograms' own; the first and last hold what was clipped, too, and are called so.
    """
    ours, theirs = together(generated), together(real)
    found: dict[str, Any] = {"intensity_distance": _distance(ours, theirs), "intensity_unit": unit}
    for name, own, other in zip(class_names, generated, real, strict=True):
        if len(class_names) > 1 and own.counts.any() and other.counts.any():
            found[f"intensity_distance/{name}"] = _distance(own, other)
    return found | ({"tissues": _tissue_shares(ours, theirs)} if unit == "HU" else {})


def _distance(one: Histogram, other: Histogram) -> float:
    from scipy.stats import wasserstein_distance

    centres = _centres(one.low, one.high, BINS * FINE)
    return float(wasserstein_distance(centres, centres, one.counts, other.counts))


def _centres(low: float, high: float, bins: int) -> NDArray[np.float64]:
    edges = np.linspace(low, high, bins + 1)
    return (edges[1:] + edges[:-1]) / 2


def _tissue_shares(ours: Histogram, theirs: Histogram) -> dict[str, list[float]]:
    shares = [some.tissues / some.tissues.sum() for some in (ours, theirs)]
    return {
        _called(name, low, high, ours): [float(values[place]) for values in shares]
        for place, (name, (low, high)) in enumerate(TISSUES.items())
        if low <= ours.high and high > ours.low
    }


def _called(name: str, low: float, high: float, histogram: Histogram) -> str:
    """`fluid and below` where the range begins within it."""
    if -np.inf < low <= histogram.low:
        return f"{name} and below"
    return f"{name} and above" if np.inf > high > histogram.high else name
