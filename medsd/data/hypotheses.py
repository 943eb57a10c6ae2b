"""What a classifier chooses between: classes that exclude each other, or the sets of findings that were seen together.

A *hypothesis* is a set of class indices: of one class, or of several findings that hold in one image, or of none.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.prompts import listed

MOST_SETS = 32
UNKNOWN = (-1,)
"""In place of the set of an image of which something is not known."""


@dataclass(frozen=True)
class Hypotheses:
    """Sets of classes, and how many training images had each."""

    sets: tuple[tuple[int, ...], ...]
    """Class indices, rising."""
    counts: tuple[int, ...]
    pooled: int = 0
    """Training images with other sets of findings."""

    def prior(self) -> np.ndarray:
        """Smoothed frequency of each, `(H,)` (Laplace's rule: one image more of each)."""
        counts = np.array(self.counts) + 1.0
        return counts / counts.sum()

    def membership(self, classes: int) -> np.ndarray:
        """`(H, classes)` of 0 and 1: which classes each set holds."""
        holds = np.zeros((len(self.sets), classes))
        for number, members in enumerate(self.sets):
            holds[number, list(members)] = 1
        return holds

    def missing(self, classes: int) -> list[int]:
        """Indices of the findings that no set holds, whose probability is therefore always 0."""
        return sorted(set(range(classes)) - {index for members in self.sets for index in members})

    def numbers(self, labels: np.ndarray) -> np.ndarray:
        """The hypothesis of each image `(N,)`, for class indices `(N,)` or findings `(N, K)` of 0 and 1; -1 where it is none."""
        place = {members: number for number, members in enumerate(self.sets)}
        return np.array([place.get(members, -1) for members in _sets(labels)], dtype=int)

    def prompts(self, data: DataInfo) -> list[str]:
        """The prompt of each set, which names its findings as a training image's does."""
        if not data.multi_label:
            return data.prompts
        words = data.class_tokens or data.class_names
        template = data.prompt_template or data.prompts[0].replace(words[0], "{label}")
        return [template.replace("{label}", listed([words[index] for index in members])) for members in self.sets]

    def names(self, class_names: Sequence[str]) -> list[str]:
        """`"epidural|subdural"`, and an empty name for no finding."""
        return ["|".join(class_names[index] for index in members) for members in self.sets]

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Hypotheses":
        """Inverse of `dataclasses.asdict`, by way of JSON."""
        return cls(tuple(tuple(members) for members in record["sets"]), tuple(record["counts"]), record["pooled"])


def count_hypotheses(labels: np.ndarray, classes: int) -> Hypotheses:
    """Of training labels: every class, for indices `(N,)`; for findings `(N, classes)` of 0 and 1 `MOST_SETS` sets: the most
    frequent one of all and of each finding, then the others as they are frequent. Images of which something is not known, -1, are left out.
    """
    counted = Counter(_sets(labels[labels >= 0] if labels.ndim == 1 else labels[(labels >= 0).all(1)]))
    if labels.ndim == 1:
        return Hypotheses(tuple((index,) for index in range(classes)), tuple(counted[index,] for index in range(classes)))
    often = sorted(counted, key=lambda members: (-counted[members], members))
    leading = {*often[:1], *(next((members for members in often if index in members), None) for index in range(classes))}
    first = sorted(often, key=lambda members: members not in leading)
    kept = sorted(first[:MOST_SETS], key=lambda members: (len(members), members))
    return Hypotheses(tuple(kept), tuple(counted[members] for members in kept), sum(counted[members] for members in first[MOST_SETS:]))


def _sets(labels: np.ndarray) -> list[tuple[int, ...]]:
    if labels.ndim == 1:
        return [(int(label),) for label in labels]
    return [tuple(int(index) for index in np.flatnonzero(row)) if (row >= 0).all() else UNKNOWN for row in labels]
