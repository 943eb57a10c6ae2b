"""Pipelines of one data set side by side: how well they classify, what a score costs, and how well they draw.

    python benchmarks/compare_models.py --dataset_name runs/phantom/data --pipelines runs/phantom/unet runs/phantom/discriminative

Each has been scored into PIPELINE-scores (`python recipes/classify.py --pipeline PIPELINE --dataset_name runs/phantom/data --max_pairs 24
--output_dir PIPELINE-scores`). *FID* is the Frechet distance (Heusel et al., 2017) between the test images and
as many drawn ones, the classes as often, in the features of a ResNet that was trained on the training images (`resnet.py`); its floor is
that between the validation and the test images. Images per second are those of training, from `environment.json`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from medsd import MedSDPipeline
from medsd.evaluation.distribution import frechet_distance
from medsd.inference.extractors import ResNetFeatures, extract
from medsd.training.discriminative import Labelled, fit_resnet, read_labelled

METRICS = ("auroc", "balanced_accuracy", "nll", "ece", "rows_per_image")
DRAWN_AT_ONCE = 50
EPOCHS = 6
"""Of the ResNet: enough to tell the classes."""


def drawn(pipe: MedSDPipeline, labels: np.ndarray, guidance: float) -> torch.Tensor:
    """As many images of each class as there are labels of it, `(N, C, R, R)` in `[-1, 1]`."""
    found = []
    for label, count in enumerate(np.bincount(labels)):
        wanted = {"class_name": pipe.class_names[label], "guidance_scale": guidance, "output_type": "pt"}
        for start in range(0, count, DRAWN_AT_ONCE):
            draws, some = torch.Generator().manual_seed(start), min(DRAWN_AT_ONCE, count - start)
            found.append(pipe(num_images_per_prompt=some, generator=draws, **wanted).images)
    return 2 * torch.cat(found) - 1


def row(pipeline: str, test: Labelled, judge: ResNetFeatures, real: np.ndarray, guidance: float) -> dict[str, float]:
    scores = json.loads(Path(f"{pipeline}-scores", "metrics.json").read_text())
    environment = json.loads(Path(pipeline, "environment.json").read_text())
    pipe = MedSDPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    found = {name: scores[name] for name in METRICS}
    found |= {f"{name}_ci": scores[f"{name}_ci"] for name in METRICS[:2]}
    found["images_per_second"] = environment["profile"]["images_per_second"]
    return found | {"fid": frechet_distance(extract(judge, drawn(pipe, test.labels, guidance)).values, real)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--pipelines", nargs="+", required=True)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    options = parser.parse_args()
    parts = {split: read_labelled(options.dataset_name, split) for split in ("train", "validation", "test")}
    model = fit_resnet(parts["train"], parts["validation"], int(parts["train"].labels.max()) + 1, seed=0, epochs=EPOCHS)
    judge = ResNetFeatures(model, "resnet")
    real = extract(judge, parts["test"].images).values
    print({"fid floor": round(frechet_distance(extract(judge, parts["validation"].images).values, real), 4)}, flush=True)
    for pipeline in options.pipelines:
        found = row(pipeline, parts["test"], judge, real, options.guidance_scale)
        print(pipeline, {name: np.round(value, 4).tolist() for name, value in found.items()}, flush=True)


if __name__ == "__main__":
    main()
