"""What an autoencoder minimises: reconstruction and the posterior's distance from a unit Gaussian, one number per image each."""

import torch

from medsd.objectives.diffusion import ELEMENTWISE


def reconstruction_error(reconstruction: torch.Tensor, images: torch.Tensor, loss_type: str = "l1") -> torch.Tensor:
    """Mean over an image's elements, `(B,)`; both `(B, C, H, W)` in `[-1, 1]`, the reconstruction not clipped."""
    return ELEMENTWISE[loss_type](reconstruction.float(), images.float(), reduction="none").flatten(1).mean(1)


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats per latent element, `(B,)` (Kingma & Welling, 2014, appendix B)."""
    return 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).flatten(1).mean(1)
