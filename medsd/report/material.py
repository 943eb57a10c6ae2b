"""What a report is made from: plain values and arrays, none of which names a patient or a path."""

from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray


@dataclass
class Material:
    """Fields of a report; what is None or empty leaves its section out."""

    title: str = "medsd report"
    facts: dict[str, str] = field(default_factory=dict)
    """What was trained on what: a phrase and its value."""
    environment: dict[str, Any] = field(default_factory=dict)
    """`environment.json` of a run."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Lines of a run's `metrics.jsonl`."""
    class_names: list[str] = field(default_factory=list)
    """K classes or findings."""
    grids: dict[str, NDArray] = field(default_factory=dict)
    """`real`, `reconstructed`, `generated` -> `(K, n, H, W)` or `(K, n, H, W, 3)` uint8."""
    denoising: NDArray | None = None
    """`(K, frames, H, W[, 3])` uint8, from noise to image."""
    features: dict[str, tuple[NDArray, NDArray]] = field(default_factory=dict)
    """`real` and `generated` -> features `(N, D)` and class indices `(N,)`."""
    probabilities: NDArray | None = None
    """`(N, K)` of the scored images."""
    labels: NDArray | None = None
    """Class indices `(N,)`, or findings `(N, K)` of 0 and 1; -1 where it is not known."""
    predictions: NDArray | None = None
    """Class indices `(N,)` that were answered; default the most probable."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """`metrics.json`: NAME, NAME_ci, NAME/CLASS, reasons."""
    evidence: list[tuple[NDArray, str]] = field(default_factory=list)
    """Overlays `(H, W, 3)` uint8 and their captions."""
    sweep: list[dict[str, Any]] = field(default_factory=list)
    """Rows of `results.csv`: model, fraction, patients, seed, and METRIC, METRIC_low, METRIC_high."""
    audit: dict[str, Any] | None = None
    """`audit.json`; `quantity`, if there, says what the scores below are."""
    audit_pairs: tuple[NDArray, NDArray, list[str]] | None = None
    """Generated images `(n, H, W[, 3])` uint8, the nearest training image of each, and n captions."""
    audit_scores: tuple[NDArray, NDArray, float] | None = None
    """Scores of generated and of held-out images against the training images, and the threshold below which one is flagged."""
    subgroups: list[dict[str, Any]] = field(default_factory=list)
    """column, value, n, and the `metric` as a number with its `low` and `high`; each a number or None."""
    histograms: tuple[NDArray, NDArray, NDArray, str] | None = None
    """Bin centres, shares of pixels of real and of generated images, all `(B,)`, and the unit."""
