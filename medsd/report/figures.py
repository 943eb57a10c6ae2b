"""Figures of numbers: each a function of arrays that gives a matplotlib figure, in the `medsd.report.style.theme` it is called in.

Labels `(N,)` are class indices, labels `(N, F)` hold 1, 0 or -1 (not known) for F findings; -1 is always left out. Figures of images
are in `medsd.report.pictures`.
"""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medsd.evaluation.classification import auroc
from medsd.evaluation.curves import calibration_bins, confusion_counts, roc_points, wilson_interval
from medsd.evaluation.repeats import mean_of_seeds
from medsd.report.style import SMALL, WIDTH, axes_of, canvas, ink, log_axis, readable, series
from medsd.report.tables import called

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT = ("validation_", "test_", "train_")
SMOOTHED_FROM = 50
"""Logged losses from which on their running median is drawn over them."""
LEGEND_INSIDE = 7
CELLS_WITH_TEXT = 12
MARKERS = (("o", "x"), ("s", "+"), ("^", "1"))
"""Real and generated, for each turn of the palette."""


def loss_curves(lines: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training and held-out loss against the step; below, each other number of held-out images in a panel of its own.

    `lines` of `metrics.jsonl`: `step`, and `loss`, `validation_loss`, `validation_auroc`, ... where they were logged.
    """
    measures = [name for name in dict.fromkeys(key for line in lines for key in line) if name.startswith(HELD_OUT)]
    others = [name for name in measures if not name.endswith("_loss")]
    figure = canvas(3.0 + 1.5 * len(others))
    panels = figure.subplots(1 + len(others), 1, sharex=True, squeeze=False, height_ratios=[2] + [1] * len(others))[:, 0]
    panels[0].set_title("Loss")
    _curve(panels[0], *logged(lines, "loss"), 0, "training")
    for place, name in enumerate([name for name in measures if name not in others], 1):
        _curve(panels[0], *logged(lines, name), place, name.replace("_", " "), marker="o")
    log_axis(panels[0].yaxis)
    panels[0].legend()
    for place, (axes, name) in enumerate(zip(panels[1:], others, strict=True), 1):
        split, measure = name.split("_", 1)
        axes.set_title(f"{called(measure)}, {split} images")
        _curve(axes, *logged(lines, name), place, "", marker="o")
    panels[-1].set_xlabel("step")
    return figure


def logged(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[NDArray, NDArray]:
    """Steps and values at which `name` was logged as a number."""
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return tuple(np.array(points, float).reshape(-1, 2).T)


def _curve(axes: "Axes", steps: NDArray, values: NDArray, place: int, label: str, marker: str | None = None) -> None:
    """A line, and over a long one its running median."""
    from scipy.ndimage import median_filter

    colour = series(place + 1)[place]["color"]
    if len(values) <= SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9)
    axes.plot(steps, median_filter(values, max(3, len(values) // 25), mode="nearest"), color=colour, label=label)


def roc_curves(probabilities: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> "Figure":
    """True against false positive rate, one class or finding against the rest, with the area; of two classes, of the second."""
    figure, axes = axes_of(4.4, "ROC")
    axes.plot([0, 1], [0, 1], color=ink("muted"), linestyle=":", linewidth=1.2)
    questions = list(ranked(probabilities, labels, names))
    for style, (name, scores, positive) in zip(series(len(questions)), questions, strict=True):
        axes.plot(*roc_points(scores, positive), label=f"{name} {area(scores, positive):.3f}", **style)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal")
    _legend(figure, axes, len(questions), "lower right")
    return figure


def ranked(probabilities: ArrayLike, labels: ArrayLike, names: Sequence[str]) -> Iterator[tuple[str, NDArray, NDArray]]:
    """Name, scores and truth `(n,)` of each question that images answer both ways."""
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    several = labels.ndim == 2 or len(names) > 2
    for place in range(len(names)) if several else [1]:
        own = labels[:, place] if labels.ndim == 2 else labels
        known = own >= 0
        positive = own[known] == (1 if labels.ndim == 2 else place)
        if 0 < positive.sum() < len(positive):
            yield names[place], probabilities[known, place], positive


def area(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve."""
    return float(auroc(scores, positive, np.ones((1, len(np.asarray(scores)))))[0])


def _legend(figure: "Figure", axes: "Axes", count: int, place: str) -> None:
    """Inside at a `place`, or below where there are many."""
    if count <= LEGEND_INSIDE:
        axes.legend(loc=place)
    else:
        figure.legend(loc="outside lower center", ncols=2)


def reliability(probabilities: ArrayLike, labels: ArrayLike, names: Sequence[str] = ()) -> "Figure":
    """How often answers of each confidence are right, in 15 bins with 95 % intervals of independent images, and how many they are.

    Of classes `(N,)`, the most probable one; of findings `(N, F)`, how often each of `names` holds against its probability.
    """
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    figure = canvas(4.8)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.set_title("Reliability")
    above.plot([0, 1], [0, 1], color=ink("muted"), linestyle=":", linewidth=1.2, label="perfect")
    if labels.ndim == 2:
        for style, name, scores, own in zip(series(len(names)), names, probabilities.T, labels.T, strict=True):
            _, said, share = calibration_bins(scores[own >= 0], own[own >= 0] == 1)
            above.plot(said, share, marker="o", markersize=4, label=name, **style)
        counts = calibration_bins(probabilities[labels >= 0], labels[labels >= 0])[0]
    else:
        known = labels >= 0
        counts = _answered(above, probabilities[known].max(1), probabilities[known].argmax(1) == labels[known])
    width = 1 / len(counts)
    below.bar((np.arange(len(counts)) + 0.5) * width, counts, 0.85 * width, color=series(1)[0]["color"])
    said = ("how often it holds", "finding's probability") if labels.ndim == 2 else ("share right", "confidence")
    above.set(ylabel=said[0], xlim=(0, 1.02), ylim=(-0.02, 1.02))
    below.set(xlabel=said[1], ylabel="answers" if labels.ndim == 2 else "images")
    _legend(figure, above, len(names) if labels.ndim == 2 else 1, "upper left")
    return figure


def _answered(axes: "Axes", confidence: NDArray, right: NDArray) -> NDArray:
    """Points of the bins that hold images, with bars; the counts of all bins."""
    counts, said, share = calibration_bins(confidence, right)
    full = counts > 0
    low, high = wilson_interval(share[full] * counts[full], counts[full])
    bars = np.clip([share[full] - low, high - share[full]], 0, None)
    axes.errorbar(said[full], share[full], bars, fmt="o", markersize=5, elinewidth=1.2, color=series(1)[0]["color"], label="images")
    return counts


def risk_coverage(points: Sequence[Sequence[float]]) -> "Figure":
    """Error rate among the most confident share of images; `points` `[coverage, error rate]` of `metrics.json`."""
    coverage, risk = np.asarray(points, np.float64).T
    figure, axes = axes_of(3.4, "Errors when the least certain are refused")
    axes.plot(coverage, risk, marker="o", markersize=4)
    axes.set(xlabel="share of images answered", ylabel="error rate", xlim=(0, 1.02), ylim=(0, max(1.05 * risk.max(), 0.01)))
    return figure


def confusion(labels: ArrayLike, predictions: ArrayLike, names: Sequence[str]) -> "Figure":
    """Images of each class (row) answered as each class (column): the share of the row as colour and per cent, the count in brackets."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = confusion_counts(labels, predictions, len(names))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = axes_of(WIDTH, "Confusion")
    colours = LinearSegmentedColormap.from_list("share", [ink("paper"), series(1)[0]["color"]])
    axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.set(xlabel="answered", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for row, column in np.ndindex(counts.shape) if len(names) <= CELLS_WITH_TEXT else ():
        text = f"{100 * shares[row, column]:.0f} %\n({counts[row, column]})" if len(names) <= LEGEND_INSIDE else f"{counts[row, column]}"
        colour = readable(colours(shares[row, column])) if counts[row, column] else ink("muted")
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
    return figure


def data_size(table: Sequence[Mapping[str, Any]], metric: str = "auroc") -> "Figure":
    """A metric against the number of training patients: each run with its interval, a line per model through the means of its seeds.

    The band is the 95 % interval of these means, of seeds and patients together.

    Rows hold `model`, `patients` and, as numbers or empty, `METRIC`, `METRIC_low`, `METRIC_high`; rows without the metric are left out.
    """
    rows = [row for row in table if _number(row.get(metric)) is not None]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = axes_of(3.8, f"{called(metric)} by training patients")
    for place, (model, style) in enumerate(zip(models, series(len(models)), strict=True)):
        own = sorted((float(row["patients"]), float(row[metric]), *_bounds(row, metric)) for row in rows if row["model"] == model)
        patients, value, low, high = np.array(own).T
        beside = patients * 1.03 ** (place - (len(models) - 1) / 2)
        bars = [value - low, high - value]
        axes.errorbar(beside, value, bars, fmt="o", markersize=4, elinewidth=1, alpha=0.7, color=style["color"])
        sizes = np.unique(patients)
        means = [mean_of_seeds(*(column[patients == size] for column in (value, low, high))) for size in sizes]
        axes.plot(sizes, [mean for mean, _, _ in means], label=str(model), **style)
        axes.fill_between(sizes, *np.array(means).T[1:], color=style["color"], alpha=0.15, linewidth=0)
    sizes = sorted({float(row["patients"]) for row in rows})
    log_axis(axes.xaxis)
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set(xlabel="training patients", ylabel=called(metric))
    axes.legend()
    return figure


def _bounds(row: Mapping[str, Any], metric: str) -> tuple[float, float]:
    """The interval, or the value itself where there is none."""
    value = float(row[metric])
    low, high = (_number(row.get(f"{metric}_{side}")) for side in ("low", "high"))
    return (value, value) if low is None or high is None else (min(low, value), max(high, value))


def _number(value: Any) -> float | None:
    """Also of a CSV's text; None of an empty field and of what is not finite."""
    return float(value) if value not in (None, "") and np.isfinite(float(value)) else None


def audit_distances(samples: ArrayLike, held_out: ArrayLike, threshold: float, quantity: str = "distance to the nearest") -> "Figure":
    """How near generated images `(M,)` and held-out real ones `(N,)` come to training images; below the threshold one is flagged."""
    figure, axes = axes_of(3.4, "Nearest training image")
    samples, held_out = np.asarray(samples, float), np.asarray(held_out, float)
    bins = np.histogram_bin_edges(np.concatenate([samples, held_out, [threshold]]), 40)
    for values, name, style in zip((held_out, samples), ("held-out, real", "generated"), series(2), strict=True):
        shares = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=shares, alpha=0.55, color=style["color"], label=f"{name} ({len(values)})")
    axes.axvline(threshold, color=ink(), linestyle="--", linewidth=1.4, label="threshold")
    axes.set(xlabel=quantity, ylabel="share of images")
    axes.legend(loc="upper right")
    return figure


