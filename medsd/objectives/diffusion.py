"""The spine: one number per image that training minimises and classification compares.

Symbols: x_0 a latent, eps noise, x_t = alpha_t x_0 + sigma_t eps, alpha_bar = alpha_t^2, lambda = log SNR =
log(alpha_bar / (1 - alpha_bar)), beta_t = 1 - alpha_bar_t / alpha_bar_(t-1). Noise and timesteps are arguments; what draws
noise takes a source of random numbers. An *error* is one number per image; an *element loss* is one per element of a latent.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from medsd.errors import InputError
from medsd.randomness import Randomness, normal

ElementLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`loss(prediction (B, c, h, w), target (B, c, h, w), timesteps (B,))` -> `(B, c, h, w)`."""

ELEMENTWISE: dict[str, Callable[..., torch.Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
"""Losses that are the same at every timestep: Ho et al. (2020), the absolute error, and Girshick (2015) with beta 1."""

VLB_WEIGHT = 0.001
"""Weight of the variational bound beside the simple loss (Nichol & Dhariwal, 2021, eq. 16)."""


def squared(prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """The `ElementLoss` of Ho et al. (2020), eq. 14: the squared difference."""
    return F.mse_loss(prediction, target, reduction="none")


@dataclass(frozen=True)
class PseudoHuber:
    """The `ElementLoss` 2 c (sqrt(d^2 + c^2) - c) of a difference d: about d^2 where d is below c, about 2 c |d| above.

    With a c per timestep it is the scheduled pseudo-Huber loss (Khrapov et al., 2024).
    """

    c: torch.Tensor
    """`(T,)` float32, the threshold of every timestep."""

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """An `ElementLoss`, `(B, c, h, w)`."""
        c = _at(self.c, timesteps)
        return 2 * c * (torch.sqrt((prediction - target) ** 2 + c**2) - c)


def huber_thresholds(scheduler: Any, huber_schedule: str, huber_c: float) -> torch.Tensor:
    """The pseudo-Huber loss's c of every timestep, `(T,)` float32 (Khrapov et al., 2024; names and formulas of kohya's sd-scripts).

    `constant`: c = huber_c. `exponential`: c = huber_c^(t / T). `snr`: c = (1 - huber_c) / (1 + s)^2 + huber_c with
    s = sqrt((1 - alpha_bar) / alpha_bar), which is huber_c where the signal is gone. The last two fall from about 1 to huber_c.

    Raises InputError for another schedule and for a huber_c that is not positive.
    """
    if huber_c <= 0:
        raise InputError(f"huber_c {huber_c}: the threshold must be positive, such as 0.1")
    steps, noise_to_signal = scheduler.config.num_train_timesteps, (-0.5 * log_snr(scheduler)).exp()
    schedules = {
        "constant": torch.full((steps,), huber_c),
        "exponential": torch.exp(math.log(huber_c) * torch.arange(steps, dtype=torch.float64) / steps),
        "snr": (1 - huber_c) / (1 + noise_to_signal) ** 2 + huber_c,
    }
    if huber_schedule not in schedules:
        raise InputError(f"huber_schedule {huber_schedule} is none of {', '.join(schedules)}")
    return schedules[huber_schedule].float()


def elementwise_loss(loss_type: str, scheduler: Any, huber_schedule: str = "snr", huber_c: float = 0.1) -> ElementLoss:
    """The loss by its name: `l2`, `l1`, `smooth_l1`, or `huber`, the pseudo-Huber loss whose threshold follows `huber_schedule`.

    Raises InputError for another name; see `huber_thresholds` for the schedules.
    """
    if loss_type == "huber":
        return PseudoHuber(huber_thresholds(scheduler, huber_schedule, huber_c))
    if loss_type not in ELEMENTWISE:
        raise InputError(f"loss_type {loss_type} is none of {', '.join(ELEMENTWISE)}, huber")
    measure = ELEMENTWISE[loss_type]
    return lambda prediction, target, timesteps: measure(prediction, target, reduction="none")


def denoising_error(
    unet: Callable[..., Any],
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor | None,
    loss: ElementLoss = squared,
    emphasis: torch.Tensor | None = None,
    perturbation: torch.Tensor | None = None,
) -> torch.Tensor:
    """Error of the prediction, averaged over a latent's elements.

    Args:
        unet: `unet(x_t, timesteps, condition)` -> prediction, as a tensor or with a `.sample`; a UNet that learns its
            variance gives `2c` channels, of which the first c are the prediction.
        scheduler: a diffusers scheduler; its `prediction_type` says what is predicted.
        latents, noise: `(B, c, h, w)`, unit scale.
        timesteps: `(B,)` integers.
        condition: `(B, tokens, dim)`, or None for a UNet that takes none.
        loss: what an element's error is.
        emphasis: `(B, 1, h, w)` weights of places, with mean 1 per image; see `lesion_emphasis`.
        perturbation: `(B, c, h, w)`, added to the noise in x_t but not to the target (Ning et al., 2023).

    Returns:
        `(B,)` float32.

    Raises:
        InputError: where the UNet gives neither c nor 2c channels.
    """
    return _mean(denoising_elements(unet, scheduler, latents, noise, timesteps, condition, loss, perturbation), emphasis)


def denoising_elements(
    unet: Callable[..., Any],
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor | None,
    loss: ElementLoss = squared,
    perturbation: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `denoising_error` averages: the error of every element, `(B, c, h, w)` float32."""
    channels = latents.shape[1]
    output = _call(unet, scheduler, latents, noise, timesteps, condition, perturbation)
    if output.shape[1] not in (channels, 2 * channels):
        raise InputError(f"the UNet gives {output.shape[1]} channels for latents of {channels}: it must give as many, or twice as many")
    target = prediction_target(scheduler, latents, noise, timesteps).float()
    return loss(output[:, :channels], target, timesteps)


def hybrid_error(
    unet: Callable[..., Any],
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor | None,
    loss: ElementLoss = squared,
    emphasis: torch.Tensor | None = None,
    perturbation: torch.Tensor | None = None,
) -> torch.Tensor:
    """`denoising_error` + 0.001 L_vlb, for a UNet that learns its variance (Nichol & Dhariwal, 2021, eqs. 14-16).

    The arguments are those of `denoising_error`, the UNet's output `(B, 2c, h, w)`: the prediction, then v of
    `learned_log_variance`. L_vlb = T x `variational_terms` in nats; its gradient reaches v alone. `loss` replaces only the
    first term; `emphasis` weighs the places of both. At t = 0 the bound is a density and the result can be negative.

    Returns:
        `(B,)` float32.

    Raises:
        InputError: where the UNet does not give 2c channels; for noise predictions with zero terminal SNR.
    """
    output = _call(unet, scheduler, latents, noise, timesteps, condition, perturbation)
    if output.shape[1] != 2 * latents.shape[1]:
        raise InputError(
            f"the UNet gives {output.shape[1]} channels for latents of {latents.shape[1]}: a learned variance needs twice as many"
        )
    prediction, v = output.chunk(2, dim=1)
    target = prediction_target(scheduler, latents, noise, timesteps).float()
    bound = scheduler.config.num_train_timesteps * variational_terms(scheduler, prediction.detach(), target, v, timesteps)
    return _mean(loss(prediction, target, timesteps) + VLB_WEIGHT * bound, emphasis)


def _call(
    unet: Callable[..., Any],
    scheduler: Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    condition: torch.Tensor | None,
    perturbation: torch.Tensor | None,
) -> torch.Tensor:
    """The UNet's output at x_t, float32."""
    entering = noise if perturbation is None else noise + perturbation
    output = unet(scheduler.add_noise(latents, entering, timesteps), timesteps, condition)
    return getattr(output, "sample", output).float()


def _mean(elements: torch.Tensor, emphasis: torch.Tensor | None) -> torch.Tensor:
    return (elements if emphasis is None else elements * emphasis).flatten(1).mean(1)


def _at(table: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Entries of a table `(T,)` for `(B,)` timesteps, `(B, 1, 1, 1)` float32 on the timesteps' device."""
    return table.to(timesteps.device, torch.float32)[timesteps].view(-1, 1, 1, 1)


def prediction_target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet should predict: eps, v = alpha_t eps - sigma_t x_0 (Salimans & Ho, 2022), or x_0; `(B, c, h, w)`."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    return scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else latents


def variational_terms(
    scheduler: Any, prediction: torch.Tensor, target: torch.Tensor, v: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Per element `(B, c, h, w)` and in nats: KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)), at t = 0 -log p(x_0 | x_1).

    Nichol & Dhariwal (2021), eqs. 4-7, with a Gaussian density at t = 0, for latents are not quantised. Prediction, target and
    v are `(B, c, h, w)`; v gives p's variance (`learned_log_variance`).
    """
    log_variance = learned_log_variance(scheduler, v, timesteps)
    error = _at(mean_error_factor(scheduler), timesteps) * (target - prediction) ** 2 * torch.exp(-log_variance)
    excess = log_variance - _at(variance_bounds(scheduler)[0], timesteps)
    divergence = excess + torch.expm1(-excess) + error
    surprise = math.log(2 * math.pi) + log_variance + error
    return 0.5 * torch.where(timesteps.view(-1, 1, 1, 1) == 0, surprise, divergence)


def learned_log_variance(scheduler: Any, v: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """log Sigma = f log beta_t + (1 - f) log beta~_t with f = (v + 1) / 2 (Nichol & Dhariwal, 2021, eq. 15); `(B, c, h, w)`.

    The UNet's v is in `[-1, 1]` but not clamped, as diffusers' `variance_type="learned_range"` reads it.
    """
    narrow, wide = (_at(table, timesteps) for table in variance_bounds(scheduler))
    share = (v + 1) / 2
    return share * wide + (1 - share) * narrow


def variance_bounds(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """log beta~_t, of the variance of q(x_(t-1) | x_t, x_0), and log beta_t; both `(T,)` float64 (Ho et al., 2020, eq. 7).

    beta~_0 is 0, so beta~_1 stands for it, as in Nichol & Dhariwal's code: it bounds the density at t = 0. (diffusers' value
    there, 1e-20, would let that density explode; nothing is sampled with it.)
    """
    alpha_bar, previous = _alpha_bar(scheduler)
    beta = 1 - alpha_bar / previous
    narrow = (1 - previous) / (1 - alpha_bar) * beta
    narrow[0] = narrow[1]
    return narrow.log(), beta.log()


def mean_error_factor(scheduler: Any) -> torch.Tensor:
    """Factor `(T,)`, float64, from the squared error of the prediction to that of the mean of x_(t-1).

    With x_t fixed the mean moves by sqrt(alpha_bar_(t-1)) beta_t / (1 - alpha_bar_t) times x_0 (Ho et al., 2020, eq. 7), and x_0
    by -(sigma_t / alpha_t) times eps or by -sigma_t times v.

    Raises InputError where noise is predicted although the signal is gone (zero terminal SNR): it says nothing about x_0 there.
    """
    alpha_bar, previous = _alpha_bar(scheduler)
    kind = scheduler.config.prediction_type
    if kind == "epsilon" and (alpha_bar == 0).any():
        raise InputError("prediction_type epsilon cannot learn a variance with zero terminal SNR: use v_prediction")
    clean = {"epsilon": (1 - alpha_bar) / alpha_bar, "v_prediction": 1 - alpha_bar, "sample": torch.ones_like(alpha_bar)}[kind]
    return previous * ((1 - alpha_bar / previous) / (1 - alpha_bar)) ** 2 * clean


def _alpha_bar(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha_bar_t and alpha_bar_(t-1), both `(T,)` float64; the latter begins with 1."""
    alpha_bar = scheduler.alphas_cumprod.double().cpu()
    return alpha_bar, torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])


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


def min_snr_weights(scheduler: Any, gamma: float | None) -> torch.Tensor:
    """Min-SNR-gamma loss weight of every timestep, `(T,)` float32 (Hang et al., 2023, eq. 5); 1 without a gamma.

    min(SNR, gamma) is the weight of an x_0 loss; it is divided by SNR for eps and by SNR + 1 for v, written so that SNR = 0 is safe.
    """
    snr = log_snr(scheduler).exp()
    if gamma is None:
        return torch.ones(len(snr))
    kind = scheduler.config.prediction_type
    weights = {"epsilon": (gamma / snr).clamp(max=1), "v_prediction": snr.clamp(max=gamma) / (snr + 1), "sample": snr.clamp(max=gamma)}
    return weights[kind].float()


def lesion_emphasis(mask: torch.Tensor, weight: float, latent_side: int) -> torch.Tensor:
    """Weights `(B, 1, latent_side, latent_side)` float32, mean 1 per image: a place that the lesion touches counts `weight` times another.

    `mask` `(B, 1, H, W)` is nonzero where the lesion is; an image without one gets ones. Raises InputError for another shape
    and for a weight that is not positive.
    """
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise InputError(f"a lesion mask must be (B, 1, H, W), not {tuple(mask.shape)}")
    if weight <= 0:
        raise InputError(f"lesion weight {weight}: it must be positive, 1 for no emphasis")
    touched = F.adaptive_max_pool2d((mask != 0).float(), latent_side)
    weights = 1 + (weight - 1) * touched
    return weights / weights.mean((1, 2, 3), keepdim=True)


def draw_noise(latents: torch.Tensor, draws: Randomness, offset: float = 0.0) -> torch.Tensor:
    """Standard normal noise for `(B, c, h, w)` latents, float32; drawn on the latents' device.

    With an offset (0.1 in Guttenberg, 2023, "Diffusion with offset noise") every channel of an image also moves by `offset` x
    normal as a whole, so that the model learns to change an image's mean brightness.
    """
    noise = normal(latents.shape, draws)
    if not offset:
        return noise
    return noise + offset * normal((*latents.shape[:2], 1, 1), draws)


def draw_perturbation(latents: torch.Tensor, draws: Randomness, strength: float) -> torch.Tensor | None:
    """Input perturbation, `strength` x normal, `(B, c, h, w)` float32 (Ning et al., 2023, who use 0.1); None for strength 0."""
    return strength * normal(latents.shape, draws) if strength else None
