"""A discriminative model of the same images: a ResNet trained on them, to be set beside the diffusion model or to judge what it draws."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from medsd.data.dataset import INFO_FILE, load_dataset, load_info
from medsd.data.intensity import label_channels
from medsd.data.transforms import Augmentation, TrainingRows, column, to_unit
from medsd.errors import InputError
from medsd.inference.calibration import Answers, fit_temperature
from medsd.inference.extractors import Extractor, ResNetFeatures, load_extractor
from medsd.inference.pipeline import MedSDPipeline
from medsd.models.resnet import ResNet
from medsd.output import writing
from medsd.runtime import cache_folder
from medsd.training.patience import train_until_stale

EPOCHS, BATCH = 60, 32
QUICK_EPOCHS, QUICK_UPDATES = 10, 600
"""Enough for features that tell the classes: at least so many epochs, and updates."""
SCORED_AT_ONCE = 128


@dataclass(frozen=True)
class Labelled:
    """N images with one class each."""

    images: torch.Tensor
    """`(N, C, R, R)` float32 in `[-1, 1]`."""
    labels: np.ndarray
    """`(N,)` class indices."""
    patients: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: np.ndarray) -> "Labelled":
        """Those whose place is true in `chosen` `(N,)`."""
        places = np.flatnonzero(chosen)
        return Labelled(self.images[torch.from_numpy(places)], self.labels[places], self.patients[places], self.keys[places])


def read_labelled(dataset_name: str, split: str, resolution: int | None = None) -> Labelled:
    """The labelled images of a split, without mask channels; raises InputError for findings that can hold together."""
    rows, info = load_dataset(dataset_name, split), load_info(dataset_name)
    if info.multi_label:
        raise InputError(f"{dataset_name} has several findings an image: a classifier of one class an image cannot be trained on it")
    labels = column(rows, "label").fill_null(-1).to_numpy()
    known = np.flatnonzero(labels >= 0)
    batch = TrainingRows(rows.select(known))[list(range(len(known)))]
    unit = to_unit(batch["images"], info.intensity_map, batch.get("ranges"), resolution)
    grey = unit.shape[1] - label_channels(info.intensity_map, info.image_channels)
    names = (np.array(column(rows, name).to_pylist())[known] for name in ("patient_id", "key"))
    return Labelled(unit[:, :grey], labels[known], *names)


def fit_resnet(
    train: Labelled, validation: Labelled, classes: int, seed: int, epochs: int = EPOCHS, progress: Callable[[], Any] = lambda: None
) -> ResNet:
    """With shift and rotation, until the validation NLL after temperature scaling no longer falls (`train_until_stale`).

    Not by AUROC: on few validation images it can be highest before anything is learnt. `progress` is called after each epoch.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(train.images.shape[1], classes, train.images.shape[-1])
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * max(1, len(train) // BATCH))
    change = Augmentation(shift=train.images.shape[-1] // 16, rotation=10.0)
    labels = torch.from_numpy(train.labels)

    def epoch() -> None:
        order = torch.randperm(len(labels), generator=draws)
        for chosen in order[: max(1, len(order) // BATCH) * BATCH].split(BATCH):
            loss = F.cross_entropy(model(change(train.images[chosen], draws)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    def held_out_loss() -> float:
        answers, scores = answers_of(validation, classes), logits(model, validation.images)
        return answers.loss(scores / fit_temperature(scores, answers)[0])

    return train_until_stale(model, epochs, epoch, held_out_loss, progress)


def quick_epochs(images: int) -> int:
    """Epochs over so many images, few for many and `EPOCHS` at most for few."""
    return min(EPOCHS, max(QUICK_EPOCHS, -(-QUICK_UPDATES * BATCH // max(images, 1))))


def resnet_of(dataset_name: str, resolution: int, seed: int = 0, progress: Callable[[], Any] = lambda: None) -> ResNet:
    """A ResNet of a data set's classes, trained for `quick_epochs` on its training split; kept in the cache for the next time.

    `progress` is called after each epoch.
    """
    info = load_info(dataset_name)
    name = f"{info.fingerprint[:16]}-{resolution}-{QUICK_EPOCHS}-{QUICK_UPDATES}-{seed}"
    file = cache_folder("resnet") / f"{name}.safetensors"
    channels = info.channels - label_channels(info.intensity_map, info.image_channels)
    if file.is_file():
        model = ResNet(channels, len(info.class_names), resolution)
        model.load_state_dict(load_file(file))
        return model.eval()
    train, validation = (read_labelled(dataset_name, split, resolution) for split in ("train", "validation"))
    if not len(train) or not len(validation):
        raise InputError(f"{dataset_name}: a ResNet learns from labelled images of its train and validation splits, and one has none")
    model = fit_resnet(train, validation, len(info.class_names), seed, quick_epochs(len(train)), progress)
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file):
        save_file(model.state_dict(), made := file.with_suffix(f".{os.getpid()}.partial"))
        os.replace(made, file)
    return model


def names_data(features: str, dataset_name: str) -> bool:
    """Whether `--features` is a prepared data folder, or the very data set, which can be on the Hub."""
    return features == dataset_name or ((Path(features) / "data").is_dir() and (Path(features) / INFO_FILE).is_file())


def chosen_extractor(features: str, pipe: MedSDPipeline, dataset_name: str) -> Extractor:
    """What `--features` names: prepared data stands for a ResNet that tells its classes, all else see `load_extractor`.

    Raises InputError for data whose images the pipeline would see otherwise.
    """
    if not names_data(features, dataset_name):
        return load_extractor(features, pipe, pipe.device)
    info, data = load_info(features), pipe.data
    alike = (info.channels, info.unit, info.intensity) == (data.channels, data.unit, data.intensity)
    if not alike or info.resolution < data.resolution or info.resolution % data.resolution:
        raise InputError(f"--features {features} has other images than the pipeline (channels, intensities or size): prepare it alike")
    with tqdm(desc=f"a ResNet of {features}", unit="epoch", leave=False) as bar:
        judge = resnet_of(features, pipe.data.resolution, progress=bar.update)
    return ResNetFeatures(judge.to(pipe.device), "resnet")


@torch.no_grad()
def logits(model: ResNet, images: torch.Tensor) -> np.ndarray:
    """`(N, classes)` float64."""
    model.eval()
    return torch.cat([model(part) for part in images.split(SCORED_AT_ONCE)]).double().numpy()


def answers_of(part: Labelled, classes: int) -> Answers:
    """For a temperature without class bias; classes count alike, as in our calibration."""
    return Answers(part.labels, np.zeros((classes, 1)))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Probabilities `(N, classes)` of logits."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def scaled(model: ResNet, validation: Labelled, images: torch.Tensor) -> np.ndarray:
    """Probabilities `(N, classes)` of images after temperature scaling on validation (Guo et al., ICML 2017)."""
    temperature, _ = fit_temperature(logits(model, validation.images), answers_of(validation, model.head.out_features))
    return softmax(logits(model, images) / temperature)
