"""What the audit finds: copies of a model that was overfit, copies that were planted, and false alarms where nothing can have been copied.

    accelerate launch recipes/finetune_unet.py --max_train_samples 16 --max_train_steps 8000 --output_dir runs/phantom/overfit
    python benchmarks/audit.py --pipeline runs/phantom/unet --overfit runs/phantom/overfit

*Unseen*: samples of `--pipeline` against the patients of the test split as if it had been trained on them, those of validation held out,
and the other way round.
*Planted*: 5 % of its samples are replaced by training images that are mirrored, brighter, or moved by 4 px. *Overfit*: samples of
`--overfit` against the whole training split, of which it saw 16 images. Validation and test patients are held out in the last two.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets

from medsd import MedSDPipeline, load_dataset
from medsd.data.transforms import column
from medsd.evaluation.memorization import audit_summary
from medsd.inference.auditing import Seen, audit_rows, unit_images
from medsd.inference.extractors import extract, load_extractor
from medsd.inference.generating import Sampling, draw_batch

AT_ONCE = 50
PLANTED = 0.05
CHANGES = {
    "mirrored": lambda image: image.flip(-1),
    "brighter": lambda image: (0.85 * image + 0.1).clamp(-1, 1),
    "moved": lambda image: torch.roll(image, (4, -4), (1, 2)),
}


def samples_of(pipe: MedSDPipeline, count: int, seed: int) -> torch.Tensor:
    """`count` images, the classes alike, each from noise of its own."""
    names = pipe.class_names or [None]
    each = -(-count // len(names))
    parts = [
        draw_batch(pipe, name, range(start, min(start + AT_ONCE, first + each)), Sampling(seed=seed)).images
        for name, first in zip(names, range(0, each * len(names), each), strict=True)
        for start in range(first, first + each, AT_ONCE)
    ]
    return torch.cat(parts)[:count]


def flagged(pipe: MedSDPipeline, samples: torch.Tensor, training: object, held_out: object, rate: float) -> tuple[object, dict]:
    """Findings and their summary."""
    extractor, batches = load_extractor("unet", pipe, pipe.device), samples.split(AT_ONCE)
    ours = Seen.of(lambda: iter(batches), extract(extractor, iter(batches)).values)
    found, rate = audit_rows(extractor, ours, pipe.data, training, held_out, rate)
    return found, audit_summary(found, rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="runs/phantom/unet")
    parser.add_argument("--overfit", default="runs/phantom/overfit")
    parser.add_argument("--dataset_name", default="runs/phantom/data")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--picture", type=Path, help="flagged samples of the overfit model beside what they copy")
    options = parser.parse_args()
    train, validation, test = (load_dataset(options.dataset_name, split) for split in ("train", "validation", "test"))
    others = concatenate_datasets([validation, test])
    pipe, overfit = (MedSDPipeline.from_pretrained(name) for name in (options.pipeline, options.overfit))
    for some in (pipe, overfit):
        some.set_progress_bar_config(disable=True)

    samples = samples_of(pipe, options.samples, seed=1000)
    for against, held_out in ((test, validation), (validation, test)):
        _, summary = flagged(pipe, samples, against, held_out, options.rate)
        print(json.dumps({"run": "unseen"} | summary), flush=True)

    count = round(PLANTED * len(samples))
    chosen = train.select(np.random.default_rng(0).choice(len(train), count, replace=False))
    originals = torch.cat(list(unit_images(pipe.data, chosen)()))
    changes = [list(CHANGES)[number % len(CHANGES)] for number in range(count)]
    planted = torch.stack([CHANGES[change](image) for change, image in zip(changes, originals, strict=True)])
    found, summary = flagged(pipe, torch.cat([planted, samples[count:]]), train, others, options.rate)
    named = np.array(column(train, "key").to_pylist())[found.nearest[:count]] == np.array(column(chosen, "key").to_pylist())
    by_change = {change: round(float(found.flagged[:count][np.array(changes) == change].mean()), 3) for change in CHANGES}
    told = {"planted": count, "found": round(float(found.flagged[:count].mean()), 3), "named": round(float(named.mean()), 3)} | by_change
    print(json.dumps({"run": "planted"} | told | {"false": round(float(found.flagged[count:].mean()), 4)} | summary), flush=True)

    found, summary = flagged(overfit, samples_of(overfit, 256, seed=1000), train, others, options.rate)
    print(json.dumps({"run": "overfit"} | summary), flush=True)


if __name__ == "__main__":
    main()
