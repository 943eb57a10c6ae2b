"""How well segmentations overlap: maps of labels in, numbers out.

A *map* `(H, W)` holds a label's number in each pixel, 0 for the background.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.resampling import Floats, mean_with_interval, together


def dice(answers: NDArray, truth: NDArray, label: int) -> Floats:
    """2 |A & B| / (|A| + |B|) of the pixels with `label` (Dice, 1945), for N maps each `(N, H, W)`: `(N,)`.

    NaN where neither map has the label; 0 where only one has it.
    """
    ours, theirs = (maps.reshape(len(maps), -1) == label for maps in (answers, truth))
    both, either = (ours & theirs).sum(1), ours.sum(1) + theirs.sum(1)
    return np.divide(2 * both, either, out=np.full(len(either), np.nan), where=either > 0)


def dice_metrics(answers: NDArray, truth: NDArray, label_names: Sequence[str], patients: Sequence[str]) -> dict[str, Any]:
    """`dice/LABEL`, `dice/LABEL_ci` by patient, and `reasons`, of N maps each `(N, H, W)`; `label_names` are those of 1, 2, ...

    The mean over the images in which the truth or the answer has the label: finding something where nothing is counts 0, and finding
    nothing there does not count, since otherwise images without the label would decide the mean.
    """
    return together(_of_label(f"dice/{name}", dice(answers, truth, label), patients) for label, name in enumerate(label_names, 1))


def _of_label(name: str, values: Floats, patients: Sequence[str]) -> dict[str, Any]:
    counted = np.flatnonzero(~np.isnan(values))
    if len(counted):
        return mean_with_interval(name, values[counted], [patients[place] for place in counted])
    return {name: None, f"{name}_ci": None, "reasons": dict.fromkeys((name, f"{name}_ci"), "No image has it, and none is said to.")}
