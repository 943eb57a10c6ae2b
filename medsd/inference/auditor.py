"""An audit from beginning to end: a pipeline by images that it generates, an autoencoder by what it makes of held-out images.

An autoencoder that holds training images paints them where it is shown others: a reconstruction is then nearer to a training image than to
the image that was encoded. Its error on training images beside others says how well it knows them (`membership`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from medsd.data.dataset import DataInfo, load_dataset
from medsd.data.transforms import column, row_labels, stratified, training_rows
from medsd.errors import InputError
from medsd.evaluation.memorization import Findings, membership
from medsd.hub.contents import kind_of
from medsd.hub.gate import RATE
from medsd.inference.auditing import (
    MEMBERS,
    Seen,
    audit_record,
    audit_rows,
    held_out_rows,
    membership_signal,
    no_audit,
    replaces,
    unit_images,
)
from medsd.inference.extractors import CodecFeatures, Extractor, extract, load_extractor
from medsd.inference.folder import read_info, trained_on
from medsd.inference.gallery import Gallery
from medsd.inference.generating import Sampling
from medsd.inference.judging import Judged, judged_rows, plan_samples
from medsd.inference.pipeline import MedSDPipeline
from medsd.models.autoencoders import load_vae
from medsd.models.codec import LearnedCodec, codec_of, reconstruct
from medsd.output import write_text


@dataclass(frozen=True)
class Compared:
    """An audit, and what it rests on."""

    record: dict[str, Any]
    """`audit.json`."""
    found: Findings
    rows: tuple[Any, Any]
    """Training images, and held-out ones."""


def audit_folder(folder: Path, dataset_name: str, samples: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Audit a trained folder on the data it was trained on, with so many images, and write its `audit.json`.

    An audit that failed with as many samples stays. Raises InputError where the data is another, or too little of it was held out.
    """
    data = read_info(folder).data
    if data is None:
        raise InputError(f"{folder} does not say what it was trained on, so nobody can audit it")
    if why := no_audit(data, dataset_name):
        raise InputError(f"{folder} cannot be audited on {dataset_name}: {why}")
    made = (audit_autoencoder if kind_of(folder) == "autoencoder" else audit_pipeline)(folder, dataset_name, data, samples, device, seed)
    if replaces(made, folder):
        write_text(folder / "audit.json", json.dumps(made, indent=2) + "\n")
    return made


def audit_pipeline(folder: Path, dataset_name: str, data: DataInfo, samples: int, device: torch.device, seed: int) -> dict[str, Any]:
    """The record of images that a pipeline generates, the classes as often as in training."""
    pipe = MedSDPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    names = pipe.class_names or [None]
    plan = plan_samples(judged_rows(pipe, dataset_name, "train")[1], names, samples, Sampling.batch_size)
    with TemporaryDirectory() as work:
        judged = Judged(Gallery(Path(work) / "audit", {}), plan, names)
        judged.gallery.begin()
        with tqdm(total=len(judged.labels), desc="generating", unit="image") as bar:
            judged.draw(pipe, Sampling(seed=seed), 0, 1, bar.update)
        extractor = load_extractor("unet", pipe, device)
        seen = Seen.of(judged.batches, extract(extractor, judged.batches()).values)
    drawn = Sampling(seed=seed).told(type(pipe.scheduler).__name__, names[0])
    made = compare(folder, dataset_name, data, pipe.fingerprint(), extractor, seen, judged.told(seed), drawn)
    return made.record | membership_signal(pipe, *made.rows, seed)


def audit_autoencoder(folder: Path, dataset_name: str, data: DataInfo, samples: int, device: torch.device, seed: int) -> dict[str, Any]:
    """The record of reconstructions of held-out images."""
    codec = codec_of(load_vae(str(folder)).to(device), data.channels)
    shown = _some(held_out_rows(dataset_name), samples, seed)
    extractor = CodecFeatures(codec)

    def again() -> Any:
        return (reconstruct(codec, batch, device).cpu() for batch in unit_images(data, shown)())

    seen = Seen.of(again, extract(extractor, again()).values)
    told = [{"key": key} for key in column(shown, "key").to_pylist()]
    made = compare(folder, dataset_name, data, extractor.sha256, extractor, seen, told, {"num_inference_steps": None, "seed": seed})
    errors, patients = [], []
    for rows in (_some(rows, MEMBERS, seed) for rows in made.rows):
        errors.append(_errors(codec, data, rows, device))
        patients += column(rows, "patient_id").to_pylist()
    return made.record | membership(*errors, patients)


def compare(
    folder: Path,
    dataset_name: str,
    data: DataInfo,
    model: str,
    extractor: Extractor,
    seen: Seen,
    told: list[dict[str, Any]],
    sampling: dict[str, Any],
    rate: float = RATE,
) -> Compared:
    """Samples of the model in `folder` beside the images that it was trained on, and held-out ones; arguments as in `audit_record`."""
    training = training_rows(load_dataset(dataset_name, "train"), *trained_on(folder))
    held_out = held_out_rows(dataset_name)
    with tqdm(total=2 * len(training) + len(held_out), desc="looking for copies", unit="image") as bar:
        found, rate = audit_rows(extractor, seen, data, training, held_out, rate, bar.update)
    keys = column(training, "key").to_pylist()
    name = f"{extractor.name} sha256:{extractor.sha256}"
    return Compared(audit_record(folder, model, data, found, rate, name, keys, told, sampling), found, (training, held_out))


def _some(rows: Any, most: int, seed: int) -> Any:
    """Up to so many rows, the classes in proportion."""
    return rows.select(stratified(row_labels(rows), column(rows, "key").to_pylist(), most, seed))


def _errors(codec: LearnedCodec, data: DataInfo, rows: Any, device: torch.device) -> Any:
    """Mean squared error of each image's reconstruction, `(N,)`."""
    parts = [(reconstruct(codec, batch, device).cpu() - batch).square().flatten(1).mean(1) for batch in unit_images(data, rows)()]
    return torch.cat(parts).double().numpy()
