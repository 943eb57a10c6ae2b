"""Pairs within a class, and how alike they are."""

import numpy as np
import pytest
import torch

from medsd.evaluation.diversity import class_pairs, pair_similarity
from medsd.evaluation.reconstruction import ms_ssim

LABELS = np.arange(60) % 3
NAMES = ["a", "b", "c"]


def noise(count, side=32, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.nn.functional.avg_pool2d(torch.rand((count, 1, side + 4, side + 4), generator=draws) * 2 - 1, 5, 1)


def test_pairs_are_of_one_class_and_of_two_patients():
    patients = [str(i // 15) for i in range(60)]
    pairs = class_pairs(LABELS, 3, seed=0, patients=patients, most=30)
    assert len(pairs) == 90 and len({tuple(sorted(pair)) for pair in pairs.tolist()}) == 90
    assert (LABELS[pairs[:, 0]] == LABELS[pairs[:, 1]]).all() and np.bincount(LABELS[pairs[:, 0]]).tolist() == [30] * 3
    assert all(patients[one] != patients[other] for one, other in pairs.tolist())
    np.testing.assert_array_equal(pairs, class_pairs(LABELS, 3, seed=0, patients=patients, most=30))
    assert not np.array_equal(pairs, class_pairs(LABELS, 3, seed=1, patients=patients, most=30))


def test_few_images_make_few_pairs():
    assert class_pairs(np.array([0, 0, 0, 1]), 2, seed=0).tolist() and len(class_pairs(np.array([0, 0, 0, 1]), 2, seed=0)) == 3
    assert class_pairs(np.array([0, 0]), 1, seed=0, patients=["p", "p"]).shape == (0, 2)


def test_similarity_is_the_mean_of_the_classes():
    """Pairs of equal images in one class, of noise in the other; as many pairs or not, both classes count alike."""
    first, second = noise(40), noise(40, seed=1)
    second[:30] = first[:30]
    labels = np.array([0] * 30 + [1] * 10)
    found = pair_similarity("x", first, second, labels, NAMES)
    other = ms_ssim(first[30:], second[30:])
    assert found["x/a"] == pytest.approx(1) and found["x/a_ci"] == pytest.approx([1, 1])
    assert found["x/b"] == pytest.approx(other.mean().item()) and "x/c" not in found
    assert found["x"] == pytest.approx((1 + found["x/b"]) / 2)
    error = other.std().item() / 10**0.5
    assert np.diff(found["x/b_ci"]) == pytest.approx(2 * 1.96 * error, rel=0.2) and np.diff(found["x_ci"]) == pytest.approx(
        np.diff(found["x/b_ci"]) / 2, rel=0.2
    )
    assert set(pair_similarity("x", first, second, 0 * labels, ["images"])) == {"x", "x_ci"}


def test_a_generator_that_repeats_itself_is_seen():
    varied, base = noise(40), noise(1, seed=5)
    repeated = (0.9 * base + 0.1 * noise(40, seed=2)).clamp(-1, 1)
    pairs = class_pairs(np.zeros(40, int), 1, seed=0)
    values = [pair_similarity("x", *(some[side] for side in pairs.T), 0 * pairs[:, 0], ["images"]) for some in (varied, repeated)]
    assert values[1]["x_ci"][0] > values[0]["x_ci"][1] + 0.3


def test_similarity_is_that_of_torchmetrics():
    """Of images that five scales fit into."""
    measures = pytest.importorskip("torchmetrics.image")
    first = noise(3, 192)
    second = first + 0.3 * noise(3, 192, seed=1)
    theirs = measures.MultiScaleStructuralSimilarityIndexMeasure(data_range=2.0, kernel_size=11, sigma=1.5)(second, first).item()
    assert pair_similarity("x", first, second, np.zeros(3, int), ["images"])["x"] == pytest.approx(theirs, abs=2e-3)
