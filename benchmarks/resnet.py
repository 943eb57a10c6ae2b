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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from medsd import load_info
from medsd.data.dataset import available_splits
from medsd.evaluation.classification import classification_metrics
from medsd.models.resnet import ResNet
from medsd.training.discriminative import Labelled, fit_resnet, read_labelled, scaled


def grad_cam(model: ResNet, images: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """`(N, R, R)`: the last maps, weighed by the gradient of the class's logit, above 0, enlarged bilinearly."""
    found = []
    for image, label in zip(images, labels, strict=True):
        maps = model.maps(image[None]).detach().requires_grad_(True)
        model.head(maps.mean((2, 3)))[0, label].backward()
        cam = F.relu((maps.grad.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))
        found.append(F.interpolate(cam, images.shape[-1], mode="bilinear")[0, 0].detach().numpy())
    return np.stack(found)


def together(dataset_name: str) -> Labelled:
    """All splits."""
    parts = [read_labelled(dataset_name, split) for split in available_splits(dataset_name)]
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "patients", "keys")]
    return Labelled(torch.cat([part.images for part in parts]), *joined)


def folds(part: Labelled, count: int) -> Iterator[tuple[Labelled, Labelled, Labelled]]:
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
            cuts = iter([tuple(read_labelled(options.dataset_name, split) for split in ("train", "validation", "test"))])
        for train_part, validation, test in cuts:
            model = fit_resnet(train_part, validation, len(names), seed)
            probabilities.append(scaled(model, validation, test.images))
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
