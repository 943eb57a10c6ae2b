"""Dice by hand and against MONAI's; which images count; shares and their intervals."""

import numpy as np
import pytest

from medsd.evaluation.overlap import dice, dice_metrics
from medsd.evaluation.resampling import together
from medsd.evaluation.shares import agreement, binomial_interval


def maps(seed, count=12, side=16, labels=3):
    """Random blocks of labels, some maps without any."""
    draws = np.random.default_rng(seed)
    found = np.zeros((count, side, side), int)
    for image in found[: count - 3]:
        for label in range(1, labels):
            row, column = draws.integers(0, side - 6, 2)
            image[row : row + 6, column : column + 6] = label * draws.integers(0, 2)
    return found


def test_dice_by_hand():
    truth, answer = np.zeros((4, 4, 4), int), np.zeros((4, 4, 4), int)
    truth[0, :2], answer[0, 1:3] = 1, 1
    truth[1, 0], answer[2, 0] = 1, 1
    assert dice(answer, truth, 1).tolist()[:3] == [0.5, 0.0, 0.0] and np.isnan(dice(answer, truth, 1)[3])
    assert dice(truth, truth, 1)[0] == 1


@pytest.mark.parametrize("label", [1, 2])
def test_dice_is_that_of_monai(label):
    """Which says 1 where both maps are empty, and we nothing."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    answers, truth = maps(0), maps(1)
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(some), 3).movedim(-1, 1).float() for some in (answers, truth)]
    theirs = metrics.DiceMetric(include_background=True, reduction="none", ignore_empty=False)(*one_hot)[:, label].numpy()
    ours = dice(answers, truth, label)
    empty = np.isnan(ours)
    assert 3 <= empty.sum() < 12 and (theirs[empty] == 1).all()
    np.testing.assert_allclose(ours[~empty], theirs[~empty], atol=1e-6)


def test_images_without_the_label_count_only_where_it_is_found():
    truth, answer = np.zeros((4, 2, 2), int), np.zeros((4, 2, 2), int)
    truth[0], answer[0], answer[1] = 1, 1, 1
    patients = ["a", "b", "c", "d"]
    found = dice_metrics(answer, truth, ["1", "4"], patients)
    assert found["dice/1"] == 0.5, "images 0 (overlap 1) and 1 (false alarm, 0), neither 2 nor 3"
    assert found["dice/1_ci"][0] == 0 and found["dice/1_ci"][1] == 1
    assert found["dice/4"] is None and found["dice/4_ci"] is None and "No image" in found["reasons"]["dice/4"]
    alone = dice_metrics(answer, truth, ["1"], ["a"] * 4)
    assert alone["dice/1"] == 0.5 and alone["dice/1_ci"] is None and "Only one patient" in alone["reasons"]["dice/1_ci"]


def test_the_interval_of_dice_goes_by_patient():
    truth = maps(2, count=60)
    answer = np.where(np.random.default_rng(0).random((30, 1, 1)).repeat(2, 0) < 0.5, truth, 0)
    by_patient, by_image = (dice_metrics(answer, truth, ["1"], [str(i // part) for i in range(60)])["dice/1_ci"] for part in (2, 1))
    assert np.diff(by_patient) > 1.15 * np.diff(by_image)


def test_shares_of_a_binomial():
    """The bounds at which the observed share is just as rare as 2.5 %."""
    from scipy.stats import binom

    low, high = binomial_interval(7, 20)
    assert binom.sf(6, 20, low) == pytest.approx(0.025) and binom.cdf(7, 20, high) == pytest.approx(0.025)
    assert binomial_interval(0, 10)[0] == 0 and binomial_interval(10, 10) == pytest.approx((0.025 ** (1 / 10), 1.0))


def test_agreement_overall_and_of_each_class():
    answers, labels = np.array([0, 0, 1, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    found = agreement("agreed", answers, labels, ["a", "b", "c"])
    assert (found["agreed"], found["agreed/a"], found["agreed/b"]) == pytest.approx((4 / 6, 2 / 3, 2 / 3)) and "agreed/c" not in found
    assert found["agreed_ci"] == pytest.approx(binomial_interval(4, 6)) and not found["reasons"]
    by_patient = agreement("agreed", answers, labels, ["a", "b"], ["p", "p", "p", "q", "r", "s"])
    assert by_patient["agreed/a_ci"] is None and "Only one patient" in by_patient["reasons"]["agreed/a_ci"]
    assert by_patient["agreed/b"] == found["agreed/b"] and by_patient["agreed/b_ci"] == [0, 1]


def test_reasons_keep_their_names():
    parts = [{"x": 1, "reasons": {"y": "why"}}, {"z": 2}]
    assert together(parts, "a/") == {"a/x": 1, "a/z": 2, "reasons": {"a/y": "why"}}
