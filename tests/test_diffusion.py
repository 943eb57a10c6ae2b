"""The spine against formulas written out by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from medsd.errors import InputError
from medsd.objectives.autoencoder import reconstruction_error
from medsd.objectives.diffusion import (
    denoising_error,
    draw_noise,
    draw_perturbation,
    elementwise_loss,
    epsilon_error_factor,
    huber_thresholds,
    hybrid_error,
    learned_log_variance,
    lesion_emphasis,
    log_snr,
    min_snr_weights,
    prediction_target,
    variational_terms,
)

KINDS = ["epsilon", "v_prediction", "sample"]


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


@pytest.mark.parametrize("kind", KINDS)
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


def test_the_squared_error_is_bit_equal_to_torchs(tensors):
    latents, noise, guess, timesteps = tensors
    expected = torch.nn.functional.mse_loss(guess, noise, reduction="none").flatten(1).mean(1)
    scheduler = schedule("epsilon")
    for losses in [(), (elementwise_loss("l2", scheduler),)]:
        assert torch.equal(denoising_error(lambda *_: guess, scheduler, latents, noise, timesteps, None, *losses), expected)


def smooth_l1(difference):
    return torch.where(difference.abs() < 1, difference**2 / 2, difference.abs() - 0.5)


@pytest.mark.parametrize(("loss_type", "formula"), [("l1", torch.abs), ("smooth_l1", smooth_l1)])
def test_losses_that_are_the_same_at_every_timestep(loss_type, formula, tensors):
    latents, noise, guess, timesteps = tensors
    scheduler = schedule("epsilon")
    error = denoising_error(lambda *_: guess, scheduler, latents, noise, timesteps, None, elementwise_loss(loss_type, scheduler))
    torch.testing.assert_close(error, formula(guess - noise).mean((1, 2, 3)))
    torch.testing.assert_close(reconstruction_error(guess, noise, loss_type), error)


def test_an_autoencoders_huber_is_smooth_l1(tensors):
    _, noise, guess, _ = tensors
    torch.testing.assert_close(reconstruction_error(guess, noise, "huber"), smooth_l1(guess - noise).mean((1, 2, 3)))


@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_follows_its_schedule(huber_schedule, tensors):
    latents, noise, guess, timesteps = tensors
    alpha, sigma = hand_alphas(timesteps)
    c = {
        "constant": torch.full((5, 1, 1, 1), 0.2),
        "exponential": torch.exp(-timesteps.view(-1, 1, 1, 1) * (-math.log(0.2) / 1000)),
        "snr": (1 - 0.2) / (1 + sigma / alpha) ** 2 + 0.2,
    }[huber_schedule]
    scheduler = schedule("epsilon")
    loss = elementwise_loss("huber", scheduler, huber_schedule, 0.2)
    error = denoising_error(lambda *_: guess, scheduler, latents, noise, timesteps, None, loss)
    expected = 2 * c * (((guess - noise) ** 2 + c**2).sqrt() - c)
    torch.testing.assert_close(error, expected.mean((1, 2, 3)).float(), rtol=1e-4, atol=1e-6)


def test_pseudo_huber_is_squared_near_zero_and_straight_far_away():
    """Small differences cost d^2; a large one pulls with a force of 2 c."""
    scheduler = schedule("epsilon")
    timesteps = torch.tensor([900, 900, 900])
    c = huber_thresholds(scheduler, "snr", 0.1)[900]
    difference = torch.tensor([0.0, 1e-2, -1e4]).view(3, 1, 1, 1).requires_grad_()
    elements = elementwise_loss("huber", scheduler, "snr", 0.1)(difference, torch.zeros(3, 1, 1, 1), timesteps).flatten()
    (force,) = torch.autograd.grad(elements.sum(), difference)
    torch.testing.assert_close(elements[:2], torch.tensor([0.0, 1e-4]), rtol=1e-2, atol=0)
    torch.testing.assert_close(force.flatten()[[0, 2]], torch.stack([torch.zeros(()), -2 * c]))


@pytest.mark.parametrize("huber_schedule", ["constant", "exponential", "snr"])
def test_pseudo_huber_is_finite_without_signal(huber_schedule):
    scheduler = schedule("v_prediction", rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    thresholds = huber_thresholds(scheduler, huber_schedule, 0.1)
    assert torch.isfinite(thresholds).all() and (thresholds > 0.0999).all()
    if huber_schedule == "snr":
        assert thresholds[-1] == torch.tensor(0.1)


def test_unknown_losses_are_refused():
    scheduler = schedule("epsilon")
    with pytest.raises(InputError, match="l2, l1, smooth_l1, huber"):
        elementwise_loss("l3", scheduler)
    with pytest.raises(InputError, match="constant, exponential, snr"):
        elementwise_loss("huber", scheduler, "linear")
    with pytest.raises(InputError, match="positive"):
        elementwise_loss("huber", scheduler, "snr", 0.0)


def test_a_perturbation_enters_x_t_and_not_the_target(tensors):
    latents, noise, guess, timesteps = tensors
    alpha, sigma = hand_alphas(timesteps)
    perturbation, seen = torch.linspace(-1, 1, latents.numel()).view_as(latents), []

    def unet(x_t, t, condition):
        seen.append(x_t)
        return guess

    scheduler = schedule("v_prediction")
    error = denoising_error(unet, scheduler, latents, noise, timesteps, None, perturbation=perturbation)
    torch.testing.assert_close(seen[0], (alpha * latents + sigma * (noise + perturbation)).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(error, denoising_error(unet, scheduler, latents, noise, timesteps, None))


def test_emphasis_weighs_places(tensors):
    latents, noise, guess, timesteps = tensors
    emphasis = torch.zeros(5, 1, 4, 4)
    emphasis[:, :, 2, 3] = 16
    error = denoising_error(lambda *_: guess, schedule("epsilon"), latents, noise, timesteps, None, emphasis=emphasis)
    torch.testing.assert_close(error, ((guess - noise) ** 2)[:, :, 2, 3].mean(1))


def test_the_mean_of_a_learned_variance_unet_is_its_first_half(tensors):
    latents, noise, guess, timesteps = tensors
    doubled = torch.cat([guess, 100 + guess], 1)
    errors = [denoising_error(lambda *_, o=o: o, schedule("epsilon"), latents, noise, timesteps, None) for o in (guess, doubled)]
    torch.testing.assert_close(errors[0], errors[1])
    with pytest.raises(InputError, match="4 channels for latents of 3"):
        denoising_error(lambda *_: doubled[:, :4], schedule("epsilon"), latents, noise, timesteps, None)


@pytest.mark.parametrize("kind", KINDS)
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


def test_min_snr_weights_are_the_papers():
    timesteps = torch.tensor([0, 300, 999])
    snr = log_snr(schedule("epsilon")).exp()[timesteps]
    assert snr[0] > 5 > snr[2]
    for kind, divisor in {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(3)}.items():
        expected = (snr.clamp(max=5) / divisor).float()
        torch.testing.assert_close(min_snr_weights(schedule(kind), 5.0)[timesteps], expected)
    assert torch.equal(min_snr_weights(schedule("epsilon"), None)[timesteps], torch.ones(3))


@pytest.mark.parametrize(("kind", "limit"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_min_snr_weights_reach_their_limit_without_signal(kind, limit):
    """As the signal goes, min(SNR, gamma) / SNR -> 1 and min(SNR, gamma) / (SNR + 1) -> 0."""
    scheduler = schedule(kind, rescale_betas_zero_snr=True)
    assert log_snr(scheduler)[999] == -math.inf
    weights = min_snr_weights(scheduler, 5.0)[998:]
    assert weights[1] == limit and abs(weights[0] - limit) < 1e-3


def posterior(scheduler, timesteps):
    """alpha_bar_t, alpha_bar_(t-1), beta_t and beta~_t, `(B, 1, 1, 1)` float64; beta~_1 for t = 0."""
    alpha_bar = scheduler.alphas_cumprod.double()[timesteps].view(-1, 1, 1, 1)
    previous = torch.where(timesteps > 0, scheduler.alphas_cumprod.double()[timesteps - 1], 1.0).view(-1, 1, 1, 1)
    beta = 1 - alpha_bar / previous
    narrow = (1 - previous) / (1 - alpha_bar) * beta
    if (timesteps == 0).any():
        narrow[timesteps == 0] = posterior(scheduler, torch.tensor([1]))[3]
    return alpha_bar, previous, beta, narrow


@pytest.mark.parametrize("kind", KINDS)
def test_variational_terms_are_the_divergence_of_the_two_gaussians(kind, tensors):
    """q's mean and p's are both built from x_t as in Ho et al., eq. 7, and compared by torch."""
    latents, noise, guess, _ = tensors
    timesteps, scheduler = torch.tensor([0, 1, 10, 300, 999]), schedule(kind)
    alpha_bar, previous, beta, narrow = posterior(scheduler, timesteps)
    x_t = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    clean = {
        "epsilon": (x_t - (1 - alpha_bar).sqrt() * guess) / alpha_bar.sqrt(),
        "v_prediction": alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * guess,
        "sample": guess.double(),
    }[kind]
    v = torch.linspace(-1.2, 1.2, latents.numel()).view_as(latents)
    share = (v.double() + 1) / 2
    spread = torch.exp(0.5 * (share * beta.log() + (1 - share) * narrow.log()))

    def mean(x_0):
        return (previous.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - previous) * x_t) / (1 - alpha_bar)

    expected = kl_divergence(Normal(mean(latents), narrow.sqrt()), Normal(mean(clean), spread))
    expected[0] = -Normal(clean, spread).log_prob(latents.double())[0]
    target = prediction_target(scheduler, latents, noise, timesteps)
    torch.testing.assert_close(variational_terms(scheduler, guess, target, v, timesteps).double(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_prediction_with_the_posteriors_variance_has_no_divergence(kind, tensors):
    latents, noise, _, _ = tensors
    timesteps, scheduler = torch.tensor([1, 2, 50, 500, 999]), schedule(kind)
    target = prediction_target(scheduler, latents, noise, timesteps)
    narrow, wide = torch.full_like(latents, -1), torch.full_like(latents, 1)
    assert (variational_terms(scheduler, target, target, narrow, timesteps) == 0).all()
    assert (variational_terms(scheduler, target, target, wide, timesteps) > 0).all()


def test_the_best_variance_covers_the_error_of_the_mean(tensors):
    """The divergence is stationary where p's variance is beta~ + (difference of the means)^2."""
    latents, noise, _, _ = tensors
    timesteps, scheduler = torch.tensor([1, 2, 3, 5, 10]), schedule("sample")
    alpha_bar, previous, beta, narrow = posterior(scheduler, timesteps)
    wanted = narrow + (beta - narrow) / 2
    off = (wanted - narrow).sqrt() * (1 - alpha_bar) / (previous.sqrt() * beta)
    share = (wanted / narrow).log() / (beta / narrow).log()
    v = (2 * share - 1).float().expand_as(latents).clone().requires_grad_()
    for change, still in [(0.0, True), (0.3, False)]:
        terms = variational_terms(scheduler, (latents + off).float(), latents, v + change, timesteps)
        (slope,) = torch.autograd.grad(terms.sum(), v)
        assert (slope.abs() < 2e-3).all() == still


