"""Pictures of a report: images of each class, one on its way out of noise, and samples beside what they may be copies of."""

from typing import Any

import numpy as np
import torch

from medsd.data.transforms import unit_batches
from medsd.evaluation.memorization import Findings
from medsd.inference.auditing import unit_images
from medsd.inference.generating import Sampling, draw_batch
from medsd.inference.judging import Judged, picked
from medsd.inference.pictures import shown
from medsd.inference.pipeline import MedSDPipeline
from medsd.models.codec import PixelCodec, reconstruct

SHOWN = 6
"""Images of each class."""
FRAMES = 8
PAIRS = 16
"""Flagged samples at most."""
FEWEST_PAIRS = 4
"""Samples that are shown also where fewer are flagged."""


def class_grids(pipe: MedSDPipeline, rows: Any, labels: np.ndarray, judged: Judged) -> dict[str, np.ndarray]:
    """`real`, `reconstructed` (with an autoencoder) and `generated` images of each class, `(K, n, H, W[, 3])` uint8.

    `rows` with class indices `labels` `(N,)`. Where a class has fewer than `SHOWN`, its row ends in black.
    """
    kinds = range(len(judged.class_names))
    real, generated = ([np.flatnonzero(some == number)[:SHOWN] for number in kinds] for some in (labels, judged.labels))
    images = {"real": picked(unit_images(pipe.data, rows)(), np.concatenate(real))}
    if not isinstance(pipe.codec, PixelCodec):
        images["reconstructed"] = list(reconstruct(pipe.codec, torch.stack(images["real"]), pipe.device))
    images["generated"] = picked(judged.batches(), np.concatenate(generated))
    counts = {kind: [len(places) for places in (generated if kind == "generated" else real)] for kind in images}
    return {kind: _grid([shown(image) for image in some], counts[kind]) for kind, some in images.items()}


def _grid(views: list[np.ndarray], counts: list[int]) -> np.ndarray:
    """Views in rows of so many each, `(K, n, H, W[, 3])`."""
    sheet, left = np.zeros((len(counts), max(counts), *views[0].shape), np.uint8), iter(views)
    for row, count in zip(sheet, counts, strict=True):
        for place in range(count):
            row[place] = next(left)
    return sheet


def denoising_strips(pipe: MedSDPipeline, judged: Judged, sampling: Sampling) -> np.ndarray:
    """An image of each class, `(K, frames, H, W[, 3])` uint8 from noise on."""
    films = [draw_batch(pipe, name, [0], sampling, filmed=1).frames[0] for name in judged.class_names]
    steps = np.unique(np.linspace(0, len(films[0]) - 1, FRAMES).round().astype(int))
    return np.stack([[shown(film[step]) for step in steps] for film in films])


def suspects(pipe: MedSDPipeline, judged: Judged, found: Findings, training: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The samples that are most alike training images, those images, `(n, H, W[, 3])` uint8, and what the audit says of each."""
    worst = np.argsort(found.scores)[: max(FEWEST_PAIRS, min(PAIRS, int(found.flagged.sum())))]
    samples, near = picked(judged.batches(), worst), training.select(found.nearest[worst])
    neighbours = [image for batch in unit_batches(near, pipe.data.intensity_map, pipe.data.resolution) for image in batch]
    verdicts = ["copy" if found.copies[place] else "flagged" if found.flagged[place] else "not flagged" for place in worst]
    captions = [f"{verdict}, {found.scores[place]:.1f} by {found.space[place]}" for verdict, place in zip(verdicts, worst, strict=True)]
    return *(np.stack([shown(image) for image in some]) for some in (samples, neighbours)), captions
