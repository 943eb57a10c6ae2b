"""Do generated phantom slices look like their class? By features of a CNN, and by where the bleed lies.

    python recipes/prepare_data.py --source phantom --seed 1 --output_dir runs/phantom_1/data
    python benchmarks/phantom_generation.py --pipeline runs/phantom/unet --judge runs/phantom_1/data

The *ratio* of a class is the Frechet distance of its generated images to real images of that class, over the smallest one to real images of
another class, in features of a ResNet that was trained on the `--judge` phantom (other heads). Beside it stands the ratio of as many real
images of the training split, which is what a perfect generator would show.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets

from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import row_labels, unit_batches
from medsd.evaluation.distribution import frechet_distance
from medsd.inference.extractors import ResNetFeatures, extract
from medsd.inference.generating import Sampling, draw_batch
from medsd.training.discriminative import resnet_of

AT_ONCE = 50


def generated(pipe: MedSDPipeline, count: int, sampling: Sampling) -> dict[str, torch.Tensor]:
    """`count` images of each class."""
    starts = range(0, count, AT_ONCE)
    return {
        name: torch.cat([draw_batch(pipe, name, range(start, min(start + AT_ONCE, count)), sampling).images for start in starts])
        for name in pipe.class_names
    }


def real_images(pipe: MedSDPipeline, dataset_name: str, splits: list[str], count: int | None) -> dict[str, torch.Tensor]:
    """The first `count` images of each class."""
    rows = concatenate_datasets([load_dataset(dataset_name, split) for split in splits])
    labels = row_labels(rows)
    chosen = {name: np.flatnonzero(labels == number)[:count] for number, name in enumerate(pipe.class_names)}
    data = pipe.data
    return {
        name: torch.cat(list(unit_batches(rows.select(places), data.intensity_map, data.resolution))) for name, places in chosen.items()
    }


def ratios(images: dict[str, np.ndarray], real: dict[str, np.ndarray]) -> dict[str, tuple[float, float, str]]:
    """Of each class: distance to its own real images, that over the smallest to another class's, and which class that is."""
    found = {}
    for name, features in images.items():
        distances = {other: frechet_distance(features, theirs) for other, theirs in real.items()}
        nearest = min((other for other in real if other != name), key=distances.__getitem__)
        found[name] = (distances[name], distances[name] / distances[nearest], nearest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/phantom/unet")
    parser.add_argument("--dataset_name", default="runs/phantom/data")
    parser.add_argument("--judge", default="runs/phantom_1/data")
    parser.add_argument("--images", type=int, default=150, help="of each class")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--min_probability", type=float, help="draw anew what the classifier gives less, as generate.py does")
    parser.add_argument("--save", type=Path, help="a .npz of the generated images in HU")
    options = parser.parse_args()
    pipe = MedSDPipeline.from_pretrained(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    judge = ResNetFeatures(resnet_of(options.judge, pipe.data.resolution), "resnet")
    sampling = Sampling(options.num_inference_steps, options.guidance_scale, min_probability=options.min_probability)
    drawn = generated(pipe, options.images, sampling)
    sets = {
        "generated": drawn,
        "training": real_images(pipe, options.dataset_name, ["train"], options.images),
        "real": real_images(pipe, options.dataset_name, ["validation", "test"], None),
    }
    features = {kind: {name: extract(judge, images).values for name, images in some.items()} for kind, some in sets.items()}
    for kind in ("generated", "training"):
        for name, (distance, ratio, other) in ratios(features[kind], features["real"]).items():
            print(
                json.dumps({"images": kind, "class": name, "fid": round(distance, 3), "ratio": round(ratio, 3), "next": other}), flush=True
            )
    if options.save:
        np.savez(options.save, **{name: pipe.data.intensity_map.from_unit(images).numpy() for name, images in drawn.items()})


if __name__ == "__main__":
    main()