def test_the_learned_variance_is_the_one_diffusers_samples_with():
    scheduler = schedule("epsilon", variance_type="learned_range")
    generator = torch.Generator().manual_seed(1)
    x_t, guess, v = (torch.randn(1, 2, 4, 4, generator=generator) for _ in range(3))
    for t in [1, 2, 10, 300, 999]:
        timesteps = torch.tensor([t])
        log_variance = learned_log_variance(scheduler, v, timesteps)
        torch.testing.assert_close(log_variance, scheduler._get_variance(t, v), rtol=0, atol=2e-4)
        alpha_bar, previous, beta, _ = posterior(scheduler, timesteps)
        clean = (x_t - (1 - alpha_bar).sqrt() * guess) / alpha_bar.sqrt()
        mean = (previous.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - previous) * x_t) / (1 - alpha_bar)
        sampled = scheduler.step(torch.cat([guess, v], 1), t, x_t, generator=torch.Generator().manual_seed(2)).prev_sample
        normal = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(sampled, (mean + torch.exp(0.5 * log_variance) * normal).float(), rtol=1e-3, atol=1e-4)


def test_hybrid_error_is_the_simple_error_and_a_thousandth_of_the_bound(tensors):
    latents, noise, guess, timesteps = tensors
    scheduler, calls = schedule("v_prediction"), []
    output = torch.cat([guess, noise.flip(0)], 1).requires_grad_()

    def unet(*arguments):
        calls.append(arguments)
        return output

    emphasis = lesion_emphasis(torch.eye(4).expand(5, 1, 4, 4), 3.0, 4)
    loss = elementwise_loss("l1", scheduler)
    hybrid = hybrid_error(unet, scheduler, latents, noise, timesteps, None, loss, emphasis)
    assert len(calls) == 1 and hybrid.shape == (5,) and hybrid.dtype == torch.float32
    simple = denoising_error(unet, scheduler, latents, noise, timesteps, None, loss, emphasis)
    target = prediction_target(scheduler, latents, noise, timesteps)
    bound = (emphasis * variational_terms(scheduler, guess, target, noise.flip(0), timesteps)).mean((1, 2, 3))
    torch.testing.assert_close(hybrid, simple + 0.001 * 1000 * bound)


