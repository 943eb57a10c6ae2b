"""Images of one patient or series as one answer."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def join_classes(logits: Floats, group_of: NDArray, temperature: float | None = None, prior: Floats | None = None) -> Floats:
    """Class probabilities of groups `(G, K)`: the sum of their images' log-likelihoods over a temperature, and the prior once.

    `logits` `(N, K)` nats without a prior, `group_of` `(N,)` 0 ... G-1, `prior` `(K,)` default uniform. A temperature of 1 takes
    images as independent evidence; None takes their mean, as if they were copies of one (neighbouring slices nearly are).
    """
    summed = np.zeros((group_of.max() + 1, logits.shape[1]))
    np.add.at(summed, group_of, logits)
    joint = summed / (np.bincount(group_of)[:, None] if temperature is None else temperature)
    joint = joint if prior is None else joint + np.log(prior)
    joint = np.exp(joint - joint.max(1, keepdims=True))
    return joint / joint.sum(1, keepdims=True)


def join_findings(probabilities: Floats, group_of: NDArray, rule: str) -> Floats:
    """Probabilities of findings of groups `(G, F)`: the `mean` or the `max` of their images' `(N, F)`."""
    joined = np.zeros((group_of.max() + 1, probabilities.shape[1]))
    if rule == "max":
        np.maximum.at(joined, group_of, probabilities)
        return joined
    np.add.at(joined, group_of, probabilities)
    return joined / np.bincount(group_of)[:, None]


def common_labels(labels: NDArray, group_of: NDArray) -> NDArray:
    """The class of each group `(G,)`; -1 where none of its images `(N,)` has a label, or where they have several."""
    found: list[set[int]] = [set() for _ in range(group_of.max() + 1)]
    for label, group in zip(labels.tolist(), group_of.tolist(), strict=True):
        found[group] |= {label} - {-1}
    return np.array([classes.pop() if len(classes) == 1 else -1 for classes in found])


def any_findings(labels: NDArray, group_of: NDArray) -> NDArray:
    """Findings of each group `(G, F)`: 1 where one of its images `(N, F)` shows it, -1 where none is known."""
    found = np.full((group_of.max() + 1, labels.shape[1]), -1)
    np.maximum.at(found, group_of, labels)
    return found
