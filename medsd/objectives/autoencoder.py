"""What an autoencoder minimises, one number per image each: how far the reconstruction is off, and a penalty on its code."""

from collections.abc import Callable

import torch

from medsd.objectives.diffusion import ELEMENTWISE

LOSSES = {**ELEMENTWISE, "huber": ELEMENTWISE["smooth_l1"]}
"""By `loss_type`; here, without timesteps, `huber` is another name of `smooth_l1`."""

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Reconstruction and images, both `(B, C, H, W)` in `[-1, 1]` -> `(B,)`."""
Penalty = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The two tensors that a training pass returns beside the reconstruction -> `(B,)`."""


def reconstruction_error(reconstruction: torch.Tensor, images: torch.Tensor, loss_type: str = "l1") -> torch.Tensor:
    """Mean over an image's elements, `(B,)`; both `(B, C, H, W)` in `[-1, 1]`, the reconstruction not clipped."""
    return LOSSES[loss_type](reconstruction.float(), images.float(), reduction="none").flatten(1).mean(1)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats per latent element, `(B,)` (Kingma & Welling, 2014, appendix B)."""
    return 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).flatten(1).mean(1)


def codebook_loss(encoded: torch.Tensor, entries: torch.Tensor, commitment: float) -> torch.Tensor:
    """Squared distance of codebook entries to latents, plus `commitment` times that of latents to entries, `(B,)`.

    Each term moves its own side alone (van den Oord et al., 2017, eq. 3). Both `(B, c, h, w)`.
    """
    to_latents = (entries - encoded.detach()).square().flatten(1).mean(1)
    to_entries = (encoded - entries.detach()).square().flatten(1).mean(1)
    return to_latents + commitment * to_entries


class WeightedSum(torch.nn.Module):
    """Several distances as one, each with its weight."""

    def __init__(self, parts: list[tuple[float, Distance]]) -> None:
        super().__init__()
        self.weights, self.distances = zip(*parts, strict=True)
        self.networks = torch.nn.ModuleList([distance for distance in self.distances if isinstance(distance, torch.nn.Module)])

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Of both `(B, C, H, W)` in `[-1, 1]`, one number per image `(B,)`."""
        parts = zip(self.weights, self.distances, strict=True)
        return torch.stack([weight * distance(reconstruction, images) for weight, distance in parts]).sum(0)
