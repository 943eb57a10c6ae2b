"""What judging takes once features are there: seconds, and memory, for one, two and four thousand images of 128 px.

    python benchmarks/evaluation_speed.py

Each number of images in a process of its own. Images are made when they are asked for, as they are read from the disk otherwise. Timed is
all that evaluate.py does with generated and real images behind the features: FID, KID and their kin overall and in six classes with
floors and intervals, the audit against as many training images, histograms, and similarity within classes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from medsd.evaluation.distribution import by_class, distribution_metrics
from medsd.evaluation.diversity import class_pairs, pair_similarity
from medsd.evaluation.features import Features
from medsd.evaluation.intensity import class_histograms, intensity_metrics
from medsd.evaluation.memorization import SIDE, feature_neighbours, find_copies, pixel_neighbours
from medsd.inference.judging import picked

CLASSES, SIDE_PX, BATCH = 6, 128, 64


def images(count: int, seed: int) -> Iterator[torch.Tensor]:
    """Smooth random images `(B, 1, 128, 128)` in `[-1, 1]`."""
    for start in range(0, count, BATCH):
        draws = torch.Generator().manual_seed(seed * 1_000_000 + start)
        yield interpolate(torch.randn((min(BATCH, count - start), 1, 16, 16), generator=draws), SIDE_PX, mode="bilinear").clamp(-1, 1)


def judge(count: int, width: int) -> dict[str, float]:
    """Seconds of each part."""
    draws, names = np.random.default_rng(0), [str(number) for number in range(CLASSES)]
    generated, real, other = (Features(draws.normal(size=(count, width)).astype(np.float32), "random") for _ in range(3))
    labels, patients = np.arange(count) % CLASSES, [str(number // 2) for number in range(count)]
    seconds, start = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start
        seconds[name], start = round(time.perf_counter() - start, 1), time.perf_counter()

    distribution_metrics(generated, real, patients, other)
    by_class(generated, labels, real, labels, patients, names, other, labels)
    lap("distributions")
    small = [torch.cat([adaptive_avg_pool2d(batch, SIDE) for batch in images(count, seed)]) for seed in range(3)]
    found = []
    for queries, features, own in ((small[0], generated, None), (small[2], other, patients)):
        pixels = pixel_neighbours(queries, small[1], small[2], own, own and patients)
        near = feature_neighbours(features.values, [real.values, real.values], [other.values], own, own and patients)
        found.append({"pixels": pixels, "features": near})
    find_copies(*found, 0.01)
    lap("audit")
    histograms = [class_histograms((batch[:, 0].numpy() for batch in images(count, seed)), labels, CLASSES, -1.0, 1.0) for seed in (0, 1)]
    intensity_metrics(*histograms, names, "grey value")
    pairs = class_pairs(labels, CLASSES, 0)
    first, second = (torch.stack(picked(images(count, 0), places)) for places in pairs.T)
    pair_similarity("similarity", first, second, labels[pairs[:, 0]], names)
    lap("pixels")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 2000, 4000])
    parser.add_argument("--width", type=int, default=64, help="of the features: 64 of the tiny preset's UNet, 2048 of Inception")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is None:
        for count in options.counts:
            subprocess.run([sys.executable, __file__, "--one", str(count), "--width", str(options.width)], check=True)
        return
    seconds = judge(options.one, options.width)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"images": options.one, "seconds": round(sum(seconds.values()), 1), "peak MiB": round(peak)} | seconds), flush=True)


if __name__ == "__main__":
    main()
