"""Of what use are generated images? Classifiers that learn from them, tested on real images (Ravuri and Vinyals, NeurIPS 2019).

Each learns from one set of images: `synthetic` ones, `real` ones, or `both`. When to stop, and the temperature of its probabilities, is
told by real validation images in all three cases; what differs is what the weights are trained on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from medsd.errors import InputError
from medsd.evaluation.classification import classification_metrics
from medsd.evaluation.resampling import together
from medsd.evaluation.shares import agreement as share_of_answers
from medsd.models.resnet import ResNet
from medsd.training.discriminative import Labelled, fit_resnet, logits, quick_epochs, scaled

MEASURES = ("auroc", "accuracy", "balanced_accuracy")


def as_labelled(images: torch.Tensor, labels: np.ndarray, channels: int) -> Labelled:
    """Generated images `(N, C, R, R)` in `[-1, 1]`, each of a patient of its own; of their channels the first, that hold no masks."""
    names = np.array([f"generated-{number:06d}" for number in range(len(labels))])
    return Labelled(images[:, :channels], labels, names, names)


def joined(first: Labelled, second: Labelled) -> Labelled:
    """The images of both."""
    images = torch.cat([first.images, second.images])
    columns = ((first.labels, second.labels), (first.patients, second.patients), (first.keys, second.keys))
    return Labelled(images, *(np.concatenate(pair) for pair in columns))


def classifier_utility(
    synthetic: Labelled,
    real: Labelled,
    validation: Labelled,
    test: Labelled,
    class_names: Sequence[str],
    seed: int = 0,
    epochs: int | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """`utility/KIND/NAME` and its `_ci` by patient, for each of `MEASURES` and the KINDs `synthetic`, `real`, `both`; and `reasons`.

    `real` are training images, as many of each class as `synthetic` has, or as there are: see `medsd.inference.judging.matching_places`.
    `utility/KIND/images` is what each learns from. `epochs` default to `quick_epochs`, about as many updates for all.
    Raises InputError where a split has no image; `progress` is called after each epoch.
    """
    for name, part in (("generated", synthetic), ("training", real), ("validation", validation), ("test", test)):
        if not len(part):
            raise InputError(f"--utility: there is no {name} image with a class: prepare data that has some")
    kinds = {"synthetic": synthetic, "real": real, "both": joined(synthetic, real)}
    found = []
    for kind, train in kinds.items():
        model = fit_resnet(train, validation, len(class_names), seed, epochs or quick_epochs(len(train)), progress)
        metrics = classification_metrics(scaled(model, validation, test.images), test.labels, class_names, test.patients)
        names = [*MEASURES, *(f"{name}_ci" for name in MEASURES)]
        reasons = {name: metrics["reasons"][name] for name in names if name in metrics["reasons"]}
        kept = {name: metrics[name] for name in names} | {"images": len(train), "reasons": reasons}
        found.append(together([kept], f"utility/{kind}/"))
    return together(found)


def agreement(
    name: str, model: ResNet, images: torch.Tensor, labels: np.ndarray, class_names: Sequence[str], patients: Sequence[str] | None = None
) -> dict[str, Any]:
    """How often `model`, trained on real images, names the class that images `(N, C, R, R)` in `[-1, 1]` are of.

    The share `name`, `name/CLASS`, intervals and `patients` are those of `medsd.evaluation.shares.agreement`. Of generated images it is
    read beside that of real test images, which says how far the judge can be trusted.
    """
    answers = logits(model, images[:, : model.stem[0].in_channels]).argmax(1)
    return share_of_answers(name, answers, labels, class_names, patients)
