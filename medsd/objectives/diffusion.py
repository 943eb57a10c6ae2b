"""The spine: one number per image that training minimises and classification compares.

Symbols: x_0 a latent, eps noise, x_t = alpha_t x_0 + sigma_t eps, alpha_bar = alpha_t^2, lambda = log SNR =
log(alpha_bar / (1 - alpha_bar)). Noise and timesteps are arguments; nothing here draws a random number.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}


def denoising_error(
    unet: Callable[..., Any],
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor | None,
    loss_type: str = "l2",
) -> torch.Tensor:
    """Error of the prediction, averaged over a latent's elements.

    Args:
        unet: `unet(x_t, timesteps, condition)` -> prediction, as a tensor or with a `.sample`.
        scheduler: a diffusers scheduler; its `prediction_type` says what is predicted.
        latents, noise: `(B, c, h, w)`, unit scale.
        timesteps: `(B,)` integers.
        condition: `(B, tokens, dim)`, or None for a UNet that takes none.
        loss_type: `l2` (Ho et al., 2020), `l1` or `huber`.

    Returns:
        `(B,)` float32.
    """
    prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, condition)
    prediction = getattr(prediction, "sample", prediction).float()
    target = prediction_target(scheduler, latents, noise, timesteps)
    return ELEMENTWISE[loss_type](prediction, target.float(), reduction="none").flatten(1).mean(1)


def prediction_target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet should predict: eps, v = alpha_t eps - sigma_t x_0 (Salimans & Ho, 2022), or x_0; `(B, c, h, w)`."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else latents


def epsilon_error_factor(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Factor `(B,)` from the squared error of the prediction to that of the noise it implies.

    With x_t fixed, eps - eps_hat = alpha_t (v - v_hat) = -(alpha_t / sigma_t) (x_0 - x_0_hat).
    """
    alpha_bar = scheduler.alphas_cumprod.double()[timesteps.cpu()]
    kind = scheduler.config.prediction_type
    factors = {"epsilon": torch.ones_like(alpha_bar), "v_prediction": alpha_bar, "sample": alpha_bar / (1 - alpha_bar)}
    return factors[kind].to(timesteps.device, torch.float32)


def log_snr(scheduler: Any) -> torch.Tensor:
    """lambda of every timestep `(T,)`, float64; -inf where the signal is gone (zero terminal SNR)."""
    alpha_bar = scheduler.alphas_cumprod.double().cpu()
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


def min_snr_weight(scheduler: Any, timesteps: torch.Tensor, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma loss weight `(B,)` (Hang et al., 2023, eq. 5); 1 without a gamma.

    min(SNR, gamma) is the weight of an x_0 loss; it is divided by SNR for eps and by SNR + 1 for v, written so that SNR = 0 is safe.
    """
    if gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = log_snr(scheduler).exp()[timesteps.cpu()]
    kind = scheduler.config.prediction_type
    weights = {"epsilon": (gamma / snr).clamp(max=1), "v_prediction": snr.clamp(max=gamma) / (snr + 1), "sample": snr.clamp(max=gamma)}
    return weights[kind].to(timesteps.device, torch.float32)


def sample_timesteps(count: int, scheduler: Any, generator: torch.Generator) -> torch.Tensor:
    """`(count,)` timesteps, uniform, on the generator's device."""
    return torch.randint(0, scheduler.config.num_train_timesteps, (count,), generator=generator, device=generator.device)
