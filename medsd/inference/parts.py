"""Scores of images on disk, part by part as they are computed, until all are there: what a stopped scoring goes on from."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medsd.inference.calibration import Calibration
from medsd.inference.scoring import ClassifyOutput
from medsd.output import write_text

SETTINGS = "settings.json"
CALIBRATION = "calibration.json"
NO_FINDING = "no finding"
TEXTS = frozenset({"key", "patient_id", "label", "prediction"})
"""Columns that are text also where a part has no value."""


def score_columns(
    output: ClassifyOutput, names: Sequence[str], keys: Sequence[str], patients: Sequence[str], labels: np.ndarray
) -> dict[str, Any]:
    """Columns of `likelihoods.parquet`; `labels` `(N,)` or `(N, K)` as in `medsd.data.matching.labels_in`."""
    columns = {
        "key": keys,
        "patient_id": patients,
        "label": _label_names(names, labels),
        "prediction": output.predictions,
        "pairs": output.pairs.max(1),
        "rows": output.rows,
    }
    hypotheses = [name or NO_FINDING for name in output.hypotheses]
    kinds = {
        "loglik": (hypotheses, output.log_likelihoods),
        "se": (hypotheses, output.standard_errors),
        "prob": (names, output.probabilities),
    }
    for kind, (of, values) in kinds.items():
        columns |= {f"{kind}/{name}": values[:, index] for index, name in enumerate(of)}
    return columns | {"p_flip": output.p_flip, "entropy": output.entropy}


def _label_names(names: Sequence[str], labels: np.ndarray) -> list[str | None]:
    """Class names; of findings those that hold, joined by `|`; None where that is not known."""
    if labels.ndim == 1:
        return [names[label] if label >= 0 else None for label in labels]
    shown = ["|".join(name for name, holds in zip(names, row, strict=True) if holds == 1) for row in labels]
    return [held if (row >= 0).any() else None for held, row in zip(shown, labels, strict=True)]


def answers_in(predictions: Sequence[str], names: Sequence[str], findings: bool) -> np.ndarray:
    """The column `prediction` as class indices `(N,)`, or as `findings` `(N, K)` of 0 and 1."""
    if findings:
        return np.array([[name in said.split("|") for name in names] for said in predictions], int)
    return np.array([list(names).index(said) for said in predictions])


class Parts:
    """A hidden folder beside the scores; each part is a Parquet file that is there in full or not at all.

    Args:
        scores: the folder that the scores will be in.
        settings: all that determines a score. Parts under other settings are of no use.
    """

    def __init__(self, scores: Path, settings: Mapping[str, Any]) -> None:
        self.folder = scores.with_name(f".{scores.name}.scoring")
        self.settings = json.dumps(settings, sort_keys=True, indent=1)

    def begin(self) -> int:
        """Make the folder, or keep one of the same settings; returns the number of images that are scored already."""
        record = self.folder / SETTINGS
        if not record.is_file() or record.read_text() != self.settings:
            if self.keys():
                print(f"scores of a stopped run with other settings are discarded ({self.folder})")
            self.remove()
            self.folder.mkdir(parents=True)
            write_text(record, self.settings)
        return len(self.keys())

    def calibration(self) -> Calibration | None:
        """What the scores rest on, where it has been kept."""
        file = self.folder / CALIBRATION
        return Calibration.from_dict(json.loads(file.read_text())) if file.is_file() else None

    def keep(self, calibration: Calibration) -> None:
        """Keep what the scores rest on."""
        write_text(self.folder / CALIBRATION, json.dumps(asdict(calibration)))

    def keys(self) -> set[str]:
        """Of the images that need no more scoring: those that are scored, and those that cannot be."""
        return {*(self.table()["key"].to_pylist() if self._files() else ()), *(failure["key"] for failure in self.failed())}

    def add(self, name: str, columns: Mapping[str, Sequence[Any]], failed: Iterable[Mapping[str, str]], seconds: float) -> None:
        """Keep the scores of some images, and (key, reason) of those that failed."""
        import pyarrow
        import pyarrow.parquet

        if len(columns["key"]):
            made, final = self.folder / f"{name}.tmp", self.folder / f"{name}.parquet"
            arrays = {key: pyarrow.array(list(values), pyarrow.string() if key in TEXTS else None) for key, values in columns.items()}
            pyarrow.parquet.write_table(pyarrow.table(arrays), made)
            os.replace(made, final)
        write_text(self.folder / f"{name}.json", json.dumps({"failed": list(failed), "seconds": seconds}))

    def table(self) -> Any:
        """All parts as one `pyarrow.Table`, by key."""
        import pyarrow
        import pyarrow.parquet

        return pyarrow.concat_tables([pyarrow.parquet.read_table(file) for file in self._files()]).sort_by("key")

    def failed(self) -> list[dict[str, str]]:
        """(key, reason) of the images that could not be scored, by key."""
        return sorted((failure for record in self._records() for failure in record["failed"]), key=lambda failure: failure["key"])

    def seconds(self) -> float:
        """Spent on scoring, by all processes together."""
        return sum(record["seconds"] for record in self._records())

    def remove(self) -> None:
        """Of no use any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _records(self) -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json")) if file.name not in {SETTINGS, CALIBRATION}]
