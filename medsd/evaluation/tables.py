"""Metrics of a table of scores: by image and by group, of classes or of findings."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.classification import SMALLEST_PROBABILITY, Floats, classification_metrics
from medsd.evaluation.findings import findings_metrics
from medsd.evaluation.groups import any_findings, common_labels, join_classes, join_findings

NAMES = ("accuracy", "balanced_accuracy", "auroc", "average_precision", "ece", "nll", "brier", "aurc", "patient_accuracy", "patient_auroc")


def class_metrics(
    probabilities: Floats, labels: NDArray, names: Sequence[str], patients: Sequence[str], answers: NDArray | None = None
) -> dict[str, Any]:
    """`classification_metrics` of labels `(N,)` or `findings_metrics` of `(N, K)`, over the images with a label; nulls without any.

    `answers`, of the labels' shape, are what was answered; default what the probabilities say.
    """
    findings = labels.ndim == 2
    known = np.flatnonzero((labels >= 0).any(1) if findings else labels >= 0)
    if not len(known):
        missing = [*NAMES, *(f"{name}_ci" for name in NAMES), "ece_floor", "risk_coverage"]
        return {"n": 0, **dict.fromkeys(missing), "reasons": dict.fromkeys(missing, "No image has a label.")}
    measure = findings_metrics if findings else classification_metrics
    said = None if answers is None else answers[known]
    metrics = measure(probabilities[known], labels[known], names, [patients[index] for index in known], answers=said)
    if findings:
        only = ("patient_accuracy", "patient_auroc")
        metrics |= dict.fromkeys([*only, *(f"{name}_ci" for name in only)])
        metrics["reasons"] |= dict.fromkeys(
            [*only, *(f"{name}_ci" for name in only)], "Findings are joined by patient with --group_by patient."
        )
    return metrics


def group_columns(
    unit: str,
    groups: Sequence[str],
    patients: Sequence[str],
    probabilities: Floats,
    labels: NDArray,
    names: Sequence[str],
    temperature: float | None,
    rule: str,
    prior: Floats | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns with a row per group (`patient` or `series`), and `UNIT_auroc`, `UNIT_accuracy` with their intervals.

    `groups` and `patients` name those of each image; intervals are by patient, also where a patient has several series.
    Classes: `join_classes` with this temperature, None for the mean, of probabilities under `prior` (default uniform). Findings `(N, K)`:
    `join_findings` by this rule; a group has a finding where one of its images has it.
    """
    ids, first, group_of = np.unique(np.asarray(groups, str), return_index=True, return_inverse=True)
    if labels.ndim == 2:
        joined = join_findings(probabilities, group_of, rule)
        of_group = any_findings(labels, group_of)
    else:
        logits = np.log(np.clip(probabilities, SMALLEST_PROBABILITY, None)) - (0 if prior is None else np.log(prior))
        joined = join_classes(logits, group_of, temperature, prior)
        of_group = common_labels(labels, group_of)
    metrics = class_metrics(joined, of_group, names, [patients[image] for image in first])
    mixed = len(set(group_of[labels >= 0])) - (of_group >= 0).sum() if labels.ndim == 1 else 0
    found: dict[str, Any] = {"reasons": {}}
    for name in ("auroc", "auroc_ci", "accuracy", "accuracy_ci"):
        found[f"{unit}_{name}"] = None if mixed else metrics[name]
        if mixed:
            found["reasons"][f"{unit}_{name}"] = (
                f"{mixed} of {len(ids)} {unit} groups have images of several classes: one class a group is needed."
            )
        elif metrics[name] is None:
            found["reasons"][f"{unit}_{name}"] = metrics["reasons"][name]
    columns = {f"{unit}_id": ids, "images": np.bincount(group_of)}
    columns |= {f"prob/{name}": column for name, column in zip(names, joined.T, strict=True)}
    return columns, found


def with_groups(metrics: dict[str, Any], joined: dict[str, Any]) -> dict[str, Any]:
    """Metrics of images, and those of groups in the place of what stood for them."""
    reasons = {name: reason for name, reason in metrics["reasons"].items() if name not in joined}
    return metrics | joined | {"reasons": reasons | joined["reasons"]}
