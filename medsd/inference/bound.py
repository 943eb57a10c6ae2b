"""What a model says of single images with their own prompts: denoising losses, and a bound on their likelihood in bits per dimension."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from medsd.data.intensity import unit_steps
from medsd.data.transforms import to_unit
from medsd.errors import InputError
from medsd.inference.calibration import Belief, Calibration
from medsd.inference.plan import Plan, pair_noise
from medsd.inference.race import Full
from medsd.inference.scoring import ScoringMixin
from medsd.models.codec import PixelCodec
from medsd.objectives.diffusion import epsilon_error_factor, log_snr


class BoundMixin(ScoringMixin):
    """What a pipeline says of images without asking which class is the likelier."""

    @torch.no_grad()
    def own_losses(self, latents: torch.Tensor, prompts: Sequence[str], plan: Plan) -> np.ndarray:
        """Weighted denoising error of each image with its own prompt at every pair of the plan: `(N, P)` float32 nats.

        `latents` `(N, c, h, w)`, N `prompts`; pairs are shared by all images, so that images can be compared. Raises NotFinite, an
        InputError.
        """
        losses, asked = np.empty((len(latents), len(plan)), np.float32), np.asarray(prompts)
        alone = Belief(Calibration.none(1))
        for prompt in sorted(set(prompts)):
            own = np.flatnonzero(asked == prompt)
            some, condition = latents[torch.from_numpy(own).to(latents.device)], self.encode_prompts([prompt])
            scores = self._score(some, condition, plan, Full(), alone, "fp32", self.batch_rows(), lambda rows: None)
            losses[own] = scores.losses[:, 0]
        return losses

    @torch.no_grad()
    def bits_per_dimension(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], ranges: np.ndarray | None = None, pairs: int = 128, seed: int = 0
    ) -> np.ndarray:
        """Upper bound on -log2 P(image | prompt) / D, `(N,)`, by the evidence lower bound (Kingma et al., NeurIPS 2021, eqs. 11-17).

        D is the number of values of the image in `[-1, 1]`. An image of integers stands for the box around it, over which uniform noise
        spreads it (dequantisation). Prior and reconstruction are exact, the rest is a mean over shared pairs.

        Args:
            images: `(C, H, W)` in the source's unit, integers.
            prompts: N.
            ranges: as in `encode_images`.
            pairs: (timestep, noise) pairs an image.

        Raises InputError for a model with an autoencoder, which has no likelihood of pixels, and for images that are not integers.
        """
        codec, data = self.codec, self.data
        if not isinstance(codec, PixelCodec):
            raise InputError("bits per dimension need a likelihood of pixels, and this model's autoencoder has none")
        if not all(np.issubdtype(np.asarray(image).dtype, np.integer) for image in images):
            raise InputError("bits per dimension are those of integers, and these images are not")
        fitted = torch.from_numpy(np.stack([self.fit_image(image) for image in images]).astype(np.float32))
        unit = to_unit(fitted, data.intensity_map, None if ranges is None else torch.as_tensor(ranges, dtype=torch.float32))
        steps = np.broadcast_to(unit_steps(data.intensity_map, data.image_channels, ranges), unit.shape[:2])
        spread = torch.rand(unit.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
        dequantised = unit + spread * torch.from_numpy(steps.astype(np.float32))[:, :, None, None]
        size = unit[0].numel()
        nats = self.latent_bound(codec.encode(dequantised).to(self.unet.device), prompts, pairs, seed) + size * math.log(codec.std)
        return nats / (size * math.log(2)) - np.log2(steps).mean(1)

    def latent_bound(self, latents: torch.Tensor, prompts: Sequence[str], pairs: int = 128, seed: int = 0) -> np.ndarray:
        """Upper bound on -log p(latent | prompt), a density, `(N,)` float64 nats."""
        schedule, shape = self.noise_schedule, tuple(latents.shape[1:])
        plan = spanning_plan(schedule, pairs, shape, seed)
        return prior_divergence(schedule, latents) + reconstruction(schedule, shape) + self.own_losses(latents, prompts, plan).mean(1)


def spanning_plan(schedule: Any, pairs: int, shape: tuple[int, ...], seed: int) -> Plan:
    """Pairs spread evenly over the log SNR, each of which counts the same: the integral by the trapezoid rule over the timesteps."""
    lambdas = log_snr(schedule)
    lambdas = lambdas[torch.isfinite(lambdas)]
    spans = pad(-lambdas.diff() / 2, (1, 0)) + pad(-lambdas.diff() / 2, (0, 1))
    ends = spans.cumsum(0) / spans.sum()
    shift = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    timesteps = torch.searchsorted(ends, (torch.arange(pairs) + shift) / pairs).clamp(max=len(ends) - 1)
    nats = 0.5 * math.prod(shape) * spans.sum() * epsilon_error_factor(schedule, timesteps).double()
    noise = torch.stack([pair_noise(seed, pair, shape) for pair in range(pairs)])
    return Plan(timesteps, noise, nats.float(), timesteps.double() / len(ends))


def prior_divergence(schedule: Any, latents: torch.Tensor) -> np.ndarray:
    """KL(q(x_T | x_0) || N(0, 1)) of each image, `(N,)` nats."""
    kept = schedule.alphas_cumprod[-1].double().item()
    energy = latents.double().square().flatten(1).sum(1).cpu().numpy()
    return 0.5 * (kept * energy - latents[0].numel() * (kept + math.log1p(-kept)))


def reconstruction(schedule: Any, shape: tuple[int, ...]) -> float:
    """E -log p(x_0 | x_t) at the least noise, whose Gaussian is as wide as that noise; nats."""
    log_ratio = -log_snr(schedule)[0].item()
    return 0.5 * math.prod(shape) * (math.log(2 * math.pi) + log_ratio + 1)
