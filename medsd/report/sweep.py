"""What a sweep over training patients found: a row per cell, a table of means over seeds, and a picture of a panel per metric.

A row has `model`, `fraction`, `patients`, `images`, `seed`, `training_seconds`, `extractor`, and for each number of `metrics.json` that is
one for all images `NAME` and, with an interval, `NAME_low` and `NAME_high`.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from typing import Any

from PIL import Image

from medsd.evaluation.distribution import NAMES as OF_FEATURES
from medsd.evaluation.repeats import mean_of_seeds
from medsd.report.figures import data_size
from medsd.report.style import png, theme
from medsd.report.tables import number

DPI = 200
Row = Mapping[str, Any]


def metric_columns(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of `metrics.json` is a number of all images, each before its interval."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if "/" in name or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        found[name] = value
        if bounds := metrics.get(f"{name}_ci"):
            found |= {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
    return found


def as_csv(rows: Sequence[Row]) -> str:
    """The columns of all rows; empty where a row has no such number."""
    text = StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_metric(rows: Sequence[Row], metric: str) -> list[Row]:
    """Rows that have this number; none where it is one of features, and those of several extractors."""
    known = [row for row in rows if row.get(metric) is not None]
    apart = metric.removesuffix("_floor") in OF_FEATURES and len({row.get("extractor") for row in known}) > 1
    return [] if apart else known


def means(rows: Sequence[Row], metric: str) -> Iterator[tuple[str, int, tuple[float, float, float]]]:
    """Model, patients, and mean over seeds with the bounds of its interval, of each cell that differs only by its seed."""
    known = with_metric(rows, metric)
    for model, patients in dict.fromkeys((row["model"], row["patients"]) for row in known):
        own = [row for row in known if (row["model"], row["patients"]) == (model, patients)]
        values = [row[metric] for row in own]
        bounds = ([row.get(f"{metric}_{side}", row[metric]) for row in own] for side in ("low", "high"))
        yield model, patients, mean_of_seeds(values, *bounds)


def summary(rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Lines to print: of each model and number of patients, means over seeds with their 95 % intervals."""
    found = {metric: {(model, patients): value for model, patients, value in means(rows, metric)} for metric in metrics}
    lines = [f"{'model':<12} {'patients':>8}  " + "  ".join(f"{metric:<24}" for metric in metrics)]
    for model, patients in dict.fromkeys((row["model"], row["patients"]) for row in rows):
        cells = (_with_interval(found[metric].get((model, patients))) for metric in metrics)
        lines.append(f"{model:<12} {patients:>8}  " + "  ".join(f"{cell:<24}" for cell in cells))
    return [line.rstrip() for line in lines]


def _with_interval(value: tuple[float, float, float] | None) -> str:
    return "none" if value is None else "{} [{}, {}]".format(*map(number, value))


def picture(rows: Sequence[Row], metrics: Sequence[str]) -> Image.Image:
    """`medsd.report.figures.data_size` of each metric, one under the other."""
    with theme():
        panels = [Image.open(BytesIO(png(data_size(rows, metric), DPI))).convert("RGB") for metric in metrics]
    sheet = Image.new("RGB", (max(panel.width for panel in panels), sum(panel.height for panel in panels)), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel, (0, sum(before.height for before in panels[:place])))
    return sheet
