"""Likelihoods against Bayes' rule, where exact denoisers are known, and the race against the full plan."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from medsd.errors import InputError
from medsd.inference.likelihood import Calibration, fit_calibration, make_plan, posterior, score_classes

DIMENSION = 6


class GaussianClasses:
    """Classes N(mean_c, cov_c) and their exact noise predictors E[eps | x_t, c]."""

    def __init__(self, scheduler, classes=2, spread=1.0, seed=0):
        generator = np.random.default_rng(seed)
        self.alpha_bar = scheduler.alphas_cumprod.double()
        self.kind = scheduler.config.prediction_type
        self.means = torch.tensor(generator.normal(size=(classes, DIMENSION)) * spread)
        factors = generator.normal(size=(classes, DIMENSION, DIMENSION)) * 0.5
        self.covariances = torch.tensor(factors @ factors.transpose(0, 2, 1) + 0.3 * np.eye(DIMENSION))
        self.conditions = torch.arange(classes, dtype=torch.float32)[:, None, None]

    def draw(self, count, label, seed):
        normal = torch.distributions.MultivariateNormal(self.means[label], self.covariances[label])
        torch.manual_seed(seed)
        return normal.sample((count,)).float()[:, None, None, :]

    def log_odds(self, latents):
        flat = latents.flatten(1).double()
        densities = [torch.distributions.MultivariateNormal(m, c).log_prob(flat) for m, c in zip(self.means, self.covariances, strict=True)]
        return (densities[1] - densities[0]).numpy()

    def predict(self, x_t, timesteps, condition):
        alpha_bar = self.alpha_bar[timesteps][:, None]
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        label = condition[:, 0, 0].long()
        mean, covariance = self.means[label], self.covariances[label]
        flat = x_t.flatten(1).double()
        noisy = alpha_bar[..., None] * covariance + (1 - alpha_bar)[..., None] * torch.eye(DIMENSION, dtype=torch.float64)
        noise = sigma * torch.linalg.solve(noisy, (flat - alpha * mean)[..., None])[..., 0]
        clean = (flat - sigma * noise) / alpha
        answer = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[self.kind]
        return answer.view_as(x_t).float()


def schedule(kind="epsilon", **changes):
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    return DDPMScheduler(**(settings | {"prediction_type": kind} | changes))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_elbo_log_odds_equal_bayes_rule(kind):
    scheduler = schedule(kind)
    world = GaussianClasses(scheduler)
    latents = torch.cat([world.draw(12, label, seed=label) for label in (0, 1)])
    plan = make_plan(scheduler, 4096, tuple(latents.shape[1:]), weighting="elbo", seed=1)
    scores = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=4096)
    measured = scores.log_likelihoods[:, 1] - scores.log_likelihoods[:, 0]
    errors = scores.standard_errors.max(1)
    assert errors.max() < 1.0
    deviations = np.abs(measured - world.log_odds(latents)) / errors
    assert deviations.max() < 3
    assert np.abs(measured - world.log_odds(latents)).mean() < 0.25


def test_uniform_weights_are_not_the_bound():
    scheduler = schedule()
    world = GaussianClasses(scheduler)
    latents = world.draw(12, 0, seed=0)
    plan = make_plan(scheduler, 2048, tuple(latents.shape[1:]), weighting="uniform")
    scores = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=2048)
    measured = scores.log_likelihoods[:, 1] - scores.log_likelihoods[:, 0]
    assert np.abs(measured - world.log_odds(latents)).mean() > 0.5


def test_scores_do_not_depend_on_batch_or_neighbours():
    scheduler = schedule()
    world = GaussianClasses(scheduler, classes=3)
    latents = world.draw(5, 0, seed=3)
    plan = make_plan(scheduler, 16, tuple(latents.shape[1:]))
    together = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=16)
    alone = score_classes(world.predict, scheduler, latents[2:3], world.conditions, plan, batch_size=48)
    np.testing.assert_allclose(alone.log_likelihoods[0], together.log_likelihoods[2], rtol=1e-5)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_decide_agrees_with_the_full_plan_and_costs_less(delta):
    scheduler = schedule()
    world = GaussianClasses(scheduler, classes=4, spread=0.6)
    latents = torch.cat([world.draw(60, label, seed=label) for label in range(4)])
    plan = make_plan(scheduler, 128, tuple(latents.shape[1:]), seed=2)
    full = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=1024)
    raced = score_classes(world.predict, scheduler, latents, world.conditions, plan, mode="decide", delta=delta, batch_size=1024)
    disagreement = (full.log_likelihoods.argmax(1) != raced.log_likelihoods.argmax(1)).mean()
    assert disagreement <= delta
    assert raced.rows.mean() < 0.8 * full.rows.mean()
    assert (full.rows == 4 * 128).all()


def test_decide_races_on_the_posterior():
    """A class that only wins through its bias or prior must not be dropped."""
    scheduler = schedule()
    world = GaussianClasses(scheduler, classes=3, spread=0.6)
    latents = torch.cat([world.draw(40, label, seed=label) for label in range(3)])
    plan = make_plan(scheduler, 64, tuple(latents.shape[1:]), seed=2)
    full = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=1024)
    calibration, prior = Calibration(2.0, (3.0, 0.0, -3.0)), np.array([0.1, 0.2, 0.7])
    raced = score_classes(
        world.predict, scheduler, latents, world.conditions, plan, "decide", calibration=calibration, prior=prior, batch_size=1024
    )
    answers = [posterior(scores.log_likelihoods, calibration, prior).argmax(1) for scores in (full, raced)]
    assert (answers[0] != full.log_likelihoods.argmax(1)).mean() > 0.1
    assert (answers[0] != answers[1]).mean() <= 0.05 and raced.rows.mean() < full.rows.mean()


def test_posterior_mode_gives_nearly_the_full_probabilities():
    scheduler = schedule()
    world = GaussianClasses(scheduler, classes=3, spread=0.6)
    latents = torch.cat([world.draw(40, label, seed=label) for label in range(3)])
    plan = make_plan(scheduler, 256, tuple(latents.shape[1:]), seed=2)
    full = score_classes(world.predict, scheduler, latents, world.conditions, plan, batch_size=1024)
    calibration = fit_calibration(full.log_likelihoods, np.repeat([0, 1, 2], 40))
    stopped = score_classes(
        world.predict, scheduler, latents, world.conditions, plan, "posterior", calibration=calibration, batch_size=1024
    )
    difference = np.abs(posterior(stopped.log_likelihoods, calibration) - posterior(full.log_likelihoods, calibration))
    assert difference.mean() < 0.02
    assert stopped.rows.mean() < full.rows.mean()


def test_every_prefix_of_a_plan_is_spread_over_the_timesteps():
    plan = make_plan(schedule(), 64, (1, 2, 2))
    for prefix in (4, 8, 16, 32, 64):
        bins = torch.bincount(plan.timesteps[:prefix] * prefix // 1000, minlength=prefix)
        assert bins.max() <= 2 and (bins == 0).sum() <= 1


def test_a_plan_is_keyed_by_seed_and_pair():
    short, long = make_plan(schedule(), 8, (1, 2, 2), seed=5), make_plan(schedule(), 16, (1, 2, 2), seed=5)
    assert torch.equal(short.noise, long.noise[:8])
    assert not torch.equal(short.noise, make_plan(schedule(), 8, (1, 2, 2), seed=6).noise)


def test_a_plan_leaves_out_timesteps_without_signal():
    plan = make_plan(schedule("v_prediction", rescale_betas_zero_snr=True), 64, (1, 2, 2), weighting="elbo")
    assert torch.isfinite(plan.weights).all()


def test_calibration_recovers_temperature_and_bias():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    truth = posterior(logits + np.array([0.5, 0.0, -0.5]))
    labels = np.array([generator.choice(3, p=row) for row in truth])
    fitted = fit_calibration(logits * 50, labels, ridge=0.0)
    counts = np.bincount(labels) / len(labels)
    recovered = posterior(logits * 50, fitted, prior=counts)
    assert fitted.temperature == pytest.approx(50, rel=0.1)
    assert np.abs(recovered - truth).mean() < 0.03


def test_prior_and_bias_shift_the_posterior():
    scores = np.zeros((1, 2))
    np.testing.assert_allclose(posterior(scores, prior=np.array([0.9, 0.1])), [[0.9, 0.1]])
    np.testing.assert_allclose(posterior(scores, Calibration(1.0, (np.log(3.0), 0.0))), [[0.75, 0.25]])


def test_calibration_needs_every_class():
    with pytest.raises(InputError, match="class number 1"):
        fit_calibration(np.zeros((3, 2)), np.zeros(3, dtype=int))
