"""Which patient goes to which split, and which images must not be in two of them.

Words. The *patient* is the unit of every split: all rows of a patient share one. A *row* is one image.
Its *label* is its class, or a number for its set of findings where several can hold. A *fingerprint* is
a hash of an image's pixels; rows with the same fingerprint are duplicates.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from medsd.errors import InputError

SPLITS = ("train", "validation", "test")


def split_patients(
    patients: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> list[str]:
    """The split of every row: whole patients, each split with nearly the same shares of labels.

    Patients are placed one by one, large ones first, each where it adds least to the chi-square distance
    between the splits' counts (rows of each label, and rows in all) and `fractions` of the totals. Among
    patients of about one size (the same power of two) a hash of seed and patient gives the order, so the
    order of the rows does not matter. The first patient with a label goes to train: train has every label
    that occurs, unless its fraction is 0. No other split of a fraction above 0 is empty while there are
    patients for it, but a label of few patients may be missing from validation or test.

    Args:
        patients: patient id of each row.
        labels: label of each row, any integers; or `(N, F)` of 0 and 1 where several of F findings can hold, each of which
            is then spread evenly, as are the rows without any.
        fractions: shares of rows for train, validation and test; a split of fraction 0 stays empty.
        seed: any integer.

    Raises:
        InputError: fractions that are negative, not three, or do not sum to 1.
    """
    shares = _checked_fractions(fractions)
    names, patient_of = np.unique(np.asarray(patients, str), return_inverse=True)
    counts = _counts(patient_of, _indicators(labels))
    split_of = _place(counts, np.bincount(patient_of), _placing_order(names, np.bincount(patient_of), seed), shares)
    return [SPLITS[split_of[patient]] for patient in patient_of]


def nested_subset(patients: Sequence[str], labels: Sequence[int] | np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Rows `(M,)` of `fraction` of the patients, ascending: with one seed, those of a smaller fraction are among those of a larger.

    Patients are put in one order for all fractions, in which those of every label (of a patient's rarest one, where it has
    several) are spread evenly; the subset is the head of it, at least one patient.

    Args:
        patients: patient id of each row.
        labels: as in `split_patients`.
        fraction: of the patients, above 0 and at most 1.
        seed: any integer.

    Raises:
        InputError: a fraction out of range.
    """
    if not 0 < fraction <= 1:
        raise InputError(f"a subset of {fraction} of the patients: above 0 and at most 1 is expected")
    if len(patients) == 0:
        raise InputError("a subset of no patients: the split is empty")
    names, patient_of = np.unique(np.asarray(patients, str), return_inverse=True)
    counts = _counts(patient_of, _indicators(labels))
    has = counts > 0
    rarest = np.where(has, has.sum(0), len(names) + 1).argmin(1)
    place = np.empty(len(names))
    for label in np.unique(rarest):
        members = sorted(np.flatnonzero(rarest == label), key=lambda patient: _shuffled(seed, names[patient]))
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = sorted(range(len(names)), key=lambda patient: (place[patient], _shuffled(seed, names[patient])))
    chosen = np.zeros(len(names), bool)
    chosen[order[: max(1, round(fraction * len(names)))]] = True
    return np.flatnonzero(chosen[patient_of])


