"""Tables of a report, as HTML: numbers with their intervals, and why some are missing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

NAMES = {
    "n": ("Images classified", "of which the classifier's numbers are"),
    "accuracy": ("Accuracy", "share of right answers"),
    "balanced_accuracy": ("Balanced accuracy", "mean share of right answers over classes"),
    "auroc": ("AUROC", "how often an image of the class ranks above one without; 0.5 is chance"),
    "average_precision": ("Average precision", "area under the precision-recall curve"),
    "ece": ("Calibration error", "expected, 15 bins; 0 is best"),
    "ece_floor": ("Calibration error by chance", "what a perfectly calibrated model shows with as many images"),
    "nll": ("Negative log-likelihood", "nats; 0 is best"),
    "brier": ("Brier score", "squared error of the probabilities; 0 is best"),
    "aurc": ("Risk-coverage area", "mean error rate among the more certain images; 0 is best"),
    "patient_auroc": ("AUROC by patient", ""),
    "patient_accuracy": ("Accuracy by patient", ""),
    "series_auroc": ("AUROC by series", ""),
    "series_accuracy": ("Accuracy by series", ""),
    "rows_per_image": ("UNet rows an image", "one image, class and noise each"),
    "seconds_per_image": ("Seconds an image", ""),
    "p_flip": ("Would change with more rows", "mean probability that endless ones put another class first"),
    "fid": ("FID", "Fréchet distance of features; read it beside its floor"),
    "fid_floor": ("FID floor", "between real images of other patients"),
    "kid": ("KID", "kernel distance of features; read it beside its floor"),
    "kid_floor": ("KID floor", "between real images of other patients"),
    "precision_floor": ("Precision floor", "of real images of other patients"),
    "recall_floor": ("Recall floor", "of real images of other patients"),
    "density_floor": ("Density floor", "of real images of other patients"),
    "coverage_floor": ("Coverage floor", "of real images of other patients"),
    "precision": ("Precision", "share of generated images that lie among real ones"),
    "recall": ("Recall", "share of real images that lie among generated ones"),
    "density": ("Density", "how many real neighbourhoods hold a generated image; 1 is as real"),
    "coverage": ("Coverage", "share of real images with a generated neighbour"),
    "extractor": ("Features", "distances of other features do not compare"),
    "n_real": ("Real images", ""),
    "n_generated": ("Generated images", ""),
    "n_floor": ("Real images of the floors", ""),
    "n_training_patients": ("Patients that were trained on", "among those of the real images; with any, the numbers are too good"),
    "psnr": ("PSNR", "of reconstructions, decibels"),
    "ssim": ("SSIM", "of reconstructions; 1 is perfect"),
    "ms_ssim": ("MS-SSIM", "of reconstructions; 1 is perfect"),
    "bits_per_dim": ("Bits per dimension", "upper bound of what an image takes, for each of its numbers"),
    "agreement": ("Agreement", "share of generated images whose class a classifier of real images names"),
    "agreement_of_real": ("Agreement of real images", "the same share of real test images"),
    "similarity_of_generated": ("Similarity of generated images", "MS-SSIM of pairs within a class; higher is less diverse"),
    "similarity_of_real": ("Similarity of real images", "MS-SSIM of pairs of patients within a class"),
    "intensity_distance": ("Distance of intensities", "how far pixels would have to move to have the real histogram"),
    "intensity_unit": ("Unit of intensities", ""),
    "verdict": ("Verdict", "failed where an image is a copy, or more are flagged than chance brings"),
    "copies": ("Copies", "generated images that are a training image"),
    "samples": ("Generated images looked at", ""),
    "training_images": ("Training images", ""),
    "held_out": ("Held-out images", "of other patients, which say how close chance brings an image to the training images"),
    "chance": ("Chance of so many flags", "for a model that copies nothing"),
    "flagged": ("Flagged", "generated images suspiciously near a training image"),
    "flagged_share": ("Share flagged", "read it beside the rate of false alarms"),
    "false_positive_rate": ("Rate of false alarms", "expected of images that are no copies"),
    "membership_auroc": ("Membership AUROC", "how well errors tell training from other images; 0.5 is not at all"),
    "memorization_gap": ("Memorization gap", "how much smaller the error of training images is, as a share"),
}
"""A number's name in `metrics.json` -> how the page calls it, and what it says."""
DASH = "&ndash;"
KINDS = ("synthetic", "real", "both")
"""Of images that others learn from."""


class Notes:
    """Why numbers are missing, each sentence numbered once over the whole page."""

    def __init__(self):
        self.reasons: list[str] = []

    def mark(self, reason: str | None) -> str:
        """A dash, and the number of its note where there is a reason."""
        if not reason:
            return DASH
        if reason not in self.reasons:
            self.reasons.append(reason)
        place = self.reasons.index(reason) + 1
        return f'{DASH}<sup><a href="#note-{place}" title="{escape(reason)}">{place}</a></sup>'

    def html(self) -> str:
        """The sentences, as a list; nothing without any."""
        items = "".join(f'<li id="note-{place}">{escape(reason)}</li>' for place, reason in enumerate(self.reasons, 1))
        return f'<ol class="notes">{items}</ol>' if items else ""


def number(value: Any) -> str:
    """A number as people read it: counts whole, others with about three digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def called(name: str) -> str:
    """How the page calls a number of `metrics.json`."""
    return NAMES[name][0] if name in NAMES else name.replace("_", " ")


def missing(value: Any) -> bool:
    """Whether there is no number to print."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def numbers_table(caption: str, values: Mapping[str, Any], notes: Notes) -> str:
    """Plain values of `metrics.json` or `audit.json`, one a line, with what each says; lists and tables within are passed over.

    What `NAMES` knows comes first, in its order. Empty without a value.
    """
    reasons, plain = _reasons(values), {name: value for name, value in values.items() if _shown(name, value) and "/" not in name}
    order = [name for name in NAMES if name in plain] + [name for name in plain if name not in NAMES]
    bounded = any(f"{name}_ci" in values for name in order)
    rows = []
    for name in order:
        label, meaning = called(name), NAMES.get(name, ("", ""))[1]
        said = f"<small>{escape(meaning)}</small>" if meaning else ""
        cells = _cells(name, values, reasons, notes, bounded)
        rows.append(f'<tr><th scope="row">{escape(label)}{said}</th>{cells}</tr>')
    return table(caption, ["", "value", *(["95 % interval"] if bounded else [])], rows)


def _cells(name: str, values: Mapping[str, Any], reasons: Mapping[str, str], notes: Notes, bounded: bool) -> str:
    """A number and its interval, or words over both columns; the interval's cell is empty where none is meant to be."""
    if isinstance(values[name], str):
        return f'<td class="text" colspan="{1 + bounded}">{escape(values[name])}</td>'
    value = notes.mark(reasons.get(name)) if missing(values[name]) else escape(number(values[name]))
    own = f"{name}_ci"
    bounds = "" if own not in values else interval(values[own]) if values[own] else notes.mark(reasons.get(own))
    return f"<td>{value}</td>" + (f"<td>{bounds}</td>" if bounded else "")


def classes_table(caption: str, values: Mapping[str, Any], class_names: Sequence[str], notes: Notes) -> str:
    """`NAME/CLASS` of `metrics.json`: a line for each class, a column for each name, intervals in brackets. Empty without any."""
    reasons = _reasons(values)
    found = [(stem, own) for stem, _, own in (name.partition("/") for name in values if _shown(name, values[name])) if own]
    stems = list(dict.fromkeys(stem for stem, own in found if own in class_names))
    stems = [name for name in NAMES if name in stems] + [name for name in stems if name not in NAMES]
    rows = []
    for name in (name for name in class_names if name in {own for _, own in found}):
        cells = [_of_class(values, reasons, f"{stem}/{name}", notes) for stem in stems]
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return table(caption, ["class", *map(called, stems)], rows)


def utility_table(caption: str, values: Mapping[str, Any], notes: Notes) -> str:
    """`utility/KIND/NAME` of `metrics.json`: a line for each kind of training images, a column for each name."""
    turned = {_turned(name): value for name, value in values.items() if name.startswith("utility/")}
    turned["reasons"] = {_turned(name): reason for name, reason in _reasons(values).items() if name.startswith("utility/")}
    return classes_table(caption, turned, KINDS, notes)


def _turned(name: str) -> str:
    """`utility/KIND/NAME_ci` -> `NAME/KIND_ci`, as if the kind were a class."""
    _, kind, measure = name.removesuffix("_ci").split("/", 2)
    return f"{measure.replace('/', ' ')}/{kind}" + "_ci" * name.endswith("_ci")


def _of_class(values: Mapping[str, Any], reasons: Mapping[str, str], name: str, notes: Notes) -> str:
    if missing(values.get(name)):
        return notes.mark(reasons.get(name))
    bounds = values.get(f"{name}_ci")
    return escape(number(values[name])) + (f" <small>{interval(bounds)}</small>" if bounds else "")


def facts_table(caption: str, facts: Mapping[str, Any]) -> str:
    """Names and values, as they are; dictionaries within are spread out. Empty without any."""
    rows = [f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(value)}</td></tr>' for name, value in _spread(facts)]
    return table(caption, [], rows)


def _spread(facts: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _spread(value, f"{before}{name}: ")
        else:
            yield f"{before}{name}", "none" if value is None else number(value)


def interval(bounds: Sequence[float]) -> str:
    """`[low, high]`."""
    return f"[{number(bounds[0])}, {number(bounds[1])}]"


def table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls within its own box; empty without rows."""
    if not rows:
        return ""
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    body = f"<table><caption>{escape(caption)}</caption>{top}<tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">{body}</div>'


def _shown(name: str, value: Any) -> bool:
    return not name.endswith("_ci") and (value is None or isinstance(value, bool | int | float | str)) and name != "risk_coverage"


def _reasons(values: Mapping[str, Any]) -> Mapping[str, str]:
    return values.get("reasons") or {}
