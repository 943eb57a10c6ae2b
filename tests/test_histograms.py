"""Histograms of grey values, and how far one is from another."""

import numpy as np
import pytest

from medsd.evaluation.intensity import BINS, FINE, Histogram, class_histograms, intensity_metrics, together

LOW, HIGH = -800.0, 2000.0
NAMES = ["normal", "bleed"]


def images(count, mean, seed=0):
    return np.random.default_rng(seed).normal(mean, 30, (count, 8, 8))


def by_class(batches, labels, low=LOW, high=HIGH):
    return class_histograms(batches, np.array(labels), 2, low, high)


def test_batches_add_up_to_the_whole():
    every, labels = images(10, 40), [0, 1, 0, 1, 1, 0, 0, 0, 1, 1]
    whole, parts = by_class([every], labels), by_class([every[:3], every[3:4], every[4:]], labels)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one.counts, other.counts)
        np.testing.assert_array_equal(one.tissues, other.tissues)
    np.testing.assert_array_equal(together(parts).counts, np.histogram(every, BINS * FINE, (LOW, HIGH))[0])
    assert together(parts).shares.sum() == pytest.approx(1) and whole[0].counts.sum() == 5 * 64
    assert np.average(together(parts).centres, weights=together(parts).shares) == pytest.approx(every.mean(), abs=14)


def test_values_outside_count_to_the_ends():
    found = Histogram.of(np.array([-1e4, -800, 1999, 2000, 1e4]), LOW, HIGH)
    assert found.counts[0] == 2 and found.counts[-1] == 3


def test_the_distance_is_how_far_pixels_moved():
    real, moved = by_class([images(20, 40)], [0] * 20), by_class([images(20, 40) + 70], [0] * 20)
    found = intensity_metrics(moved, real, NAMES, "HU")
    assert found["intensity_distance"] == pytest.approx(70, abs=2.8) == found["intensity_distance/normal"]
    assert "intensity_distance/bleed" not in found and found["intensity_unit"] == "HU"


def test_the_distance_is_that_of_the_samples():
    from scipy.stats import wasserstein_distance

    one, other = images(20, 0), 1.5 * images(20, 100, seed=1)
    found = intensity_metrics(by_class([one], [0] * 20), by_class([other], [0] * 20), NAMES, "1")
    assert found["intensity_distance"] == pytest.approx(wasserstein_distance(one.ravel(), other.ravel()), abs=2.8)
    assert "tissues" not in found


def test_a_class_by_itself():
    """Moved in opposite directions, so that over both classes nothing is seen."""
    real = by_class([np.concatenate([images(9, 0), images(9, 200)])], [0] * 9 + [1] * 9)
    made = by_class([np.concatenate([images(9, 200), images(9, 0)])], [0] * 9 + [1] * 9)
    found = intensity_metrics(made, real, NAMES, "HU")
    assert found["intensity_distance"] == 0 and found["intensity_distance/bleed"] == pytest.approx(200, abs=3)
    alone = intensity_metrics([together(made)], [together(real)], ["images"], "HU")
    assert not any("/" in name for name in alone)


def test_tissues_are_counted_by_their_own_ends():
    """Not by those of bins, of which 28 HU each are drawn here."""
    values = np.array([[-300.0, -200, -20, 19.9, 20, 59.9, 60, 100, 299, 300]])
    found = intensity_metrics(by_class([values[:, None]], [0]), by_class([np.full((1, 1, 10), 30.0)], [0]), NAMES, "HU")["tissues"]
    ours = {name: round(10 * pair[0]) for name, pair in found.items()}
    assert ours == {"air and lung": 1, "fat": 1, "fluid": 2, "soft tissue": 2, "fresh blood": 1, "dense": 2, "bone": 1}
    assert found["soft tissue"][1] == 1


def test_a_narrow_window_says_what_it_clipped():
    """Air is -15 HU in the window 50/130, and would be called a fluid."""
    values = np.array([[-1000.0, 10, 40, 115, 1500]])[:, None]
    sides = [by_class([values], [0], -15.0, 115.0)] * 2
    found = intensity_metrics(*sides, NAMES, "HU")["tissues"]
    assert {name: pair[0] for name, pair in found.items()} == pytest.approx(
        {"fluid and below": 0.4, "soft tissue": 0.2, "fresh blood": 0.0, "dense and above": 0.4}
    )