def subgroups(table: Sequence[Mapping[str, Any]], measure: str = "AUROC") -> "Figure":
    """Forest plot: `metric` with `low` and `high` of the images whose `column` has a `value`, and how many (`n`) they are.

    A row without a number keeps its line and is left empty.
    """
    figure, axes = axes_of(1.2 + 0.32 * (len(table) + len({row["column"] for row in table})), f"{measure} by subgroup")
    height, ticks, names = 0, [], []
    for column in dict.fromkeys(row["column"] for row in table):
        ticks.append(height)
        names.append(f"{str(column).upper()}")
        for row in (row for row in table if row["column"] == column):
            height += 1
            ticks.append(height)
            names.append(f"{fill(str(row['value']), 22)} (n={row['n']})")
            _interval_line(axes, row, height)
        height += 1
    axes.set_yticks(ticks, names)
    axes.set(xlabel=measure, ylim=(height - 0.3, -0.7))
    axes.grid(visible=False, axis="y")
    return figure


def _interval_line(axes: "Axes", row: Mapping[str, Any], height: float) -> None:
    if _number(row["metric"]) is not None:
        value, (low, high) = float(row["metric"]), _bounds({"m": row["metric"], "m_low": row["low"], "m_high": row["high"]}, "m")
        axes.errorbar([value], [height], xerr=[[value - low], [high - value]], fmt="s", markersize=5, color=series(1)[0]["color"])


