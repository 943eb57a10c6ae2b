"""Which figures a report's material gives, and what each says to who cannot see it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsd.evaluation.curves import confusion_counts
from medsd.report import figures, pictures
from medsd.report.embed import embed
from medsd.report.material import Material
from medsd.report.tables import called, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 1000
"""Real and generated images each that an embedding shows."""


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    name: str
    """Of its file, `figures/NAME.png`."""
    draw: Callable[[], "Figure"]
    alt: str
    """What it shows, with its main number."""
    caption: str
    picture: bool = False
    """Whether it is made of images."""


def training(material: Material) -> Iterator[Chart]:
    """Loss curves."""
    steps, losses = figures.logged(material.curves, "loss")
    if not len(losses):
        return
    alt = f"Training loss from {number(losses[0])} at step {steps[0]:.0f} to {number(losses[-1])} at step {steps[-1]:.0f}"
    names = dict.fromkeys(name for line in material.curves for name in line if name.startswith(figures.HELD_OUT))
    for name in names:
        values = figures.logged(material.curves, name)[1]
        alt += f"; {name.replace('_', ' ')} {number(values[-1])} at the end" if len(values) else ""
    caption = "Loss of the training and of held-out images. They are weighted in other ways, so compare each curve with itself."
    yield Chart("loss", partial(figures.loss_curves, material.curves), f"{alt}.", caption)


def grids(material: Material) -> Iterator[Chart]:
    """Images by class."""
    for kind, images in material.grids.items():
        if images.size:
            said = f"{images.shape[1]} {kind} images of each of {len(images)} classes"
            draw = partial(pictures.image_grid, images, material.class_names, kind.capitalize())
            yield Chart(_file_name(kind), draw, f"{said}: {', '.join(material.class_names)}.", f"{said.capitalize()}.", picture=True)


def denoising(material: Material) -> Iterator[Chart]:
    """From noise to image."""
    if material.denoising is not None and material.denoising.size:
        alt = f"{material.denoising.shape[1]} steps from noise to an image of each of {', '.join(material.class_names)}."
        caption = "One image of each class on its way out of noise."
        yield Chart("denoising", partial(pictures.denoising_strip, material.denoising, material.class_names), alt, caption, picture=True)


def features(material: Material) -> Iterator[Chart]:
    """Real and generated images in two dimensions."""
    if not {"real", "generated"} <= material.features.keys():
        return
    chosen = [_at_most(*material.features[kind]) for kind in ("real", "generated")]
    counts = [len(labels) for _, labels in chosen]
    if min(counts) == 0:
        return
    places, method = embed(np.concatenate([values for values, _ in chosen]))
    (_, labels), (_, other) = chosen
    draw = partial(figures.embedding, places[: counts[0]], labels, places[counts[0] :], other, material.class_names, method)
    alt = f"{method} of the features of {counts[0]} real and {counts[1]} generated images, coloured by class."
    caption = f"{method} of both together. Where crosses lie apart from dots of their colour, generated images differ from real ones."
    yield Chart("embedding", draw, alt, caption)


def _at_most(values: NDArray, labels: NDArray) -> tuple[NDArray, NDArray]:
    """Evenly chosen, no more than `MOST_POINTS`."""
    chosen = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), MOST_POINTS)).round().astype(int))
    return values[chosen], labels[chosen]


def ranking(material: Material) -> Iterator[Chart]:
    """ROC, reliability, risk and coverage, confusion."""
    names, metrics = material.class_names, material.metrics
    if material.probabilities is not None and material.labels is not None and (material.labels >= 0).any():
        yield from _of_probabilities(material, material.probabilities, material.labels)
    if points := metrics.get("risk_coverage"):
        half = min(points, key=lambda point: abs(point[0] - 0.5))
        alt = f"Error rate {number(points[-1][1])} of all images, {number(half[1])} of the most certain {half[0]:.0%}."
        caption = "Error rate if only the images with the most certain answers are answered and the others go to a reader."
        yield Chart("risk_coverage", partial(figures.risk_coverage, points), alt, caption)
    answers = _answers(material)
    if answers is not None and material.labels is not None and (material.labels >= 0).any():
        counts = confusion_counts(material.labels, answers, len(names))
        right, worst = np.trace(counts), counts - np.diag(np.diag(counts))
        row, column = np.unravel_index(worst.argmax(), worst.shape)
        alt = f"{right} of {counts.sum()} images are answered rightly"
        alt += f"; the most frequent mistake is {names[column]} for {names[row]}, {worst.max()} images." if worst.max() else "."
        caption = "Share of each true class (row) that was answered as each class, and images in brackets."
        yield Chart("confusion", partial(figures.confusion, material.labels, answers, names), alt, caption)


def _of_probabilities(material: Material, probabilities: NDArray, labels: NDArray) -> Iterator[Chart]:
    names = material.class_names
    areas = {name: figures.area(scores, truth) for name, scores, truth in figures.ranked(probabilities, labels, names)}
    if areas:
        alt = "ROC curves. Area: " + ", ".join(f"{name} {area:.3f}" for name, area in areas.items()) + "."
        kind = "finding" if labels.ndim == 2 else "class against the rest"
        caption = f"One curve for each {kind}, with the area under it." if len(areas) > 1 else "With the area under the curve."
        yield Chart("roc", partial(figures.roc_curves, probabilities, labels, names), alt, caption)
    error, floor = (material.metrics.get(name) for name in ("ece", "ece_floor"))
    alt = "Share of right answers against confidence, in 15 bins"
    alt += f"; expected calibration error {number(error)}, {number(floor)} by chance alone." if error is not None else "."
    caption = "On the dotted line a probability means what it says. Bars: 95 % intervals, as if images were independent."
    yield Chart("reliability", partial(figures.reliability, probabilities, labels, names), alt, caption)


def _answers(material: Material) -> NDArray | None:
    """Class indices; None of findings, where no single class is answered."""
    if material.labels is not None and material.labels.ndim == 2:
        return None
    if material.predictions is not None or material.probabilities is None:
        return material.predictions
    return material.probabilities.argmax(1)


def evidence(material: Material) -> Iterator[Chart]:
    """Where images speak for their class."""
    if material.evidence:
        said = "; ".join(filter(None, (caption for _, caption in material.evidence)))
        alt = f"{len(material.evidence)} images under a map of what speaks for and against a class" + (f": {said}" if said else "")
        caption = "Red speaks for the first class, blue for the other: the log-odds of the two, shared out over pixels."
        yield Chart("evidence", partial(pictures.evidence_maps, material.evidence), f"{alt}.", caption, picture=True)


def data_size(material: Material) -> Iterator[Chart]:
    """What more patients bring."""
    metric = next(
        (name for name in ("auroc", "accuracy", "bits_per_dim") if any(row.get(name) not in (None, "") for row in material.sweep)), None
    )
    if metric is None:
        return
    rows = [row for row in material.sweep if row.get(metric) not in (None, "")]
    first, last = (choose(rows, key=lambda row: float(row["patients"])) for choose in (min, max))
    alt = f"{called(metric)} against the number of training patients: {number(float(first[metric]))} with {float(first['patients']):g}"
    alt += f", {number(float(last[metric]))} with {float(last['patients']):g}."
    caption = "Each dot is one training, with its 95 % interval; lines join the means over seeds, with that of seeds and patients together."
    yield Chart("data_size", partial(figures.data_size, material.sweep, metric), alt, caption)


def audit(material: Material) -> Iterator[Chart]:
    """Whether training images are copied."""
    if material.audit_scores is not None:
        samples, held_out, threshold = material.audit_scores
        quantity = (material.audit or {}).get("quantity", "distance to the nearest training image")
        alt = f"{quantity.capitalize()}: median {number(np.median(samples))} of {len(samples)} generated images, "
        alt += f"{number(np.median(held_out))} of {len(held_out)} held-out real ones; threshold {number(threshold)}."
        caption = "Further left is nearer to training images. A model that copies brings generated images nearer than held-out real ones."
        yield Chart("audit_distances", partial(figures.audit_distances, *material.audit_scores, quantity), alt, caption)
    if material.audit_pairs is not None and len(material.audit_pairs[0]):
        alt = f"{len(material.audit_pairs[0])} generated images beside their nearest training images: "
        alt += "; ".join(material.audit_pairs[2])
        caption = "The generated images that come nearest to a training image, and that image."
        yield Chart("audit_pairs", partial(pictures.audit_pairs, *material.audit_pairs), f"{alt}.", caption, picture=True)


def subgroups(material: Material) -> Iterator[Chart]:
    """Numbers of parts of the test images."""
    if not material.subgroups:
        return
    told = [row for row in material.subgroups if row["metric"] is not None]
    alt = f"AUROC of {len(material.subgroups)} subgroups"
    if told:
        low, high = (choose(told, key=lambda row: row["metric"]) for choose in (min, max))
        alt += f", from {number(low['metric'])} ({_group(low)}) to {number(high['metric'])} ({_group(high)})"
    caption = "95 % intervals by patient. Wide ones are of few images: they neither show a difference nor rule one out."
    yield Chart("subgroups", partial(figures.subgroups, material.subgroups), f"{alt}.", caption)


def _group(row: dict[str, Any]) -> str:
    return f"{row['column']} {row['value']}"


def intensities(material: Material) -> Iterator[Chart]:
    """Histograms of pixel values."""
    if material.histograms is not None:
        centres, real, generated, unit = material.histograms
        means = [float(np.average(centres, weights=shares)) for shares in (real, generated)]
        alt = f"Shares of pixel values; mean {number(means[0])} {unit} of real and {number(means[1])} {unit} of generated images."
        draw = partial(figures.histograms, centres, real, generated, unit)
        yield Chart("histograms", draw, alt, "How often each value is seen, on a logarithmic scale.")


def _file_name(kind: str) -> str:
    return re.sub(r"\W+", "_", kind)
