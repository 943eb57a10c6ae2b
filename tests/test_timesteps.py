"""Timestep samplers against the distributions they promise, and importance sampling against the uniform mean."""

import math

import pytest
import torch

from medsd.errors import InputError
from medsd.objectives.timesteps import ImportanceTimesteps, LogitNormalTimesteps, UniformTimesteps, timestep_sampler

KINDS = ["uniform", "logit_normal", "importance"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def every_timestep(steps):
    return torch.arange(steps)


def loss_of(timesteps):
    """A loss that is large early, as in training."""
    return 0.02 + torch.exp(-timesteps / 100.0)


def taught(steps=1000, **changes):
    sampler = ImportanceTimesteps(steps, **changes)
    sampler.learn(every_timestep(steps), loss_of(every_timestep(steps)))
    return sampler


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_has_the_same_interface(kind):
    sampler = timestep_sampler(kind, 37)
    for _ in range(20):
        (timesteps, weights), (again, _) = (sampler.sample(64, seeded(3)) for _ in range(2))
        assert timesteps.shape == (64,) and timesteps.dtype == torch.int64 and torch.equal(timesteps, again)
        assert timesteps.min() >= 0 and timesteps.max() < 37
        assert weights.shape == (64,) and weights.dtype == torch.float32
        sampler.learn(timesteps, loss_of(timesteps))
    assert sampler.state.dtype == torch.float32


def test_unknown_samplers_are_refused():
    with pytest.raises(InputError, match="uniform, logit_normal, importance"):
        timestep_sampler("normal", 1000)
    with pytest.raises(InputError, match="positive"):
        LogitNormalTimesteps(1000, std=0.0)


def test_uniform_draws_are_those_of_before():
    timesteps, weights = UniformTimesteps(1000).sample(100, seeded(3))
    assert torch.equal(timesteps, torch.randint(0, 1000, (100,), generator=seeded(3))) and weights.eq(1).all()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_timesteps_follow_their_distribution(mean, std):
    """P(t < k) = Phi((logit(k / T) - mean) / std), within four standard errors."""
    count = 200_000
    timesteps, weights = LogitNormalTimesteps(1000, mean, std).sample(count, seeded())
    for edge in (0.1, 0.3, 0.5, 0.7, 0.9):
        expected = 0.5 * (1 + math.erf((math.log(edge / (1 - edge)) - mean) / std / math.sqrt(2)))
        share = (timesteps < 1000 * edge).double().mean()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    assert weights.eq(1).all()


def test_logit_normal_timesteps_stay_below_the_last():
    assert LogitNormalTimesteps(10, mean=50.0).sample(100, seeded())[0].unique().tolist() == [9]


def test_importance_is_uniform_until_every_bin_has_been_seen():
    sampler = ImportanceTimesteps(1000)
    sampler.learn(every_timestep(980), loss_of(every_timestep(980)))
    torch.testing.assert_close(sampler.probabilities(), torch.full((1000,), 1e-3))
    torch.testing.assert_close(sampler.sample(8, seeded())[1], torch.ones(8))
    sampler.learn(torch.tensor([999]), torch.tensor([0.02]))
    assert sampler.probabilities()[0] > 2e-3


@pytest.mark.parametrize(("steps", "bins"), [(1000, 50), (1000, 7), (30, 50)])
def test_probabilities_are_the_root_of_the_second_moment_and_a_uniform_share(steps, bins):
    """Errors of +-e: a mean of zero, a second moment of e^2."""
    sampler = ImportanceTimesteps(steps, bins)
    assert sampler.squares.bin_of.unique().numel() == min(bins, steps) and sampler.squares.bin_of.bincount().min() >= steps // bins
    size = 1 + sampler.squares.bin_of.float()
    for sign in (1, -1):
        sampler.learn(every_timestep(steps), sign * size)
    expected = 0.9 * size / size.sum() + 0.1 / steps
    torch.testing.assert_close(sampler.probabilities(), expected)
    counts = sampler.sample(200_000, seeded())[0].bincount(minlength=steps).double()
    assert ((counts - 200_000 * expected).abs() < 5 * (200_000 * expected).sqrt()).all()


def test_importance_weighting_keeps_the_mean_and_lowers_its_variance():
    sampler, count = taught(), 200_000
    truth = loss_of(every_timestep(1000)).mean()
    timesteps, weights = sampler.sample(count, seeded(1))
    weighted, unweighted = weights * loss_of(timesteps), loss_of(timesteps)
    uniform = loss_of(UniformTimesteps(1000).sample(count, seeded(2))[0])
    standard_error = weighted.std() / math.sqrt(count)
    assert abs(weighted.mean() - truth) < 4 * standard_error
    assert abs(unweighted.mean() - truth) > 100 * standard_error
    assert weighted.var() < 0.1 * uniform.var()
    assert weights.max() <= 10


def test_importance_weighting_stays_unbiased_while_it_learns():
    """Draws of a sampler that learns from its own draws, of losses that scatter: the mean over all of them is the uniform one."""
    sampler, generator, estimates = ImportanceTimesteps(1000), seeded(7), []
    for _ in range(3000):
        timesteps, weights = sampler.sample(32, generator)
        losses = loss_of(timesteps) * torch.rand(32, generator=generator) * 2
        estimates.append((weights * losses).mean())
        sampler.learn(timesteps, losses)
    estimates = torch.stack(estimates)
    truth = loss_of(every_timestep(1000)).mean()
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / math.sqrt(len(estimates))
    assert sampler.probabilities()[0] > 4 * sampler.probabilities()[500]


def test_the_average_forgets_exponentially():
    """Old squares count decay^n of what they did, whether n losses come one by one or at once."""
    alone, together = (ImportanceTimesteps(1, decay=0.9) for _ in range(2))
    for sampler in (alone, together):
        sampler.learn(torch.zeros(1).long(), torch.tensor([3.0]))
    for _ in range(4):
        alone.learn(torch.zeros(1).long(), torch.tensor([2.0]))
    together.learn(torch.zeros(4).long(), torch.full((4,), 2.0))
    torch.testing.assert_close(alone.state, together.state)
    expected = (0.1 * 0.9**4 * 9 + (1 - 0.9**4) * 4) / (1 - 0.9**5)
    torch.testing.assert_close(together.state[0, 0] / together.state[0, 1], torch.tensor(expected))


def test_an_error_that_overflowed_is_passed_over():
    sampler = taught()
    before = sampler.state.clone()
    sampler.learn(torch.tensor([5, 500]), torch.tensor([math.inf, math.nan]))
    assert torch.equal(sampler.state, before)


def test_learning_keeps_no_graph_and_its_state_restores_it():
    sampler, fresh = taught(), ImportanceTimesteps(1000)
    state = sampler.state
    sampler.learn(torch.tensor([3]), torch.tensor([2.0], requires_grad=True) * 2)
    assert sampler.state is state and not state.requires_grad and state.shape == (50, 2)
    assert not torch.equal(fresh.sample(64, seeded())[0], sampler.sample(64, seeded())[0])
    fresh.state.copy_(state)
    for mine, other in zip(sampler.sample(64, seeded()), fresh.sample(64, seeded()), strict=True):
        assert torch.equal(mine, other)
