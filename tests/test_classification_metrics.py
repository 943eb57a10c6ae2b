"""Classification metrics against scikit-learn, sums done by hand, and simulation."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from medsd.errors import InputError
from medsd.evaluation.classification import (
    auroc,
    average_precision,
    calibration_error,
    calibration_floor,
    classification_metrics,
    risk_coverage_area,
    risk_coverage_points,
)
from medsd.evaluation.groups import join_classes


def scored_images(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated probabilities `(n, classes)` and labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.standard_normal((n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((n, 1)) > probabilities.cumsum(1)).sum(1).clip(max=classes - 1)
    return probabilities, labels


def evaluate(probabilities, labels, patients=None, **options) -> dict:
    names = [f"c{i}" for i in range(np.shape(probabilities)[1])]
    patients = [f"p{i}" for i in range(len(labels))] if patients is None else patients
    return classification_metrics(probabilities, labels, names, patients, **{"resamples": 50, **options})


def once(statistic, scores, flags) -> float:
    return float(statistic(scores, flags, np.ones((1, len(scores))))[0])


@pytest.mark.parametrize("decimals", [1, 12])
def test_several_classes_agree_with_scikit_learn_with_and_without_ties(decimals):
    probabilities, labels = scored_images(300, 5)
    probabilities = np.round(probabilities, decimals) + 0.01
    probabilities /= probabilities.sum(1, keepdims=True)
    truth, top = np.eye(5)[labels], probabilities.argmax(1)
    ours = evaluate(probabilities, labels)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, top),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score(labels, top),
        "auroc": sklearn_metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "average_precision": sklearn_metrics.average_precision_score(truth, probabilities),
        "nll": sklearn_metrics.log_loss(labels, probabilities),
        "brier": np.mean(np.sum((probabilities - truth) ** 2, 1)),
        "auroc/c3": sklearn_metrics.roc_auc_score(truth[:, 3], probabilities[:, 3]),
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected)


def test_two_classes_are_ranked_by_the_second():
    probabilities, labels = scored_images(200, 2)
    ours = evaluate(probabilities, labels)
    assert ours["auroc"] == pytest.approx(sklearn_metrics.roc_auc_score(labels, probabilities[:, 1]))
    assert ours["auroc"] == ours["auroc/c1"] == pytest.approx(ours["auroc/c0"])
    precision = sklearn_metrics.average_precision_score(labels, probabilities[:, 1])
    assert ours["average_precision"] == pytest.approx(precision)


def test_weights_count_as_copies_of_an_image():
    rng = np.random.default_rng(0)
    scores, flags = rng.integers(0, 9, 60) / 8, rng.random(60) < 0.4
    copies = rng.integers(0, 4, (3, 60))
    for statistic in (auroc, average_precision, risk_coverage_area, calibration_error):
        repeated = [once(statistic, np.repeat(scores, row), np.repeat(flags, row)) for row in copies]
        assert statistic(scores, flags, copies) == pytest.approx(repeated)


def test_ties_count_half():
    assert once(auroc, [0.5, 0.5, 0.5], [True, False, False]) == 0.5
    assert once(auroc, [0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx(3.5 / 4)
    assert np.isnan(once(auroc, [0.1, 0.2], [True, True]))
    assert np.isnan(once(average_precision, [0.1, 0.2], [True, True]))


def test_calibration_error_by_hand():
    # Bins (0.6, 0.667], (0.867, 0.933] and (0.933, 1]: gaps 2 x 0.65 - 1, 2 - 2 x 0.9 and 1 over 5 images.
    confidence, right = [0.65, 0.65, 0.9, 0.9, 1.0], [True, False, True, True, False]
    assert once(calibration_error, confidence, right) == pytest.approx((0.3 + 0.2 + 1.0) / 5)
    # Both lie in (0.733, 0.8], which includes its upper end.
    assert once(calibration_error, [0.8, 0.78], [True, False]) == pytest.approx((0.78 - 0.2) / 2)


def test_risk_coverage_area_by_hand():
    # From the most confident down: right, wrong, right, wrong. Risks 0, 1/2, 1/3, 1/2.
    confidence, wrong = [0.6, 0.9, 0.7, 0.8], [True, False, False, True]
    assert once(risk_coverage_area, confidence, wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert once(risk_coverage_area, [0.5] * 4, wrong) == pytest.approx(1 / 2)


@pytest.mark.parametrize("n", [80, 1000])
def test_the_floor_is_the_mean_error_of_a_calibrated_model(n):
    errors = []
    for seed in range(300):
        probabilities, labels = scored_images(n, 4, seed)
        right = probabilities.argmax(1) == labels
        errors.append(once(calibration_error, probabilities.max(1), right))
    floor = calibration_floor(scored_images(n, 4)[0], np.random.default_rng(0))
    assert floor == pytest.approx(np.mean(errors), rel=0.08)


def test_the_floor_has_the_size_measured_for_two_classes():
    # Other code measured these on other probabilities, so only their size can agree.
    for n, measured in [(80, 0.086), (468, 0.036), (1000, 0.024), (3000, 0.014)]:
        floor = calibration_floor(scored_images(n, 2)[0], np.random.default_rng(0))
        assert floor == pytest.approx(measured, rel=0.25)


def test_patients_are_the_renormalised_mean_of_log_probabilities():
    merged = join_classes(np.log([[0.9, 0.1], [0.5, 0.5], [1e-12, 1.0]]), np.array([1, 1, 0]))
    odds = np.sqrt(9)
    assert merged[1] == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])
    assert merged[0] == pytest.approx([0, 1], abs=1e-9)


def test_the_risk_coverage_curve_is_that_of_its_area():
    confidence, wrong = np.random.default_rng(0).random(1000).round(2), np.random.default_rng(1).random(1000) < 0.2
    points = risk_coverage_points(confidence, wrong)
    assert [coverage for coverage, _ in points] == [tenth / 10 for tenth in range(1, 11)]
    assert points[-1][1] == pytest.approx(wrong.mean())
    area = risk_coverage_area(confidence, wrong, np.ones((1, 1000)))[0]
    assert np.mean([risk for _, risk in points]) == pytest.approx(area, abs=0.01)
    certain = risk_coverage_points([0.9, 0.8, 0.7, 0.6], [False, False, True, True])
    assert [risk for _, risk in certain][4] == 0 and certain[-1][1] == 0.5


def test_patient_statistics_are_those_of_the_merged_probabilities():
    probabilities, labels = scored_images(40, 3)
    images, patients = np.repeat(probabilities, 3, axis=0), np.repeat([f"p{i}" for i in range(40)], 3)
    ours = evaluate(images, np.repeat(labels, 3), patients)
    alone = evaluate(probabilities, labels)
    assert ours["patient_accuracy"] == pytest.approx(alone["accuracy"])
    assert ours["patient_auroc"] == pytest.approx(alone["auroc"])


def test_intervals_resample_patients_not_images():
    probabilities, labels = scored_images(60, 3)
    patients = [f"p{i}" for i in range(60)]
    alone = evaluate(probabilities, labels, patients, resamples=400)
    repeated = np.repeat(np.arange(60), 10)
    clustered = evaluate(probabilities[repeated], labels[repeated], [patients[i] for i in repeated], resamples=400)
    unaware = evaluate(probabilities[repeated], labels[repeated], resamples=400)
    for name in ("accuracy", "auroc", "nll"):
        assert clustered[f"{name}_ci"] == pytest.approx(alone[f"{name}_ci"])
        assert np.ptp(clustered[f"{name}_ci"]) > 2 * np.ptp(unaware[f"{name}_ci"])


def test_intervals_cover_the_truth_on_clustered_images():
    covered = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        right = np.repeat(rng.random(50) < 0.7, 8) ^ (rng.random(400) < 0.1)
        labels = np.arange(400) % 2
        probabilities = np.eye(2)[np.where(right, labels, 1 - labels)]
        low, high = evaluate(probabilities, labels, np.repeat(range(50), 8), resamples=200)["accuracy_ci"]
        covered += low <= 0.7 * 0.9 + 0.3 * 0.1 <= high
    assert 0.88 <= covered / 150 <= 0.99


def test_the_same_seed_gives_the_same_numbers_in_any_order_of_images():
    probabilities, labels = scored_images(100, 3)
    patients = np.array([f"p{i // 4}" for i in range(100)])
    order = np.random.default_rng(1).permutation(100)
    straight = evaluate(probabilities, labels, patients)
    assert straight == evaluate(probabilities, labels, patients)
    assert straight != evaluate(probabilities, labels, patients, seed=1)
    shuffled = evaluate(probabilities[order], labels[order], patients[order])
    for name in ("accuracy_ci", "auroc_ci", "ece_ci", "aurc_ci"):
        assert shuffled[name] == pytest.approx(straight[name])


def test_small_blocks_give_the_same_numbers(monkeypatch):
    probabilities, labels = scored_images(40, 3)
    whole = evaluate(probabilities, labels)
    monkeypatch.setattr("medsd.evaluation.classification.BLOCK_ELEMENTS", 300)
    cut = evaluate(probabilities, labels)
    for name in ("ece_floor", "auroc", "auroc_ci", "patient_accuracy_ci"):
        assert cut[name] == pytest.approx(whole[name])


def test_metrics_are_json_and_every_missing_number_has_a_reason():
    probabilities, labels = scored_images(30, 4)
    for chosen in (labels, np.minimum(labels, 1), np.zeros_like(labels)):
        for patients in (None, ["one"] * 30, [str(i // 2) for i in range(30)]):
            found = json.loads(json.dumps(evaluate(probabilities, chosen, patients), allow_nan=False))
            assert {name for name, value in found.items() if value is None} == set(found["reasons"])


def test_the_names_are_those_of_the_contract():
    found = evaluate(*scored_images(30, 2))
    statistics = [
        "accuracy",
        "balanced_accuracy",
        "auroc",
        "average_precision",
        "ece",
        "nll",
        "brier",
        "aurc",
    ]
    statistics += ["patient_auroc", "patient_accuracy", "auroc/c0", "auroc/c1"]
    intervals = [f"{name}_ci" for name in statistics]
    assert set(found) == {"n", "ece_floor", "risk_coverage", "reasons", *statistics, *intervals}


def test_an_absent_class_is_named_and_left_out_of_the_mean():
    probabilities, labels = scored_images(80, 3)
    labels = np.where(labels == 1, 2, labels)
    found = evaluate(probabilities, labels)
    assert found["auroc/c1"] is None and found["reasons"]["auroc/c1"] == "No image has the class 'c1'."
    assert found["auroc"] == pytest.approx((found["auroc/c0"] + found["auroc/c2"]) / 2)


def test_one_class_alone_cannot_be_ranked():
    found = evaluate(scored_images(20, 2)[0], np.ones(20, int))
    assert found["auroc"] is found["auroc_ci"] is found["patient_auroc"] is None
    assert found["reasons"]["auroc"] == "Every image has the class 'c1'."
    assert found["accuracy"] is not None


def test_patients_of_several_classes_have_no_patient_numbers():
    probabilities, _ = scored_images(40, 2)
    found = evaluate(probabilities, np.arange(40) % 2, ["mixed"] * 2 + [str(i) for i in range(38)])
    assert found["patient_auroc"] is found["patient_accuracy"] is None
    assert "1 of 39" in found["reasons"]["patient_auroc"]


def test_too_few_patients_have_no_interval():
    probabilities, _ = scored_images(40, 2)
    alone = evaluate(probabilities, np.arange(40) % 2, ["one"] * 40)
    assert alone["accuracy_ci"] is None and "2" in alone["reasons"]["accuracy_ci"]
    rare = evaluate(probabilities, (np.arange(40) == 7).astype(np.uint8))
    assert rare["auroc"] is not None and rare["auroc_ci"] is None and rare["accuracy_ci"] is not None
    assert "Too few patients" in rare["reasons"]["auroc_ci"]


def test_certainty_that_is_wrong_has_a_finite_likelihood():
    found = evaluate([[1.0, 0.0], [0.0, 1.0]], [1, 1])
    assert found["nll"] == pytest.approx(-np.log(1e-12) / 2)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[0.5, 0.6]], [0], "sum to 1"),
        ([[np.nan, 1.0]], [0], "sum to 1"),
        ([[0.5, 0.5]], [2], "class indices"),
        ([[0.5, 0.5]], [-1], "class indices"),
        ([[0.5, 0.5]], [0, 1], "one row per image"),
        (np.zeros((0, 2)), [], "No labelled image"),
        ([[1.0]], [0], "two or more classes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(probabilities, labels, message):
    with pytest.raises(InputError, match=message):
        evaluate(probabilities, labels)


def test_a_thousand_resamples_take_seconds():
    probabilities, labels = scored_images(600, 6)
    begin = time.perf_counter()
    evaluate(probabilities, labels, resamples=1000)
    assert time.perf_counter() - begin < 15
