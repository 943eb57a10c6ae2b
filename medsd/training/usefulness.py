"""From a pipeline's generated images to what others learn from them: classifiers, and a segmentation where masks are generated too."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from medsd.data.dataset import available_splits, load_dataset, load_info
from medsd.data.intensity import label_channels
from medsd.data.transforms import column
from medsd.errors import InputError
from medsd.evaluation.resampling import together
from medsd.inference.auditing import unit_images
from medsd.inference.judging import Judged, judged_rows, matching_places
from medsd.inference.pipeline import MedSDPipeline
from medsd.training.discriminative import read_labelled, resnet_of
from medsd.training.segmentation import Pairs, check_segmentation, mask_labels, segmentation_utility
from medsd.training.utility import agreement, as_labelled, classifier_utility

NEEDED = ("train", "validation", "test")


def check_utility(pipe: MedSDPipeline, dataset_name: str) -> None:
    """Raise InputError where a split is missing, or the data's classes are not the pipeline's, or do not exclude each other."""
    if missing := set(NEEDED) - set(available_splits(dataset_name)):
        raise InputError(f"--utility trains and tests on real images too, and {dataset_name} has no {sorted(missing)[0]} split")
    if pipe.data.multi_label or len(pipe.class_names) < 2:
        raise InputError("--utility is for two or more classes that exclude each other: leave it away")
    info = load_info(dataset_name)
    if info.class_names != pipe.class_names or info.intensity != pipe.data.intensity:
        raise InputError(f"--utility is for data with the classes and intensities of the pipeline, not for {dataset_name}: leave it away")
    if mask_labels(pipe.data.intensity_map):
        check_segmentation(pipe.data.resolution)


def utility_of(
    pipe: MedSDPipeline, dataset_name: str, judged: Judged, seed: int, progress: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """`classifier_utility`, `agreement` of the generated images, and of real test images, with a ResNet trained on real ones; and
    `segmentation_utility` where the pipeline draws masks. Raises InputError as `check_utility` does.
    """
    check_utility(pipe, dataset_name)
    data, names = pipe.data, pipe.class_names
    real, validation, test = (read_labelled(dataset_name, split, data.resolution) for split in NEEDED)
    wanted = np.bincount(judged.labels, minlength=len(names))
    matched = np.zeros(len(real), bool)
    matched[matching_places(real.labels, wanted, seed)] = True
    images = torch.cat(list(judged.batches()))
    synthetic = as_labelled(images, judged.labels, real.images.shape[1])
    judge = resnet_of(dataset_name, data.resolution)
    found = [
        agreement("agreement", judge, synthetic.images, synthetic.labels, names),
        agreement("agreement_of_real", judge, test.images, test.labels, names, test.patients.tolist()),
        classifier_utility(synthetic, real[matched], validation, test, names, seed, progress=progress),
    ]
    if label_channels(data.intensity_map, data.image_channels):
        found.append(_segmentation(pipe, dataset_name, images, wanted, seed, progress))
    return together(found)


def _segmentation(
    pipe: MedSDPipeline, dataset_name: str, images: torch.Tensor, wanted: np.ndarray, seed: int, progress: Callable[[], Any]
) -> dict[str, Any]:
    labels = mask_labels(pipe.data.intensity_map)
    rows = {split: load_dataset(dataset_name, split) for split in NEEDED}
    training, shown = judged_rows(pipe, dataset_name, "train")
    rows["train"] = training.select(matching_places(shown, wanted, seed))
    real = {split: Pairs.of(torch.cat(list(unit_images(pipe.data, some)())), labels) for split, some in rows.items()}
    patients = column(rows["test"], "patient_id").to_pylist()
    return segmentation_utility(Pairs.of(images, labels), *(real[split] for split in NEEDED), patients, labels, seed, progress=progress)
