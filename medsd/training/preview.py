"""Looks at a model while it trains: held-out loss at fixed pairs, quick AUROC, and pictures at fixed seeds."""

import numpy as np
import torch
from PIL import Image

from medsd.data.dataset import available_splits, load_dataset
from medsd.data.transforms import recorded_ranges, row_classes
from medsd.evaluation.classification import classification_metrics
from medsd.inference.likelihood import NotFinite, make_plan
from medsd.inference.pictures import grid
from medsd.inference.pipeline import MedSDPipeline
from medsd.models.conditioning import encode, tokenize
from medsd.objectives.diffusion import denoising_error
from medsd.training.prompts import row_prompts

PREVIEW_STEPS = 20
PREVIEW_GUIDANCE = 2.0
QUICK_PAIRS = 8


class HeldOut:
    """A fixed, class-balanced handful of validation images; nothing to say where the data has no validation split.

    Raises InputError for a prompt that the text encoder cannot read.
    """

    def __init__(self, pipe: MedSDPipeline, dataset_name: str, limit: int = 96, seed: int = 0) -> None:
        self.pipe, self.seed = pipe, seed
        self.images: list[np.ndarray] = []
        if "validation" in available_splits(dataset_name):
            rows = load_dataset(dataset_name, "validation")
            rows = rows.select(_balanced(row_classes(rows), limit, seed))
            self.labels, self.ranges, table = row_classes(rows), recorded_ranges(rows), row_prompts(rows, pipe.data)
            self.images, self.patients = list(rows["image"]), list(rows["patient_id"])
            occurring, self.prompts = np.unique(table.numbers, return_inverse=True)
            self.prompt_ids = tokenize(pipe.tokenizer, [table.prompts[number] for number in occurring])

    @property
    def names(self) -> list[str]:
        """What can be measured: nothing without a validation split, no AUROC with one class or findings that can hold together."""
        if not self.images:
            return []
        ranks = not self.pipe.data.multi_label and len(self.pipe.class_names) > 1 and len(set(self.labels)) > 1
        return ["validation_loss", "validation_auroc"] if ranks else ["validation_loss"]

    def numbers(self) -> dict[str, float]:
        """Each of `names`, now."""
        measures = {"validation_loss": self.loss, "validation_auroc": self.auroc}
        return {name: measures[name]() for name in self.names}

    @torch.no_grad()
    def loss(self) -> float:
        """Mean denoising error with each image's own prompt, at the same pairs every time."""
        latents = self.pipe.encode_images(self.images, self.ranges)
        conditions = encode(self.pipe.text_encoder, self.prompt_ids.to(latents.device))[torch.from_numpy(self.prompts).to(latents.device)]
        plan = make_plan(self.pipe.noise_schedule, len(latents), tuple(latents.shape[1:]), seed=self.seed)
        timesteps, noise = plan.timesteps.to(latents.device), plan.noise.to(latents.device)
        return denoising_error(self.pipe.unet, self.pipe.noise_schedule, latents, noise, timesteps, conditions).mean().item()

    def auroc(self) -> float:
        """Macro AUROC from few pairs."""
        try:
            output = self.pipe.classify(self.images, mode="full", max_pairs=QUICK_PAIRS, seed=self.seed, ranges=self.ranges)
        except NotFinite:
            return float("nan")
        return classification_metrics(output.probabilities, self.labels, self.pipe.class_names, self.patients, resamples=1)["auroc"]


def _balanced(labels: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Up to `limit` indices, taken from the classes in turn."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:limit]


def preview(pipe: MedSDPipeline, columns: int = 4, seed: int = 0) -> Image.Image:
    """A row of generated images per class, the same start noise in every row."""
    rows = []
    for name in pipe.class_names or [None]:
        generators = [torch.Generator().manual_seed(seed + column) for column in range(columns)]
        images = pipe(
            class_name=name,
            num_images_per_prompt=columns,
            generator=generators,
            num_inference_steps=PREVIEW_STEPS,
            guidance_scale=PREVIEW_GUIDANCE if name else 1.0,
            output_type="pt",
        ).images
        rows.append(images * 2 - 1)
    return grid(torch.stack(rows), pipe.class_names)