def test_the_bound_teaches_the_variance_alone(tensors):
    latents, noise, guess, timesteps = tensors
    scheduler, output = schedule("epsilon"), torch.cat([guess, 0.1 * guess], 1).requires_grad_()
    arguments = (lambda *_: output, scheduler, latents, noise, timesteps, None)
    (hybrid,) = torch.autograd.grad(hybrid_error(*arguments).sum(), output)
    (simple,) = torch.autograd.grad(denoising_error(*arguments).sum(), output)
    assert torch.equal(hybrid[:, :3], simple[:, :3])
    assert (hybrid[:, 3:] != 0).all() and (simple[:, 3:] == 0).all()


def test_hybrid_error_takes_a_perturbation_as_the_simple_error_does(tensors):
    latents, noise, guess, timesteps = tensors
    seen, perturbation = [], torch.full_like(latents, 0.5)

    def unet(x_t, t, condition):
        seen.append(x_t)
        return torch.cat([guess, guess], 1)

    for error in (denoising_error, hybrid_error):
        error(unet, schedule("epsilon"), latents, noise, timesteps, None, perturbation=perturbation)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], schedule("epsilon").add_noise(latents, noise, timesteps))


def test_hybrid_error_needs_a_variance_and_a_mean(tensors):
    latents, noise, guess, timesteps = tensors
    with pytest.raises(InputError, match="twice as many"):
        hybrid_error(lambda *_: guess, schedule("epsilon"), latents, noise, timesteps, None)
    without_signal = {kind: schedule(kind, rescale_betas_zero_snr=True) for kind in KINDS}
    output = torch.cat([guess, guess.tanh()], 1)
    for kind in ("v_prediction", "sample"):
        assert torch.isfinite(hybrid_error(lambda *_: output, without_signal[kind], latents, noise, timesteps, None)).all()
    with pytest.raises(InputError, match="v_prediction"):
        hybrid_error(lambda *_: output, without_signal["epsilon"], latents, noise, timesteps, None)


