"""`MedSDPipeline` as a classifier: images -> latents -> class probabilities, and their calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from medsd.data.dataset import DataInfo
from medsd.data.files import pixels_of
from medsd.data.geometry import fit_square
from medsd.data.intensity import label_channels
from medsd.data.transforms import to_unit
from medsd.errors import InputError
from medsd.inference.folder import PipelineInfo
from medsd.inference.likelihood import Calibration, fit_calibration, make_plan, posterior, score_classes
from medsd.models.codec import Codec

ENCODE_BATCH = 32


@dataclass(frozen=True)
class ClassifyOutput:
    """Of N images and K classes."""

    predictions: list[str]
    """Class names (prompts, where the folder has no classes)."""
    probabilities: np.ndarray
    """`(N, K)`, rows sum to 1."""
    calibrated: bool
    """Whether a temperature and class bias stand behind the probabilities; without, they are far too sure."""
    log_likelihoods: np.ndarray
    """`(N, K)` nats, up to a constant per image."""
    standard_errors: np.ndarray
    """`(N, K)` nats, of the difference to the leading class."""
    pairs: np.ndarray
    """`(N, K)` (timestep, noise) pairs spent."""
    rows: np.ndarray
    """`(N,)` UNet rows spent."""


class ScoringMixin:
    """What a pipeline scores with; it brings UNet, codec, data and noise schedule."""

    unet: Any
    info: PipelineInfo
    codec: Codec
    data: DataInfo
    class_names: list[str]
    noise_schedule: Any

    @torch.no_grad()
    def classify(
        self,
        images: Sequence[np.ndarray | Image.Image],
        prompts: Sequence[str] | None = None,
        mode: str = "posterior",
        weighting: str = "uniform",
        max_pairs: int = 64,
        delta: float = 0.05,
        prior: np.ndarray | None = None,
        batch_size: int = 64,
        seed: int = 0,
        progress: Callable[[int], None] = lambda rows: None,
        ranges: np.ndarray | None = None,
    ) -> ClassifyOutput:
        """Class probabilities of images by the Diffusion Classifier (Li et al., ICCV 2023).

        Args:
            images: arrays `(C, H, W)` in the source's unit (see `medsd.read_image`), or PIL images.
            prompts: one per class, instead of the pipeline's own classes.
            mode, weighting, max_pairs, delta, batch_size, seed, progress: see `medsd.inference.likelihood`.
            prior: class prior `(K,)`; default uniform.
            ranges: see `encode_images`.

        Raises InputError for fewer than two classes, for findings that can hold together, or images that do not fit.
        """
        if prompts is None and self.data.multi_label:
            raise InputError(
                "several findings can hold in one image, and such sets are not scored yet: give prompts=[...] that exclude "
                "each other, or generate images by finding"
            )
        names, prompts = (self.class_names, self.data.prompts) if prompts is None else (list(prompts), list(prompts))
        if len(prompts) < 2:
            raise InputError(f"{len(prompts)} classes: classification needs two or more; give prompts=[...]")
        calibration = self.info.calibration if names == self.class_names and weighting == "uniform" else None
        latents = self.encode_images(images, ranges)
        plan = make_plan(self.noise_schedule, max_pairs, tuple(latents.shape[1:]), weighting, seed)
        conditions = self.encode_prompts(prompts)
        scores = score_classes(
            self._predict, self.noise_schedule, latents, conditions, plan, mode, delta, calibration, prior, batch_size, progress
        )
        probabilities = posterior(scores.log_likelihoods, calibration, prior)
        predictions = [names[index] for index in probabilities.argmax(1)]
        return ClassifyOutput(predictions, probabilities, calibration is not None, **vars(scores), rows=scores.rows)

    def _predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The UNet in its own precision, without a variance that it may have learned."""
        return self.unet(x_t.to(self.unet.dtype), timesteps, condition.to(self.unet.dtype)).sample[:, : x_t.shape[1]]

    def calibrate(
        self,
        images: Sequence[np.ndarray | Image.Image],
        labels: Sequence[str | int],
        max_pairs: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        progress: Callable[[int], None] = lambda rows: None,
        ranges: np.ndarray | None = None,
    ) -> Calibration:
        """Fit temperature and class bias on labelled held-out images, with all pairs and uniform weights.

        They are kept in `medsd.json` and used by `classify`. `labels` are class names or indices, `ranges` as in
        `encode_images`. Raises InputError for an unknown class and for a class without an image.
        """
        indices = np.array([self._class_index(label) for label in labels])
        missing = sorted(set(range(len(self.class_names))) - set(indices.tolist()))
        if missing:
            raise InputError(
                f"no image of {self.class_names[missing[0]]} to calibrate on: take more images, or do without (--calibrate none)"
            )
        output = self.classify(images, mode="full", max_pairs=max_pairs, batch_size=batch_size, seed=seed, progress=progress, ranges=ranges)
        calibration = fit_calibration(output.log_likelihoods, indices)
        self.info = replace(self.info, calibration=calibration)
        return calibration

    def _class_index(self, label: str | int) -> int:
        if label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int | np.integer) and 0 <= label < len(self.class_names):
            return int(label)
        raise InputError(f'unknown class "{label}"; this pipeline knows {", ".join(self.class_names) or "none"}')

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray | Image.Image], ranges: np.ndarray | None = None) -> torch.Tensor:
        """Latents `(N, c, h, w)` of images in the source's unit, brought to the model's resolution.

        `ranges` `(N, C, 2)`, low and high of each channel, are for an intensity map that is recorded per image; without them
        each image is measured.
        """
        if not len(images):
            raise InputError("no image to encode")
        if ranges is not None and len(ranges) != len(images):
            raise InputError(f"{len(ranges)} ranges for {len(images)} images: one per image is expected")
        fitted, device = [self._fit(image) for image in images], self._execution_device
        latents = []
        for start in range(0, len(fitted), ENCODE_BATCH):
            part = slice(start, start + ENCODE_BATCH)
            batch = torch.from_numpy(np.stack(fitted[part]).astype(np.float32)).to(device)
            own = None if ranges is None else torch.as_tensor(ranges[part], dtype=torch.float32, device=device)
            latents.append(self.codec.encode(to_unit(batch, self.data.intensity_map, own)))
        return torch.cat(latents)

    def _fit(self, image: np.ndarray | Image.Image) -> np.ndarray:
        pixels = pixels_of(image) if isinstance(image, Image.Image) else np.asarray(image)
        expected, data = self.data.image_channels, self.data
        if pixels.ndim != 3:
            raise InputError(f"an image of shape {pixels.shape}; (channels, height, width) is expected, as medsd.read_image gives")
        if len(pixels) == 1 and expected == 3:
            pixels = pixels.repeat(3, 0)
        if len(pixels) != expected:
            raise InputError(f"an image of {len(pixels)} channels; this pipeline was trained on images of {expected}")
        grey = expected - label_channels(data.intensity_map, expected)
        parts = [(pixels[:grey], False), (pixels[grey:], True)]
        return np.concatenate([fit_square(part, data.resolution, data.resize, nearest)[0] for part, nearest in parts if len(part)])
