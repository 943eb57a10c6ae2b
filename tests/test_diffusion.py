"""The spine against formulas written out by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from medsd.objectives.diffusion import denoising_error, epsilon_error_factor, log_snr, min_snr_weight, sample_timesteps


def schedule(kind, **changes):
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=kind, clip_sample=False, **changes
    )


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    latents, noise, guess = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    return latents, noise, guess, torch.tensor([0, 10, 250, 700, 999])


def hand_alphas(timesteps):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_error_is_the_hand_written_formula(kind, tensors):
    latents, noise, guess, timesteps = tensors
    alpha, sigma = hand_alphas(timesteps)
    seen = {}

    def unet(x_t, t, condition):
        seen.update(x_t=x_t, t=t, condition=condition)
        return guess

    error = denoising_error(unet, schedule(kind), latents, noise, timesteps, None)
    target = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}[kind]
    torch.testing.assert_close(error, ((guess - target) ** 2).mean((1, 2, 3)).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["x_t"], (alpha * latents + sigma * noise).float(), rtol=1e-4, atol=1e-5)
    assert seen["condition"] is None and torch.equal(seen["t"], timesteps)


@pytest.mark.parametrize(
    ("loss_type", "formula"), [("l1", lambda d: d.abs()), ("huber", lambda d: torch.where(d.abs() < 1, d**2 / 2, d.abs() - 0.5))]
)
def test_other_losses(loss_type, formula, tensors):
    latents, noise, guess, timesteps = tensors
    error = denoising_error(lambda *_: guess, schedule("epsilon"), latents, noise, timesteps, None, loss_type)
    torch.testing.assert_close(error, formula(guess - noise).mean((1, 2, 3)))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_becomes_the_same_noise_error(kind, tensors):
    """A noise guess, expressed as v or as x_0, has the same noise error after the factor."""
    latents, noise, guess, timesteps = tensors
    alpha, sigma = hand_alphas(timesteps)
    x_t = alpha * latents + sigma * noise
    clean = (x_t - sigma * guess) / alpha
    prediction = {"epsilon": guess, "v_prediction": alpha * guess - sigma * clean, "sample": clean}[kind].float()
    scheduler = schedule(kind)
    error = denoising_error(lambda *_: prediction, scheduler, latents, noise, timesteps, None)
    expected = ((guess - noise) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(epsilon_error_factor(scheduler, timesteps) * error, expected, rtol=2e-3, atol=1e-4)


def test_min_snr_weights_are_the_papers_and_safe_without_signal():
    timesteps = torch.tensor([0, 300, 999])
    snr = log_snr(schedule("epsilon")).exp()[timesteps]
    for kind, divisor in {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}.items():
        expected = (snr.clamp(max=5) / divisor).float()
        torch.testing.assert_close(min_snr_weight(schedule(kind), timesteps, 5.0), expected)
        assert torch.isfinite(min_snr_weight(schedule(kind, rescale_betas_zero_snr=True), timesteps, 5.0)).all()
    assert torch.equal(min_snr_weight(schedule("epsilon"), timesteps, None), torch.ones(3))


def test_timesteps_come_from_the_generator():
    first, second = (sample_timesteps(100, schedule("epsilon"), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.min() >= 0 and first.max() < 1000