def test_lesion_emphasis_counts_touched_places_more():
    mask = torch.zeros(3, 1, 32, 32)
    mask[0, 0, 9, 17] = 255
    mask[1, 0, :16] = 1
    weights = lesion_emphasis(mask, 5.0, 8)
    assert weights.shape == (3, 1, 8, 8)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(3))
    place = torch.zeros(8, 8, dtype=torch.bool)
    place[2, 4] = True
    torch.testing.assert_close(weights[0, 0], torch.where(place, 5.0, 1.0) / (68 / 64))
    torch.testing.assert_close(weights[1, 0, :4], 5 * weights[1, 0, 4:])
    assert torch.equal(weights[2], torch.ones(1, 8, 8))
    assert torch.equal(lesion_emphasis(mask.bool(), 5.0, 8), weights)


def test_a_mask_of_another_shape_and_a_weight_of_zero_are_refused():
    with pytest.raises(InputError, match="B, 1, H, W"):
        lesion_emphasis(torch.zeros(3, 32, 32), 5.0, 8)
    with pytest.raises(InputError, match="positive"):
        lesion_emphasis(torch.zeros(3, 1, 32, 32), 0.0, 8)


def test_noise_without_an_offset_is_torchs_and_with_one_moves_channels():
    latents = torch.zeros(2000, 3, 4, 4)
    plain = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    generators = [torch.Generator().manual_seed(4) for _ in range(3)]
    assert torch.equal(draw_noise(latents, generators[0]), plain)
    moved = draw_noise(latents, generators[1], offset=0.5) - plain
    torch.testing.assert_close(moved, moved[:, :, :1, :1].expand_as(moved), rtol=0, atol=1e-6)
    shifts = moved[:, :, 0, 0]
    assert abs(shifts.std() - 0.5) < 0.02 and abs(shifts.mean()) < 0.03
    assert abs(torch.corrcoef(shifts.T)[0, 1]) < 0.1
    torch.randn(latents.shape, generator=generators[2])
    assert torch.equal(generators[0].get_state(), generators[2].get_state()), "offset 0 must not draw"


def test_a_perturbation_is_drawn_only_where_it_is_wanted():
    latents, generator = torch.zeros(50, 4, 16, 16), torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert draw_perturbation(latents, generator, 0.0) is None
    assert torch.equal(generator.get_state(), before)
    perturbation = draw_perturbation(latents, generator, 0.1)
    assert perturbation.shape == latents.shape and abs(perturbation.std() - 0.1) < 0.002
