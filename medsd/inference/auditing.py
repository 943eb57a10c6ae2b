"""The audit of a pipeline: does it copy the images that it was trained on, and do its errors tell them from others?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d

import medsd
from medsd.data.dataset import DataInfo, available_splits, load_dataset, load_info
from medsd.data.transforms import column, recorded_ranges, row_labels, stratified, unit_batches
from medsd.errors import InputError
from medsd.evaluation.memorization import (
    SIDE,
    Findings,
    audit_summary,
    feature_neighbours,
    find_copies,
    membership,
    pixel_neighbours,
)
from medsd.hub.contents import known_sha256
from medsd.hub.gate import counts, read_audit
from medsd.inference.extractors import Extractor, Progress, extract
from medsd.inference.pipeline import MedSDPipeline
from medsd.inference.plan import make_plan

MEMBERS, PAIRS = 256, 8
"""Training images, and held-out ones, whose denoising errors are compared, and at how many pairs."""

Batches = Callable[[], Iterator[torch.Tensor]]
"""Images `(B, C, R, R)` in `[-1, 1]`, from the beginning at each call."""


@dataclass(frozen=True)
class Seen:
    """What an audit looks at of some images."""

    thumbnails: torch.Tensor
    """`(N, C, SIDE, SIDE)`."""
    features: np.ndarray
    """`(N, D)`."""
    patients: list[str]
    """N ids; of generated images none."""

    @classmethod
    def of(cls, batches: Batches, features: np.ndarray, patients: Sequence[str] = ()) -> "Seen":
        """Of images with their features."""
        return cls(torch.cat([adaptive_avg_pool2d(batch, SIDE) for batch in batches()]), features, list(patients))


def audit_rows(
    extractor: Extractor,
    samples: Seen,
    data: DataInfo,
    training: Any,
    held_out: Any,
    wanted: float,
    progress: Progress = lambda images: None,
) -> tuple[Findings, float]:
    """`copies_among` for prepared rows, and the rate that so many held-out ones can vouch for, see `possible_rate`.

    `progress` is called with the number of images of each batch, of which there are twice `training`, and `held_out`.
    """
    (images, known), (others, unseen) = ((unit_images(data, rows), column(rows, "patient_id").to_pylist()) for rows in (training, held_out))
    first, turned, second = (extract(extractor, some(), progress=progress).values for some in (images, mirrored(images), others))
    rate = possible_rate(wanted, len(second))
    return copies_among(samples, Seen.of(images, first, known), turned, Seen.of(others, second, unseen), rate), rate


def copies_among(samples: Seen, training: Seen, mirrored: np.ndarray, held_out: Seen, rate: float) -> Findings:
    """Which samples copy training images, in pixels and in features; `mirrored` `(T, D)` are features of the mirrored training images."""
    patients = held_out.patients
    if len(set(patients)) < 2:
        raise InputError("held-out images of one patient: the audit compares patients, so it takes two or more")
    found = []
    for queries, own in ((samples, None), (held_out, patients)):
        pixels = pixel_neighbours(queries.thumbnails, training.thumbnails, held_out.thumbnails, own, own and patients)
        features = feature_neighbours(queries.features, [training.features, mirrored], [held_out.features], own, own and patients)
        found.append({"pixels": pixels, "features": features})
    return find_copies(*found, rate, len(set(patients)))


def mirrored(batches: Batches) -> Batches:
    """The same images, left and right exchanged."""
    return lambda: (batch.flip(-1) for batch in batches())


def audit_record(
    folder: Path,
    model: str,
    data: DataInfo,
    found: Findings,
    rate: float,
    extractor: str,
    keys: Sequence[str],
    samples: Sequence[dict[str, Any]],
    sampling: dict[str, Any],
) -> dict[str, Any]:
    """`audit.json`: for exactly the weights in `folder` (those of `model`, a fingerprint), how many samples copy, and which.

    `keys` are those of the training images, `samples` say of each sample what may be told (class, seed), `sampling` how they came about.
    """
    flagged = [
        samples[place]
        | {"p_value": float(found.p_values[place]), "score": float(found.scores[place]), "copy": bool(found.copies[place])}
        | {"nearest": keys[found.nearest[place]], "space": found.space[place]}
        for place in np.flatnonzero(found.flagged)
    ]
    made = {"medsd": medsd.__version__, "weights_sha256": known_sha256(folder), "model": model, "sampling": sampling}
    made |= {"data": data.fingerprint, "training_images": len(keys), "extractor": extractor}
    quantity = "distance to training images beside others, in deviations"
    return made | audit_summary(found, rate) | {"quantity": quantity, "flagged_samples": flagged}


def replaces(audit: dict[str, Any], folder: Path) -> bool:
    """Whether it may take the place of the folder's `audit.json`, so that no other seed makes a failed audit good.

    It may where it failed, or where that one is of other weights, counts less (see `medsd.hub.gate.counts`), is of fewer samples, or passed
    with as many.
    """
    try:
        before = read_audit(folder)
    except InputError:
        return True  # Damaged.
    if before.get("weights_sha256") != audit["weights_sha256"] or audit["verdict"] == "failed":
        return True
    if counts(before) != counts(audit):
        return counts(audit)
    return before["samples"] < audit["samples"] or (before["samples"] == audit["samples"] and before["verdict"] == "passed")


def held_out_rows(dataset_name: str) -> Any:
    """Images of all splits but train, whose patients the pipeline did not learn from."""
    from datasets import concatenate_datasets

    return concatenate_datasets([load_dataset(dataset_name, split) for split in available_splits(dataset_name) if split != "train"])


def no_audit(data: DataInfo, dataset_name: str) -> str:
    """Why nothing can be audited on a data set; empty where it can."""
    if load_info(dataset_name).fingerprint != data.fingerprint:
        return "this is not the data that the pipeline was trained on"
    if "train" not in available_splits(dataset_name):
        return "the data has no train split, whose images may be copied"
    held_out = [split for split in available_splits(dataset_name) if split != "train"]
    few = not held_out or len(column(held_out_rows(dataset_name), "patient_id").unique()) < 2
    return "it compares patients, and fewer than two are held out" if few else ""


def possible_rate(wanted: float, held_out: int) -> float:
    """The false-positive rate, or the smallest that so many held-out images can vouch for, which is said then."""
    possible = max(wanted, 1 / (held_out + 1))
    if possible > wanted:
        print(f"note: {held_out} held-out images vouch for a false-positive rate of {possible:.2g}, not {wanted:g}")
    return possible


def membership_signal(pipe: MedSDPipeline, training: Any, held_out: Any, seed: int = 0) -> dict[str, Any]:
    """`medsd.evaluation.memorization.membership` of up to `MEMBERS` images of both, the classes in proportion."""
    losses, patients = [], []
    for rows in (training, held_out):
        chosen = rows.select(stratified(row_labels(rows), column(rows, "key").to_pylist(), MEMBERS, seed))
        latents = pipe.encode_images(list(chosen["image"]), recorded_ranges(chosen))
        plan = make_plan(pipe.noise_schedule, PAIRS, tuple(latents.shape[1:]), seed=seed)
        losses.append(pipe.own_losses(latents, own_prompts(pipe, row_labels(chosen)), plan).mean(1))
        patients += column(chosen, "patient_id").to_pylist()
    return membership(*losses, patients)


def own_prompts(pipe: MedSDPipeline, labels: np.ndarray) -> list[str]:
    """The prompt of each image's class, or set of findings; the empty one where the pipeline does not know it."""
    prompts = pipe.hypotheses.prompts(pipe.data) if pipe.class_names else []
    numbers = pipe.hypotheses.numbers(labels) if prompts else np.full(len(labels), -1)
    return [prompts[number] if number >= 0 else "" for number in numbers]


def unit_images(data: DataInfo, rows: Any) -> Batches:
    """Images of prepared rows as a model of `data` sees them."""
    return lambda: unit_batches(rows, data.intensity_map, data.resolution)
