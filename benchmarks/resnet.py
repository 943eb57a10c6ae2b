"""A discriminative baseline: a small ResNet-18 trained from scratch on the same data.

    python benchmarks/resnet.py --dataset_name runs/pneumoniamnist/data --seeds 0 1 2 --work /tmp/resnet

Width 32, shift and rotation, early stopping on validation NLL, temperature scaling on validation (Guo et al., ICML 2017). Prints
`classification_metrics` of the test split for each seed and writes them to resnet.json.

`--folds 5` instead cuts all splits together into folds by patient, trains on three, stops and calibrates on one and tests on one, so
that every image is tested once.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from medsd import load_dataset, load_info
from medsd.data.dataset import available_splits
from medsd.data.transforms import Augmentation, recorded_ranges, to_unit
from medsd.evaluation.classification import classification_metrics
from medsd.inference.calibration import Answers, fit_temperature

EPOCHS, PATIENCE, BATCH = 60, 20, 32


class Block(nn.Module):
    """Two convolutions around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        plain = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if plain else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for small images: a 3 x 3 stem without pooling, which halves images of more than 32 px."""

    def __init__(self, channels: int, classes: int, side: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1 + (side > 32), 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        levels = zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        self.body = nn.Sequential(*(layer for a, b, stride in levels for layer in (Block(a, b, stride), Block(b, b, 1))))
        self.head = nn.Linear(8 * width, classes)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 8 width, h, w)`, before the mean over places."""
        return self.body(self.stem(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.maps(images).mean((2, 3)))


@dataclass(frozen=True)
class Part:
    """Images `(N, C, R, R)` in `[-1, 1]`, class indices and patients."""

    images: torch.Tensor
    labels: np.ndarray
    patients: np.ndarray
    keys: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Part":
        return Part(self.images[torch.from_numpy(np.flatnonzero(chosen))], self.labels[chosen], self.patients[chosen], self.keys[chosen])


def read(dataset_name: str, split: str) -> Part:
    rows, info = load_dataset(dataset_name, split), load_info(dataset_name)
    ranges = recorded_ranges(rows)
    images = torch.from_numpy(np.stack(rows["image"]).astype(np.float32))
    unit = to_unit(images, info.intensity_map, None if ranges is None else torch.from_numpy(ranges).float())
    return Part(unit, np.array(rows["label"]), np.array(rows["patient_id"]), np.array(rows["key"]))


def train(train_part: Part, validation: Part, classes: int, seed: int, epochs: int = EPOCHS) -> ResNet:
    """With shift and rotation, until `PATIENCE` epochs have not lowered the validation NLL after temperature scaling; the best's weights.

    Not by AUROC: on few validation images it can be highest before anything is learnt.
    """
    torch.manual_seed(seed)
    model, draws = ResNet(train_part.images.shape[1], classes, train_part.images.shape[-1]), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(train_part.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    change = Augmentation(shift=train_part.images.shape[-1] // 16, rotation=10.0)
    labels, best, kept, stale = torch.from_numpy(train_part.labels), float("inf"), {}, 0
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(labels), generator=draws)
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            loss = F.cross_entropy(model(change(train_part.images[chosen], draws)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        answers, scores = answers_of(validation, classes), logits(model, validation.images)
        nll = answers.loss(scores / fit_temperature(scores, answers)[0])
        stale = 0 if nll < best else stale + 1
        if nll < best:
            best, kept = nll, {name: value.clone() for name, value in model.state_dict().items()}
        if stale >= PATIENCE:
            break
    model.load_state_dict(kept)
    return model.eval()


@torch.no_grad()
def logits(model: ResNet, images: torch.Tensor) -> np.ndarray:
    model.eval()
    return torch.cat([model(part) for part in images.split(128)]).double().numpy()


def answers_of(part: Part, classes: int) -> Answers:
    """For a temperature without class bias; classes count alike, as in our calibration."""
    return Answers(part.labels, np.zeros((classes, 1)))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def scaled(model: ResNet, validation: Part, test: Part) -> np.ndarray:
    """Probabilities of the test images after temperature scaling on validation."""
    temperature, _ = fit_temperature(logits(model, validation.images), answers_of(validation, model.head.out_features))
    return softmax(logits(model, test.images) / temperature)


def grad_cam(model: ResNet, images: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """`(N, R, R)`: the last maps, weighed by the gradient of the class's logit, above 0, enlarged bilinearly."""
    found = []
    for image, label in zip(images, labels, strict=True):
        maps = model.maps(image[None]).detach().requires_grad_(True)
        model.head(maps.mean((2, 3)))[0, label].backward()
        cam = F.relu((maps.grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
        found.append(F.interpolate(cam, images.shape[-1], mode="bilinear")[0, 0].detach().numpy())
    return np.stack(found)


def together(dataset_name: str) -> Part:
    """All splits."""
    parts = [read(dataset_name, split) for split in available_splits(dataset_name)]
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "patients", "keys")]
    return Part(torch.cat([part.images for part in parts]), *joined)


def folds(part: Part, count: int) -> Iterator[tuple[Part, Part, Part]]:
    """Train, validation and test by patient, each class's patients dealt out evenly."""
    fold = fold_of(part.labels, part.patients, count)
    for test in range(count):
        validation = (test + 1) % count
        yield part[(fold != test) & (fold != validation)], part[fold == validation], part[fold == test]


def fold_of(labels: np.ndarray, patients: np.ndarray, count: int) -> np.ndarray:
    """Fold of each image `(N,)`; it depends on the patients and their classes alone."""
    names, first = np.unique(patients, return_index=True)
    of_patient = {}
    for label in np.unique(labels):
        members = np.random.default_rng(int(label)).permutation(
            [name for name, place in zip(names, first, strict=True) if labels[place] == label]
        )
        of_patient |= {name: number % count for number, name in enumerate(members)}
    return np.array([of_patient[name] for name in patients])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names, result = load_info(options.dataset_name).class_names, {}
    for seed in options.seeds:
        before, probabilities, tests = time.perf_counter(), [], []
        if options.folds:
            cuts = folds(together(options.dataset_name), options.folds)
        else:
            cuts = iter([tuple(read(options.dataset_name, split) for split in ("train", "validation", "test"))])
        for train_part, validation, test in cuts:
            model = train(train_part, validation, len(names), seed)
            probabilities.append(scaled(model, validation, test))
            tests.append(test)
        labels, patients = (np.concatenate([getattr(test, name) for test in tests]) for name in ("labels", "patients"))
        found = classification_metrics(np.concatenate(probabilities), labels, names, patients.tolist())
        result[seed] = found | {"seconds": time.perf_counter() - before}
        shown = ("auroc", "accuracy", "balanced_accuracy", "nll", "ece", "seconds")
        print(
            seed,
            {name: round(result[seed][name], 4) for name in shown},
            {f"{name}_ci": found[f"{name}_ci"] for name in shown[:3]},
            flush=True,
        )
        np.savez(
            options.work / f"seed-{seed}.npz",
            probabilities=np.concatenate(probabilities),
            labels=labels,
            keys=np.concatenate([t.keys for t in tests]),
        )
    (options.work / "resnet.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