def histograms(centres: ArrayLike, real: ArrayLike, generated: ArrayLike, unit: str) -> "Figure":
    """Shares of pixels `(B,)` of real and generated images in bins around `centres` `(B,)`, in the source's unit."""
    figure, axes = axes_of(3.4, "Intensities")
    for values, name, style in zip((real, generated), ("real", "generated"), series(2), strict=True):
        axes.plot(centres, values, label=name, drawstyle="steps-mid", **style)
    axes.set(xlabel=unit, ylabel="share of pixels")
    log_axis(axes.yaxis, (1,))
    axes.legend()
    return figure


def embedding(
    real: NDArray, real_labels: NDArray, generated: NDArray, generated_labels: NDArray, names: Sequence[str], method: str
) -> "Figure":
    """Real `(N, 2)` and generated `(M, 2)` images where `medsd.report.embed.embed` puts them, coloured by class.

    The title says by which method.
    """
    figure, axes = axes_of(5.0, f"{method} of features")
    for place, (name, style) in enumerate(zip(names, series(len(names)), strict=True)):
        turn = MARKERS[place // LEGEND_INSIDE % len(MARKERS)]
        for points, labels, marker in ((real, real_labels, turn[0]), (generated, generated_labels, turn[1])):
            own = points[np.asarray(labels) == place]
            axes.scatter(*own.T, s=18, marker=marker, color=style["color"], alpha=0.65, linewidths=1.2 if marker == turn[1] else 0)
        axes.scatter([], [], color=style["color"], marker="s", label=name)
    for marker, kind in zip(MARKERS[0], ("real", "generated"), strict=True):
        axes.scatter([], [], color=ink(), marker=marker, label=kind)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure
