"""Splits: whole patients, the asked fractions, the same shares of labels, and no image in two splits."""

import numpy as np
import pytest

from medsd.data.splits import SPLITS, check_patient_overlap, drop_duplicates, find_duplicates, nested_subset, split_patients
from medsd.errors import InputError

SEEDS = range(8)


def random_rows(seed: int, patients: int = 120, labels: int = 4) -> tuple[list[str], list[int]]:
    """Rows of patients with 1 to 30 images, each mostly of one label; the labels are not equally frequent."""
    rng = np.random.default_rng(seed)
    common = np.arange(1, labels + 1) ** 2 / np.sum(np.arange(1, labels + 1) ** 2)
    rows = []
    for patient in range(patients):
        own = rng.choice(labels, p=common)
        for _ in range(rng.integers(1, 31)):
            label = own if rng.random() < 0.8 else rng.choice(labels, p=common)
            rows.append((f"p{patient}", int(label)))
    order = rng.permutation(len(rows))
    return [rows[i][0] for i in order], [rows[i][1] for i in order]


def shares(splits: list[str], rows: np.ndarray | None = None) -> np.ndarray:
    chosen = np.asarray(splits) if rows is None else np.asarray(splits)[rows]
    return np.array([np.mean(chosen == name) for name in SPLITS])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.8, 0.0, 0.2), (0.34, 0.33, 0.33)])
def test_no_patient_is_split_and_the_fractions_hold_for_rows_and_for_every_label(seed, fractions):
    patients, labels = random_rows(seed)
    splits = split_patients(patients, labels, fractions, seed)
    check_patient_overlap(patients, splits)
    largest = np.unique(patients, return_counts=True)[1].max()
    assert np.all(np.abs(shares(splits) - fractions) <= largest / len(patients))
    for label in set(labels):
        rows = np.asarray(labels) == label
        assert np.all(np.abs(shares(splits, rows) - fractions) <= max(0.05, largest / rows.sum()))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_of_the_rows_does_not_matter(seed):
    patients, labels = random_rows(seed)
    straight = dict(zip(patients, split_patients(patients, labels, seed=seed), strict=True))
    order = np.random.default_rng(seed).permutation(len(patients))
    shuffled = [patients[i] for i in order], [labels[i] for i in order]
    assert dict(zip(shuffled[0], split_patients(*shuffled, seed=seed), strict=True)) == straight


def test_the_seed_matters_even_where_no_two_patients_have_equally_many_rows():
    patients = [f"p{size}" for size in range(20, 60) for _ in range(size)]
    labels = [0] * len(patients)
    assert split_patients(patients, labels, seed=1) == split_patients(patients, labels, seed=1)
    assert len({tuple(split_patients(patients, labels, seed=seed)) for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_large_patients_are_not_all_in_train(seed):
    patients = [f"p{i}" for i in range(50) for _ in range(64 if i < 10 else 8)]
    splits = np.array(split_patients(patients, [0] * len(patients), seed=seed))
    large = np.array([int(patient[1:]) < 10 for patient in patients])
    assert np.sum(large & (splits == "test")) == 2 * 64


@pytest.mark.parametrize("fractions", [(0.7, 0.1, 0.2), (0.05, 0.05, 0.9)])
def test_train_has_every_label_however_rare(fractions):
    patients = [f"common{i}" for i in range(40)] + ["rare", "pair1", "pair2"]
    labels = [0] * 40 + [1, 2, 2]
    splits = split_patients(patients, labels, fractions)
    assert {label for label, split in zip(labels, splits, strict=True) if split == "train"} == {0, 1, 2}


@pytest.mark.parametrize(("patients", "labels"), [(3, 1), (5, 1), (12, 6), (18, 6), (30, 14)])
@pytest.mark.parametrize("seed", SEEDS)
def test_no_asked_for_split_is_empty_where_patients_are_few(patients, labels, seed):
    own = [i % labels for i in range(patients)]
    splits = split_patients([str(i) for i in range(patients)], own, seed=seed)
    assert set(splits) == set(SPLITS)


def test_fewer_patients_than_splits_fill_train_first():
    assert split_patients(["a"], [0]) == ["train"]
    assert sorted(split_patients(["a", "b"], [0, 0])) == ["test", "train"]


def test_a_split_of_fraction_zero_stays_empty():
    patients, labels = random_rows(0)
    assert set(split_patients(patients, labels, (0, 0, 1))) == {"test"}
    assert set(split_patients(patients, labels, (0.5, 0, 0.5))) == {"train", "test"}
    assert split_patients([], []) == []


@pytest.mark.parametrize("fractions", [(0.7, 0.1), (0.7, 0.1, 0.1), (1.2, -0.4, 0.2), (float("nan"), 0.5, 0.5)])
def test_wrong_fractions_are_refused_by_the_name_of_their_flag(fractions):
    with pytest.raises(InputError, match="--split_fractions"):
        split_patients(["a"], [0], fractions)


def test_overlap_tells_how_many_patients_and_what_to_do():
    patients = ["a", "a", "b", "b", "c", "c", "d", "d", "e"]
    splits = ["train", "test"] * 4 + ["test"]
    with pytest.raises(InputError, match=r"4 of 5 patients .*\(the first: 0.png in train, 1.png in test\).*--split_column"):
        check_patient_overlap(patients, splits, [f"{row}.png" for row in range(9)])
    check_patient_overlap(["a", "a", "b"], ["train", "train", "test"])


def test_duplicates_are_groups_that_cross_splits():
    fingerprints = ["x", "y", "x", "z", "z", "y", "x"]
    splits = ["train", "train", "test", "train", "train", "validation", "train"]
    assert find_duplicates(fingerprints, splits) == [(0, 2, 6), (1, 5)]


def test_duplicates_go_from_train_first_and_never_from_test():
    splits = ["train", "validation", "test", "train", "validation", "train", "test", "test"]
    groups = [(0, 1, 2), (3, 4), (5, 6, 7)]
    assert drop_duplicates(groups, splits) == {0, 1, 3, 5}


@pytest.mark.parametrize("seed", SEEDS)
def test_after_dropping_no_fingerprint_is_in_two_splits(seed):
    rng = np.random.default_rng(seed)
    splits = [SPLITS[i] for i in rng.choice(3, 200, p=[0.7, 0.1, 0.2])]
    fingerprints = [str(i) for i in rng.integers(0, 120, 200)]
    dropped = drop_duplicates(find_duplicates(fingerprints, splits), splits)
    left = [row for row in range(200) if row not in dropped]
    assert find_duplicates([fingerprints[row] for row in left], [splits[row] for row in left]) == []
    assert {fingerprints[row] for row in left} == set(fingerprints)
    assert all(splits[row] != "test" for row in dropped)


def multi_label_collection(patients=300, seed=3):
    """Five slices a patient; a rare finding that goes with a common one."""
    generator = np.random.default_rng(seed)
    names, labels = [], []
    for patient in range(patients):
        common, rare = generator.random() < 0.4, generator.random() < 0.06
        for _ in range(5):
            names.append(f"p{patient}")
            labels.append([int(common and generator.random() < 0.8), int(rare and generator.random() < 0.9)])
    return names, np.array(labels)


def test_each_finding_and_no_finding_are_spread_evenly():
    patients, labels = multi_label_collection()
    splits = np.array(split_patients(patients, labels, (0.6, 0.2, 0.2), seed=1))
    columns = np.column_stack([labels, 1 - labels.max(1)])
    for split, fraction in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        shares = columns[splits == split].sum(0) / columns.sum(0)
        np.testing.assert_allclose(shares, fraction, atol=0.03)
    check_patient_overlap(patients, splits.tolist())


@pytest.mark.parametrize("seed", range(3))
def test_subsets_are_nested_whole_patients_and_stratified(seed):
    patients, labels = multi_label_collection()
    owners, before = np.array(patients), set()
    for fraction in (0.1, 0.25, 0.5, 1.0):
        rows = nested_subset(patients, labels, fraction, seed)
        chosen = set(owners[rows])
        assert before <= set(rows.tolist()) and len(chosen) == round(fraction * 300)
        assert set(np.flatnonzero(np.isin(owners, list(chosen))).tolist()) == set(rows.tolist())
        share = labels[rows, 1].sum() / labels[:, 1].sum()
        assert abs(share - fraction) < 0.12
        before = set(rows.tolist())
    assert set(nested_subset(patients, labels, 0.25, seed).tolist()) != set(nested_subset(patients, labels, 0.25, seed + 10).tolist())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_subset_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match="subset"):
        nested_subset(["a"], [0], fraction)