def check_patient_overlap(patients: Sequence[str], splits: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Refuse patients whose rows lie in several splits.

    `patients` are the salted hashes, one per row; `names` are what the message calls rows, to show two of one patient.

    Raises:
        InputError: a patient is in more than one split.
    """
    found = defaultdict(set)
    for patient, split in zip(patients, splits, strict=True):
        found[patient].add(split)
    shared = sorted(patient for patient, where in found.items() if len(where) > 1)
    if shared:
        first = {split: row for row, (patient, split) in enumerate(zip(patients, splits, strict=True)) if patient == shared[0]}
        some = ", ".join(f"{names[row]} in {split}" for split, row in first.items()) if names else shared[0]
        raise InputError(
            f"{len(shared)} of {len(found)} patients are in several splits (the first: {some}): give all images of a patient one split,"
            " or leave given splits away (--split_column, train and test folders) to split by patient"
        )


def find_duplicates(fingerprints: Sequence[str], splits: Sequence[str]) -> list[tuple[int, ...]]:
    """Groups of rows with one fingerprint in more than one split; rows ascending, groups by first row."""
    rows_of = defaultdict(list)
    for row, fingerprint in enumerate(fingerprints):
        rows_of[fingerprint].append(row)
    return [tuple(rows) for rows in rows_of.values() if len({splits[row] for row in rows}) > 1]


def drop_duplicates(groups: Iterable[Sequence[int]], splits: Sequence[str]) -> set[int]:
    """Rows to leave out so that no group lies in more than one split.

    Of each group the rows in one split stay: those in test if there are any, else those in validation. So
    rows go from train first, then from validation, never from test. Groups may overlap.
    """
    rank = {name: place for place, name in enumerate(SPLITS)}
    dropped = set()
    for group in groups:
        kept = max(rank[splits[row]] for row in group)
        dropped.update(row for row in group if rank[splits[row]] < kept)
    return dropped


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
    fits = len(fractions) == len(SPLITS) and all(fraction >= 0 for fraction in fractions)
    if not fits or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise InputError(
            f"--split_fractions is {' '.join(map(str, fractions))}: give three numbers, for train, "
            "validation and test, that are at least 0 and sum to 1, such as 0.7 0.1 0.2."
        )
    return np.asarray(fractions, float)


def _indicators(labels: Sequence[int] | np.ndarray) -> np.ndarray:
    """Labels `(N,)` or `(N, F)` -> 0 and 1 `(N, labels)`; rows without any finding have a label of their own."""
    labels = np.asarray(labels, int)
    if labels.ndim == 1:
        return labels[:, None] == np.unique(labels)
    columns = np.column_stack([labels > 0, ~(labels > 0).any(1)])
    return columns[:, columns.any(0)]


def _counts(patient_of: np.ndarray, indicators: np.ndarray) -> np.ndarray:
    """Rows of each patient with each label `(P, labels)`."""
    counts = np.zeros((patient_of.max(initial=-1) + 1, indicators.shape[1]))
    np.add.at(counts, patient_of, indicators)
    return counts


def _shuffled(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _placing_order(names: Sequence[str], sizes: np.ndarray, seed: int) -> list[int]:
    """Patients by falling power of two of their size, then by hash: so the seed always has a say."""

    def key(patient: int) -> tuple[int, bytes]:
        return -int(sizes[patient]).bit_length(), _shuffled(seed, names[patient])

    return sorted(range(len(names)), key=key)


def _place(counts: np.ndarray, sizes: np.ndarray, order: Iterable[int], shares: np.ndarray) -> np.ndarray:
    """The split index `(P,)` of patients with `counts` `(P, labels)` and `sizes` `(P,)` in rows.

    With A rows of a label in a split and T its target there, the chi-square distance is the sum of
    (A - T)^2 / T. Adding c rows changes it by 2 (A + c / 2) c / T and a term that all splits share.
    All rows together weigh as much as all labels, else every rare label is rounded away from the same split.
    The last patients go to splits that are still empty.
    """
    used = np.flatnonzero(shares)
    weights = np.append(np.ones(counts.shape[1]), counts.shape[1])
    counts = np.column_stack([counts, sizes])
    targets = shares[used, None] * counts.sum(0)
    filled = np.zeros_like(targets)
    split_of = np.zeros(len(counts), int)
    for placed, patient in enumerate(order):
        added = counts[patient]
        rise = (weights * (filled + added / 2) * added / targets).sum(1)
        empty = filled[:, -1] == 0
        if len(counts) - placed <= empty.sum():
            rise[~empty] = np.inf
        new_to_train = used[0] == 0 and np.any((added > 0) & (filled[0] == 0))
        choice = 0 if new_to_train else rise.argmin()
        split_of[patient] = used[choice]
        filled[choice] += added
    return split_of
