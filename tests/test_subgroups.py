"""Metrics of subgroups are those of their images alone; where they would mislead there is a reason."""

import numpy as np
import pytest

from medsd.evaluation.subgroups import FEWEST, MEASURES, subgroup_metrics
from medsd.evaluation.tables import class_metrics

NAMES = ["none", "bleed", "fracture"]


def scores(count=120, seed=0):
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    logits = draws.normal(size=(count, 3)) + 1.5 * np.eye(3)[labels]
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True), labels, [str(i // 2) for i in range(count)]


def of(rows, value):
    return next(row for row in rows if row["value"] == value)


def test_a_subgroup_has_the_metrics_of_its_images():
    probabilities, labels, patients = scores()
    sex = ["female" if i % 4 < 2 else "male" for i in range(118)] + [None, None]
    rows = subgroup_metrics(probabilities, labels, NAMES, patients, {"sex": sex, "view": ["axial"] * 120})
    assert [(row["column"], row["value"], row["n"], row["patients"]) for row in rows] == [
        ("sex", "female", 60, 30),
        ("sex", "male", 58, 29),
    ]
    places = [i for i in range(120) if sex[i] == "male"]
    alone = class_metrics(probabilities[places], labels[places], NAMES, [patients[i] for i in places])
    male = of(rows, "male")
    assert all(male[name] == alone[name] and male[f"{name}_ci"] == alone[f"{name}_ci"] for name in MEASURES) and "reason" not in male


def test_answers_are_what_was_answered():
    probabilities, labels, patients = scores()
    columns = {"sex": ["f", "m"] * 60}
    rows = subgroup_metrics(probabilities, labels, NAMES, patients, columns, answers=labels)
    assert {row["balanced_accuracy"] for row in rows} == {1.0} and all(row["auroc"] < 1 for row in rows)


def test_few_images_and_a_missing_class_have_a_reason():
    probabilities, labels, patients = scores()
    age = ["0-9"] * (FEWEST - 1) + ["10-19" if label < 2 else "20-29" for label in labels[FEWEST - 1 :]]
    rows = subgroup_metrics(probabilities, labels, NAMES, patients, {"age_band": age})
    young, middle, old = rows
    assert young["n"] == FEWEST - 1 and young["ece"] is None and "fewer than" in young["reason"]
    assert middle["reason"] == "no image with fracture" and middle["auroc"] is middle["balanced_accuracy_ci"] is None
    assert middle["nll"] > 0 and middle["ece_ci"] is not None, "these need no other class"
    assert old["auroc"] is None and old["reason"].startswith("no image with")


def test_a_class_that_nobody_has_is_not_missed():
    probabilities, labels, patients = scores()
    rows = subgroup_metrics(probabilities, labels % 2, NAMES, patients, {"sex": ["f", "f", "m", "m"] * 30})
    assert all(row["auroc"] is not None for row in rows)


def test_one_patient_has_no_interval_and_a_reason():
    probabilities, labels, patients = scores()
    rows = subgroup_metrics(probabilities, labels, NAMES, ["one"] * 60 + patients[60:], {"scanner": ["GE"] * 60 + ["Siemens"] * 60})
    assert of(rows, "GE")["auroc_ci"] is None and "Only one patient" in of(rows, "GE")["reason"]


def test_images_without_a_label_do_not_count():
    probabilities, labels, patients = scores()
    unknown = np.where(np.arange(120) < 60, -1, labels)
    rows = subgroup_metrics(probabilities, unknown, NAMES, patients, {"sex": ["f"] * 60 + ["m"] * 60})
    assert rows == []
    rows = subgroup_metrics(probabilities, unknown, NAMES, patients, {"sex": ["f", "m"] * 60})
    assert [row["n"] for row in rows] == [30, 30]


@pytest.mark.parametrize("held", [0, 1])
def test_findings(held):
    draws = np.random.default_rng(0)
    labels = (draws.random((120, 2)) < 0.5).astype(int)
    probabilities = np.clip(0.5 + 0.3 * (labels - 0.5) + 0.2 * draws.normal(size=(120, 2)), 0.01, 0.99)
    labels[:60, 1] = held
    patients = [str(i // 2) for i in range(120)]
    rows = subgroup_metrics(probabilities, labels, NAMES[1:], patients, {"view": ["AP"] * 60 + ["PA"] * 60})
    assert of(rows, "PA")["auroc"] == class_metrics(probabilities[60:], labels[60:], NAMES[1:], patients[60:])["auroc"]
    assert of(rows, "AP")["auroc"] is None and of(rows, "AP")["reason"] == f"no image {'without' if held else 'with'} fracture"
