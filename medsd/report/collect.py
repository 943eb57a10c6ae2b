"""What other recipes left in their folders, as parts of a report's material."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image

from medsd.data.dataset import available_splits, load_dataset, load_info
from medsd.data.matching import labels_in
from medsd.data.metadata import FACT_COLUMNS
from medsd.data.transforms import column
from medsd.evaluation.subgroups import subgroup_metrics
from medsd.inference.folder import trained_on, training_config
from medsd.inference.parts import answers_in
from medsd.inference.pipeline import MedSDPipeline

EVIDENCE_SHOWN = 8
SPLITS = ("train", "validation", "test")
CURVES = ("step", "loss", "validation_loss", "validation_auroc", "learning_rate")


@dataclass(frozen=True)
class ReadScores:
    """A folder of classify.py, with what the data says of its images."""

    metrics: dict[str, Any]
    probabilities: np.ndarray
    """`(N, K)`."""
    labels: np.ndarray
    """`(N,)`, or `(N, K)` of findings."""
    predictions: np.ndarray
    """`(N,)`, or `(N, K)` of findings."""
    subgroups: list[dict[str, Any]] = field(default_factory=list)
    evidence: list[tuple[np.ndarray, str]] = field(default_factory=list)


def no_scores(folder: Path, pipe: MedSDPipeline, dataset_name: str) -> str:
    """Why a folder has no scores of this pipeline and of held-out images of this data; empty where it has.

    Older scores do not say whose they are, and are believed.
    """
    record = folder / "metrics.json"
    if not record.is_file() or not pipe.class_names:
        return "No scores were given: run classify.py and name its folder with --scores."
    table, of = pyarrow.parquet.read_table(folder / "likelihoods.parquet"), json.loads(record.read_text()).get("pipeline")
    if of not in {None, pipe.fingerprint()} or any(f"prob/{name}" not in table.column_names for name in pipe.class_names):
        return "The scores are another pipeline's: run classify.py with this one."
    if _rows_of(dataset_name, table["key"].to_pylist()) is None:
        return "The scores are of other images: run classify.py on a split of this data that was not trained on."
    return ""


def read_scores(folder: Path, pipe: MedSDPipeline, dataset_name: str, label_map: Sequence[str] = ()) -> ReadScores:
    """A pipeline's scores of images of a data set, where `no_scores` has nothing against them."""
    class_names, table = pipe.class_names, pyarrow.parquet.read_table(folder / "likelihoods.parquet")
    rows = _rows_of(dataset_name, table["key"].to_pylist())
    labels = labels_in(pipe.data, rows, load_info(dataset_name).class_names, label_map)
    patients = column(rows, "patient_id").to_pylist()
    probabilities = np.stack([table[f"prob/{name}"].to_numpy() for name in class_names], 1)
    facts = {name: column(rows, name).to_pylist() for name in FACT_COLUMNS if name in rows.column_names}
    metrics = json.loads((folder / "metrics.json").read_text())
    predictions = answers_in(table["prediction"].to_pylist(), class_names, labels.ndim == 2)
    groups = subgroup_metrics(probabilities, labels, class_names, patients, facts, predictions)
    return ReadScores(metrics, probabilities, labels, predictions, groups, _evidence(folder / "evidence"))


def plotted(row: dict[str, Any]) -> dict[str, Any]:
    """A subgroup's row as the report draws it: by its AUROC."""
    low, high = row["auroc_ci"] or (None, None)
    return {"column": row["column"], "value": row["value"], "n": row["n"], "metric": row["auroc"], "low": low, "high": high}


def _rows_of(dataset_name: str, keys: list[str]) -> Any:
    """Rows of the held-out split that has these keys, in their order; None where none has all."""
    for split in available_splits(dataset_name):
        if split != "train":
            rows = load_dataset(dataset_name, split)
            place = {key: index for index, key in enumerate(column(rows, "key").to_pylist())}
            if all(key in place for key in keys):
                return rows.select([place[key] for key in keys])
    return None


def _evidence(folder: Path) -> list[tuple[np.ndarray, str]]:
    found = sorted(folder.glob("*.png"))[:EVIDENCE_SHOWN] if folder.is_dir() else []
    return [(np.asarray(Image.open(file).convert("RGB")), "") for file in found]


def run_facts(pipe: MedSDPipeline, run: Path, dataset_name: str) -> dict[str, str]:
    """What was trained on what: a phrase and its value, without paths and ids."""
    facts, summary = {}, _json(Path(dataset_name) / "summary.json")
    if summary and load_info(dataset_name).fingerprint == pipe.data.fingerprint:
        facts |= _counts(summary)
    elif summary:
        facts |= {f"{name}, of other data that it is compared with": value for name, value in _counts(summary).items()}
    facts["Classes"] = ", ".join(pipe.class_names) or "none: unconditional"
    data = pipe.data
    facts["Images"] = f"{data.resolution} px, {data.image_channels} channel(s), {data.unit}; as {data.channels} channel(s) in the model"
    facts["Codec"] = f"{pipe.codec.kind}, factor {pipe.codec.factor}, {pipe.codec.latent_channels} latent channels"
    facts["UNet"] = (
        f"{sum(value.numel() for value in pipe.unet.parameters()) / 1e6:.1f} M parameters, predicts {pipe.scheduler.config.prediction_type}"
    )
    return facts | _training_facts(run)


def _counts(summary: dict[str, Any]) -> dict[str, str]:
    """Of prepared data, from its `summary.json`."""
    images, patients = (" / ".join(str(summary[kind][split]) for split in SPLITS) for kind in ("images", "patients"))
    rules = ", ".join(f"{rule} ({count} images)" for rule, count in summary["patient_rule"].items())
    return {"Images (train / validation / test)": images, "Patients": patients, "Patients told by": rules}


def _training_facts(run: Path) -> dict[str, str]:
    config, facts = training_config(run), {}
    share, most, _ = trained_on(run)
    if share is not None or most is not None:
        limits = [f"{share:.0%} of the patients"] * (share is not None) + [f"at most {most} images"] * (most is not None)
        facts["Learnt from"] = ", ".join(limits)
    if config:
        batch = config["train_batch_size"] * config["gradient_accumulation_steps"]
        facts["Training"] = f"{config['max_train_steps']} updates of {batch} images a process, seed {config['seed']}"
        facts["Mixed precision"] = config["mixed_precision"]
        pretrained = "a pretrained model" if config["pretrained_model_name_or_path"] else "random weights"
        facts["Start"] = "adapters of a pretrained model" if config["rank"] else pretrained
    return facts


def read_curves(run: Path) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`; none where there is no such file."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{name: value for name, value in line.items() if name in CURVES} for line in lines]


def read_environment(run: Path) -> dict[str, Any]:
    """`environment.json`; empty where there is none."""
    return _json(run / "environment.json")


def read_sweep(folder: Path, dataset_name: str) -> list[dict[str, Any]]:
    """Rows of `results.csv`, numbers as such; none where there is no such file, or where it is of other data."""
    file, data = folder / "results.csv", load_info(dataset_name).fingerprint
    if not file.is_file() or any(_json(record)["data"] != data for record in folder.glob("*/train.json")):
        return []
    with file.open(newline="") as stream:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(stream)]


def _number(text: str) -> float | str | None:
    try:
        return float(text) if text else None
    except ValueError:
        return text


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
