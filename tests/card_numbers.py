"""What the tables of a model card should say, from the records alone."""

import re

CLASSIFICATION = {
    "AUROC": "auroc",
    "balanced accuracy": "balanced_accuracy",
    "accuracy": "accuracy",
    "average precision": "average_precision",
    "negative log-likelihood, nats": "nll",
    "Brier score": "brier",
    "risk-coverage area": "aurc",
    "AUROC by patient": "patient_auroc",
    "accuracy by patient": "patient_accuracy",
}
CALIBRATION = {"expected calibration error, 15 bins": "ece", "the same of a perfectly calibrated model, as many images": "ece_floor"}
GENERATED = {"FID": "fid", "KID": "kid", "precision": "precision", "recall": "recall", "density": "density", "coverage": "coverage"}
RECONSTRUCTION = {"PSNR, decibels": "psnr", "SSIM": "ssim", "MS-SSIM": "ms_ssim"}
BY_CLASS = ("auroc", "fid", "fid_floor", "kid", "precision", "recall")
BY_SUBGROUP = ("auroc", "balanced_accuracy", "ece", "nll")


def printed(values, name):
    """A number and its interval, as a card says them."""
    if values.get(name) is None:
        return ""
    value = values[name]
    low_high = values.get(f"{name}_ci")
    return (str(value) if isinstance(value, int) else f"{value:.3f}") + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")


def floor(metrics, name):
    return f"{metrics[f'{name}_floor']:.3f}" if metrics.get(f"{name}_floor") is not None else ""


def tables(card):
    """Section -> rows of cells, without the head."""
    found = {}
    for section in re.split(r"^## ", card, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        if rows:
            found[section.splitlines()[0]] = rows[2:]
    return found


def expected_tables(metrics, classes, kind="pipeline"):
    """The same, as the records have it."""

    def listed(names):
        return [[label, printed(metrics, name)] for label, name in names.items() if metrics.get(name) is not None]

    found = {"Reconstruction": listed(RECONSTRUCTION)}
    if kind != "autoencoder":
        found = {"Classification": listed(CLASSIFICATION), "Calibration": listed(CALIBRATION)} | found
        found["Generated against real images"] = [[*row, floor(metrics, GENERATED[row[0]])] for row in listed(GENERATED)]
        stems = [stem for stem in BY_CLASS if any(f"{stem}/{name}" in metrics for name in classes)]
        found["By class"] = [[name, *(printed(metrics, f"{stem}/{name}") for stem in stems)] for name in classes] if stems else []
        found["By subgroup"] = [
            [row["column"], str(row["value"]), str(row["n"]), str(row["patients"]), *(printed(row, name) for name in BY_SUBGROUP)]
            for row in metrics.get("subgroups") or ()
        ]
    return {section: rows for section, rows in found.items() if rows}


def assert_data(card, summary):
    """The table of the data is what `summary.json` counted."""
    splits = ("train", "validation", "test")
    names = list(summary["classes"]["train"])
    counted = [[name, *(str(summary["classes"][split][name]) for split in splits)] for name in names]
    counted += [[what, *(str(summary[what][split]) for split in splits)] for what in ("images", "patients")]
    assert tables(card)["Data"] == counted
    assert all(f"{rule} ({count} images)" in card for rule, count in summary["patient_rule"].items())


def assert_numbers(card, metrics, audit, classes, kind="pipeline"):
    """Each number of the card's tables, front matter and audit is the one in the records."""
    of_records, others = expected_tables(metrics, classes, kind), {"Data", "Training"}
    assert {section: rows for section, rows in tables(card).items() if section not in others} == of_records
    if audit is not None:
        said = card.split("## Copies of training images")[1]
        for name in ("samples", "training_images", "held_out", "flagged", "copies"):
            assert re.search(rf"\b{audit[name]} ", said), name
        assert f"AUROC {printed(audit, 'membership_auroc')}" in said and f"Audit {audit['verdict']}" in said
