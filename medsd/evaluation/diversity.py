"""How unlike each other the images of a class are: a generator that repeats itself is seen here, and not in single images."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medsd.evaluation.reconstruction import ms_ssim

PAIRS = 64
"""Of each class."""
AT_ONCE = 32


def class_pairs(labels: NDArray, classes: int, seed: int, patients: Sequence[str] | None = None, most: int = PAIRS) -> NDArray:
    """Places `(P, 2)` of up to `most` random pairs of each class, never two images of one patient."""
    draws = np.random.default_rng(seed)
    found = []
    for number in range(classes):
        members = np.flatnonzero(labels == number)
        if len(members) < 2:
            continue
        pairs = {tuple(sorted(draws.choice(members, 2, replace=False).tolist())) for _ in range(4 * most)}
        apart = [pair for pair in sorted(pairs) if patients is None or patients[pair[0]] != patients[pair[1]]]
        found += [apart[place] for place in draws.permutation(len(apart))[:most]]
    return np.array(found, int).reshape(-1, 2)


def pair_similarity(
    name: str, first: torch.Tensor, second: torch.Tensor, labels: NDArray, class_names: Sequence[str], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """MS-SSIM (Wang et al., 2003) of P pairs of images `(P, C, H, W)` in `[-1, 1]`, each of one class of `labels` `(P,)`.

    `name/CLASS` is the mean of a class's pairs, `name` that of the classes; with `_ci`, for which pairs are drawn again within each class.
    Beside those of real images: higher means less diverse (Odena et al., ICML 2017, section 4.2).
    """
    parts = zip(first.split(AT_ONCE), second.split(AT_ONCE), strict=True)
    values, draws = torch.cat([ms_ssim(one, other) for one, other in parts]).numpy(), np.random.default_rng(seed)
    found, drawn = {}, []
    for number in np.unique(labels):
        own = values[labels == number]
        drawn.append(np.append(own.mean(), draws.choice(own, (resamples, len(own))).mean(1)))
        found |= _with_interval(f"{name}/{class_names[number]}", drawn[-1])
    return _with_interval(name, np.mean(drawn, 0)) | (found if len(class_names) > 1 else {})


def _with_interval(name: str, series: NDArray[np.float64]) -> dict[str, Any]:
    return {name: float(series[0]), f"{name}_ci": [float(bound) for bound in np.percentile(series[1:], [2.5, 97.5])]}
