"""Metrics of findings against scikit-learn, and images joined by patient or series."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, log_loss, roc_auc_score

from medsd.errors import InputError
from medsd.evaluation.findings import findings_metrics
from medsd.evaluation.groups import any_findings, common_labels, join_classes, join_findings
from medsd.evaluation.tables import class_metrics, group_columns

NAMES = ["effusion", "nodule", "mass"]


def told(images=400, seed=0):
    """Calibrated probabilities of three findings, and labels drawn from them."""
    generator = np.random.default_rng(seed)
    probabilities = 1 / (1 + np.exp(-2 * generator.standard_normal((images, 3))))
    return probabilities, (generator.random((images, 3)) < probabilities).astype(int)


def measured(probabilities, labels, patients=None, **options):
    patients = [str(number) for number in range(len(labels))] if patients is None else patients
    return findings_metrics(probabilities, labels, NAMES, patients, **({"resamples": 100} | options))


def test_each_finding_is_ranked_as_scikit_learn_does():
    probabilities, labels = told()
    metrics = measured(probabilities, labels)
    areas = roc_auc_score(labels, probabilities, average=None)
    precisions = average_precision_score(labels, probabilities, average=None)
    for index, name in enumerate(NAMES):
        assert metrics[f"auroc/{name}"] == pytest.approx(areas[index])
        assert metrics[f"average_precision/{name}"] == pytest.approx(precisions[index])
    assert metrics["auroc"] == pytest.approx(areas.mean()) and metrics["average_precision"] == pytest.approx(precisions.mean())
    low, high = metrics["auroc_ci"]
    assert low < metrics["auroc"] < high


def test_cells_are_questions_of_two_answers():
    probabilities, labels = told()
    metrics, said = measured(probabilities, labels), probabilities > 0.5
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, said))
    balanced = [balanced_accuracy_score(labels[:, f], said[:, f]) for f in range(3)]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(balanced))
    assert metrics["nll"] == pytest.approx(log_loss(labels.ravel(), probabilities.ravel()))
    assert metrics["brier"] == pytest.approx(((probabilities - labels) ** 2).mean())
    assert metrics["ece"] < 2.5 * metrics["ece_floor"] and metrics["risk_coverage"][-1][1] == pytest.approx((said != labels).mean())


def test_what_is_not_known_counts_nothing():
    probabilities, labels = told()
    hidden = labels.copy()
    hidden[::2, 0] = -1
    metrics = measured(probabilities, hidden)
    assert metrics["auroc/effusion"] == pytest.approx(roc_auc_score(labels[1::2, 0], probabilities[1::2, 0]))
    known = hidden >= 0
    assert metrics["nll"] == pytest.approx(log_loss(labels[known], probabilities[known]))
    labels[:, 2] = 0
    alone = measured(probabilities, labels)
    assert alone["auroc/mass"] is None and alone["reasons"]["auroc/mass"]
    assert alone["auroc"] == pytest.approx(np.mean([alone["auroc/effusion"], alone["auroc/nodule"]]))


def test_accuracy_is_of_the_answers():
    probabilities, labels = told(50)
    answers = 1 - (probabilities > 0.5)
    said, opposite = measured(probabilities, labels), measured(probabilities, labels, answers=answers)
    assert said["balanced_accuracy"] == pytest.approx(1 - opposite["balanced_accuracy"]) and said["ece"] == opposite["ece"]
    unknown = np.concatenate([labels, np.full((50, 3), -1)])
    patients = [f"p{number}" for number in range(100)]
    both = findings_metrics(np.concatenate([probabilities, probabilities]), unknown, NAMES, patients, resamples=10)
    assert both["accuracy"] == pytest.approx(said["accuracy"]), "an image of which nothing is known is no right one"


def test_what_does_not_fit_together_is_refused():
    probabilities, labels = told(10)
    for wrong in (
        (probabilities[:, :2], labels),
        (probabilities + 1, labels),
        (probabilities, labels + 1),
        (probabilities, -np.ones_like(labels)),
    ):
        with pytest.raises(InputError):
            measured(*wrong)


def test_metrics_without_labels_are_nulls_with_a_reason():
    for labels in (np.full(4, -1), np.full((4, 3), -1)):
        metrics = class_metrics(np.full((4, 3), 1 / 3), labels, NAMES, list("abcd"))
        assert metrics["n"] == 0 and metrics["auroc"] is None and metrics["reasons"]["auroc"] == "No image has a label."


def test_independent_images_add_up_and_copies_do_not():
    prior, odds = np.array([0.9, 0.1]), np.log([[0.2, 0.8]] * 4)
    group_of = np.zeros(4, int)
    copies = join_classes(odds, group_of, None, prior)
    np.testing.assert_allclose(copies, [[0.9 * 0.2 / 0.26, 0.1 * 0.8 / 0.26]])
    np.testing.assert_allclose(join_classes(odds, group_of, 4.0, prior), copies)
    together = join_classes(odds, group_of, 1.0, prior)
    np.testing.assert_allclose(together[0, 1] / together[0, 0], 4**4 * 0.1 / 0.9)


def test_groups_of_findings():
    probabilities, group_of = np.array([[0.2, 0.9], [0.6, 0.1], [0.3, 0.3]]), np.array([0, 0, 1])
    np.testing.assert_allclose(join_findings(probabilities, group_of, "max"), [[0.6, 0.9], [0.3, 0.3]])
    np.testing.assert_allclose(join_findings(probabilities, group_of, "mean"), [[0.4, 0.5], [0.3, 0.3]])
    assert any_findings(np.array([[0, -1], [1, -1], [0, 1]]), group_of).tolist() == [[1, -1], [0, 1]]
    assert common_labels(np.array([2, 2, -1, 1, 0]), np.array([0, 0, 1, 2, 2])).tolist() == [2, -1, -1]


def test_a_table_of_patients():
    generator = np.random.default_rng(0)
    of_patient = generator.integers(0, 2, 60)
    labels, patients = np.repeat(of_patient, 4), np.repeat([f"p{number:02d}" for number in range(60)], 4)
    logits = generator.normal(size=240) + 0.7 * (2 * labels - 1)
    probabilities = np.stack([1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))], 1)
    table, metrics = group_columns("patient", patients, patients, probabilities, labels, ["no", "yes"], 1.0, "mean")
    assert table["images"].tolist() == [4] * 60 and len(table["prob/yes"]) == 60
    assert metrics["patient_auroc"] > roc_auc_score(labels, logits) + 0.05 and metrics["patient_auroc_ci"][0] < metrics["patient_auroc"]
    labels[0] = 1 - labels[0]
    _, mixed = group_columns("series", patients, patients, probabilities, labels, ["no", "yes"], 1.0, "mean")
    assert mixed["series_auroc"] is None and "1 of 60" in mixed["reasons"]["series_auroc"]


def test_series_of_a_patient_do_not_narrow_the_intervals():
    """Twelve patients, each with twenty series that say the same."""
    patients = np.repeat([f"p{number}" for number in range(12)], 20)
    series = [f"s{number}" for number in range(240)]
    labels = np.repeat(np.arange(12) % 2, 20)
    wrong = np.repeat(np.arange(12) < 3, 20)
    probabilities = np.where((labels[:, None] == np.arange(2)) ^ wrong[:, None], 0.9, 0.1)
    _, by_series = group_columns("series", series, patients.tolist(), probabilities, labels, ["no", "yes"], 1.0, "mean")
    _, by_patient = group_columns("patient", patients.tolist(), patients.tolist(), probabilities, labels, ["no", "yes"], 1.0, "mean")
    width = np.diff(by_series["series_accuracy_ci"])
    assert width > 0.3 and width == pytest.approx(np.diff(by_patient["patient_accuracy_ci"]), abs=0.1)
