"""Likelihoods against Bayes' rule, where exact denoisers are known, and the race against the full plan."""

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.special import softmax as _softmax

from medsd.errors import InputError
from medsd.inference.calibration import (
    Answers,
    Belief,
    Calibration,
    Risk,
    Weighting,
    assign_folds,
    choose_weighting,
    fit_calibration,
    fit_temperature,
)
from medsd.inference.fitting import (
    PILOT_BINS,
    design_effects,
    fit,
    fit_group_temperature,
    fit_proposal,
    race_risks,
    upper_bound,
    usual_spread,
)
from medsd.inference.likelihood import NotFinite, Scores, posterior, score_classes
from medsd.inference.plan import Proposal, make_plan
from medsd.inference.race import (
    Decide,
    Settle,
    common_share,
    differences_to_leader,
    error_correlation,
    promised_rule,
    replay,
    variance_of_mean,
)

DIMENSION = 6


def softmax(logits):
    return _softmax(logits, axis=1)


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


def scored(count=40, classes=3, pairs=64, spread=0.6):
    """Images of `classes` Gaussian classes, `count` of each, and all their losses."""
    scheduler = schedule()
    world = GaussianClasses(scheduler, classes=classes, spread=spread)
    latents = torch.cat([world.draw(count, label, seed=label) for label in range(classes)])
    plan = make_plan(scheduler, pairs, tuple(latents.shape[1:]), seed=2)

    def score(rule=None, belief=None, batch_size=1024):
        return score_classes(world.predict, scheduler, latents, world.conditions, plan, rule, belief, batch_size)

    return score, np.repeat(np.arange(classes), count)


@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_decide_agrees_with_the_full_plan_and_costs_less(delta):
    score, _ = scored(count=60, classes=4, pairs=128)
    full, raced = score(), score(promised_rule(Calibration.none(4), delta, 128))
    disagreement = (full.log_likelihoods.argmax(1) != raced.log_likelihoods.argmax(1)).mean()
    assert disagreement <= delta
    assert raced.rows.mean() < 0.8 * full.rows.mean()
    assert (full.rows == 4 * 128).all()


def test_decide_races_on_the_posterior():
    """A class that only wins through its bias or prior must not be dropped."""
    score, _ = scored()
    calibration, prior = Calibration(2.0, (3.0, 0.0, -3.0)), np.array([0.1, 0.2, 0.7])
    full, raced = score(), score(promised_rule(calibration, 0.05, 64), Belief(calibration, prior))
    answers = [posterior(scores, calibration, prior).logits.argmax(1) for scores in (full, raced)]
    assert (answers[0] != full.log_likelihoods.argmax(1)).mean() > 0.1
    assert (answers[0] != answers[1]).mean() <= 0.05 and raced.rows.mean() < full.rows.mean()


def test_near_ties_within_eta_end_the_race():
    losses = np.zeros((1, 2, 64)) + np.array([0.0, 0.04])[None, :, None] + np.random.default_rng(0).normal(size=(1, 1, 64))
    losses[:, 1] += np.random.default_rng(1).normal(size=64) * 0.05
    belief, places = Belief(Calibration.none(2)), np.linspace(0, 1, 64, endpoint=False)
    wide, narrow = (np.isfinite(replay(losses, places, Decide(1e-4, eta), belief)).sum() for eta in (0.3, 0.0))
    assert wide < narrow


def test_votes_are_never_counted_among_survivors():
    """A pair's vote is for the best of all classes; with some of them gone it would be another's."""
    score, labels = scored(classes=4)
    calibration = Calibration(0.2, (0.0,) * 4, vote=True)
    rule = promised_rule(calibration, 0.05, 64)
    assert rule.together
    full, raced = score(), score(rule, Belief(calibration))
    assert (raced.pairs == raced.pairs[:, :1]).all() and raced.rows.mean() < full.rows.mean()
    votes = (full.losses.argmin(1)[:, None] == np.arange(4)[None, :, None]).mean(2)
    np.testing.assert_allclose(-posterior(full, calibration).logits * 0.2, votes.max(1, keepdims=True) - votes, atol=1e-6)


def ties(classes, images, pairs=64, seed=0):
    """Losses `(N, K, P)` of independent normal noise, whose full means are all near each other."""
    losses = np.random.default_rng(seed).normal(size=(images, classes, pairs))
    return losses + 0.3 * np.random.default_rng(seed + 1).normal(size=(images, classes, 1))


def disagreement(losses, places, rule, belief):
    """Share of images whose raced answer is not that of all pairs, by more than the rule's eta."""
    logits = -belief.nats(losses, places).mean(2)
    raced = Scores(replay(losses, places, rule, belief), places)
    answers = posterior(raced, belief.calibration).leader
    return (logits.max(1) - logits[np.arange(len(logits)), answers] > rule.eta).mean()


@pytest.mark.parametrize("classes", [2, 3, 16])
@pytest.mark.parametrize("delta", [0.05, 0.01])
def test_the_promise_holds_without_a_calibration_where_classes_nearly_tie(classes, delta):
    losses, places, belief = ties(classes, 3000), np.arange(64) / 64, Belief(Calibration.none(classes))
    rule = promised_rule(belief.calibration, delta, 64)
    assert disagreement(losses, places, rule, belief) <= delta
    assert np.isfinite(replay(losses, places, rule, belief)).sum() < losses.size


@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("delta", [0.1, 0.02])
def test_the_certified_promise_holds_where_classes_nearly_tie(vote, delta):
    """On other images than those it was measured on; votes are all or nothing, and agree by chance at first."""
    places, calibration = np.arange(64) / 64, Calibration(0.05 if vote else 1.0, (0.0,) * 4, vote=vote, pairs=64)
    measured, losses = ties(4, 1000, seed=10), ties(4, 3000, seed=20)
    belief = Belief(calibration)
    calibration = replace(calibration, spread=usual_spread(belief.nats(measured, places), places))
    calibration = replace(calibration, risks=race_risks(measured, places, Belief(calibration)))
    rule = promised_rule(calibration, delta, 64)
    assert rule.spread == calibration.spread and rule.together == vote
    assert disagreement(losses, places, rule, Belief(calibration)) <= 1.2 * delta


def test_a_level_that_was_refuted_is_not_taken():
    refuted = Calibration(1.0, (0.0, 0.0), spread=9.0, pairs=64, risks=(Risk(1e-5, 0.1, 0.2), Risk(0.3, 0.3, 0.4)))
    assert promised_rule(refuted, 0.05, 64) == Decide(0.0)
    losses, places, belief = ties(2, 10), np.arange(64) / 64, Belief(refuted)
    assert np.isfinite(replay(losses, places, Decide(0.0), belief)).all()
    assert promised_rule(refuted, 0.25, 64) == Decide(1e-5, spread=9.0, certified=True)
    few = replace(refuted, risks=(Risk(1e-5, 0.0, 0.1), Risk(0.3, 0.3, 0.4)))
    assert promised_rule(few, 0.05, 64) == promised_rule(replace(few, risks=()), 0.05, 64) != Decide(0.0), "too few images to tell"


def test_images_of_a_patient_do_not_count_as_independent():
    """Also at a level at which none went wrong: what is known of how a patient's images go together counts for all levels."""
    wrong, patients = np.zeros((2, 400), bool), np.arange(400) // 20
    wrong[1, :20] = True
    alone, together = (upper_bound(wrong[1], effect) for effect in (1.0, design_effects(wrong, patients)[1]))
    assert 0.05 < alone < 0.08 < together
    assert design_effects(wrong, np.arange(400)) == pytest.approx(1.0, abs=0.01)
    assert design_effects(wrong, patients) == pytest.approx(20), "one patient tells nothing of the others"
    assert design_effects(wrong[:1], patients) == pytest.approx(20) and (design_effects(wrong, np.zeros(400)) == 400).all()
    wrong[1] = patients < 5
    assert (design_effects(wrong, patients) > 20).all(), "measured, from five patients"
    assert upper_bound(np.zeros(299, bool)) == pytest.approx(0.01, abs=2e-4)
    assert upper_bound(wrong[0], 20.0) == pytest.approx(upper_bound(np.zeros(20, bool)))


@pytest.mark.parametrize("rate", [0.02, 0.05])
def test_bounds_of_clustered_images_hold_as_often_as_they_say(rate):
    """Twenty patients of twenty images, whose rates are far apart (beta distribution, intraclass correlation 0.3)."""
    generator, patients = np.random.default_rng(0), np.arange(400) // 20
    own = generator.beta(rate * 7 / 3, (1 - rate) * 7 / 3, size=(1000, 20))
    held = []
    for rates in own:
        wrong = generator.random((1, 400)) < rates[patients]
        held.append(upper_bound(wrong[0], design_effects(wrong, patients)[0]) >= rate)
    assert np.mean(held) > 0.92


def test_opposite_noises_are_not_two_independent_pairs():
    """A difference that depends on the timestep alone: the two pairs of a slot say the same."""
    generator, slots = np.random.default_rng(0), 8
    places = np.repeat(np.arange(slots) / slots, 2)
    differences = np.stack([np.zeros((4000, 2 * slots)), np.repeat(generator.normal(size=(4000, slots)), 2, axis=1)], 1)
    variance, freedom = variance_of_mean(differences, places)
    assert variance[:, 1].mean() == pytest.approx(differences.mean(2)[:, 1].var(), rel=0.1)
    assert (freedom[:, 1] == slots - 1).all() and not variance[:, 0].any()
    one, _ = variance_of_mean(differences[:, :, :2], places)
    assert np.isinf(one[:, 1]).all(), "one slot tells nothing of the variance"


def test_errors_that_are_not_finite_are_refused():
    scheduler = schedule()
    plan, latents = make_plan(scheduler, 4, (1, 1, DIMENSION)), torch.zeros(3, 1, 1, DIMENSION)
    latents[1] = torch.nan
    with pytest.raises(NotFinite) as refused:
        score_classes(lambda x_t, *_: x_t, scheduler, latents, torch.zeros(2, 1, 1), plan)
    assert pickle.loads(pickle.dumps(refused.value)).images == [1], "as it goes from process to process"


@pytest.mark.parametrize("where", ["pilot", "images"])
def test_half_precision_that_overflows_is_not_taken(where):
    score, labels = scored(count=12)
    losses, asked = score().losses, []

    def measure(chosen, plan, precision):
        asked.append((precision, len(chosen)))
        if precision == "fp16" and (where == "pilot" or len(chosen) == len(labels)):
            raise NotFinite("too large", [0])
        repeats = -(-len(plan) // losses.shape[2])
        return Scores(np.tile(losses[chosen.numpy()], repeats)[:, :, : len(plan)], plan.places.numpy())

    made = fit(measure, schedule(), (1, 1, DIMENSION), Answers.of_classes(labels, 3), "uniform", 64, 0, "fp16")
    assert made.precision == "fp32" and ("fp32", len(labels)) in asked
    assert made.report["deviation of fp16"] is None


def test_a_replayed_race_is_the_race():
    score, _ = scored()
    belief, rule = Belief(Calibration(1.5, (0.2, 0.0, -0.2))), Decide(0.01)
    full, raced = score(), score(rule, belief)
    np.testing.assert_array_equal(replay(full.losses, full.places, rule, belief), raced.losses)


def test_posterior_mode_gives_nearly_the_full_probabilities():
    score, labels = scored(pairs=256)
    full = score()
    calibration = fit_calibration(full.log_likelihoods, labels)
    stopped = score(Settle(), Belief(calibration))
    difference = np.abs(posterior(stopped, calibration).probabilities - posterior(full, calibration).probabilities)
    assert difference.mean() < 0.02
    assert stopped.rows.mean() < full.rows.mean()


def test_risks_bound_what_the_race_does_on_other_images():
    """Certified on some images, at the level that is chosen, the race errs on others as seldom as promised."""
    score, labels = scored(count=200)
    full = score()
    calibration = fit_calibration(full.log_likelihoods, labels)
    belief, ours = Belief(calibration), np.arange(len(labels)) % 2 == 0
    calibration = replace(calibration, pairs=64, risks=race_risks(full.losses[ours], full.places, belief))
    level = promised_rule(calibration, 0.05, 64).level
    assert level > promised_rule(replace(calibration, risks=()), 0.05, 64).level
    assert promised_rule(calibration, 0.05, 32).level < level, "what was measured holds for plans of that many pairs alone"
    answers = posterior(Scores(replay(full.losses[~ours], full.places, Decide(level), belief), full.places), calibration)
    logits = posterior(Scores(full.losses[~ours], full.places), calibration).logits
    chosen = logits[np.arange(len(logits)), answers.leader]
    assert (logits.max(1) - chosen > Decide(level).eta).mean() <= 0.05


def test_uncertainty_that_rows_would_remove_is_averaged_over():
    score, _ = scored(pairs=64)
    full = score()
    few = Scores(np.where(np.arange(64) < 4, full.losses, np.nan), full.places)
    calibration = Calibration(1.0, (0.0,) * 3)
    sharp = np.exp(posterior(few, calibration).logits)
    sharp /= sharp.sum(1, keepdims=True)
    averaged = posterior(few, calibration)
    assert averaged.probabilities.max(1).mean() < sharp.max(1).mean() - 0.01
    np.testing.assert_allclose(posterior(full, calibration).probabilities.sum(1), 1)
    exact = np.exp(posterior(full, calibration).logits)
    np.testing.assert_allclose(posterior(full, calibration).probabilities, exact / exact.sum(1, keepdims=True), atol=1e-9)


def test_p_flip_is_how_often_endless_pairs_answer_otherwise():
    score, _ = scored(pairs=1024, count=60)
    endless = score()
    few = Scores(np.where(np.arange(1024) < 16, endless.losses, np.nan), endless.places)
    said = posterior(few)
    flipped = said.logits.argmax(1) != endless.log_likelihoods.argmax(1)
    assert 0.6 * flipped.mean() < said.p_flip.mean() < 3 * flipped.mean()
    likely = said.p_flip > np.median(said.p_flip)
    assert flipped[likely].sum() > 3 * flipped[~likely].sum()


def test_intervals_hold_what_endless_pairs_say():
    score, _ = scored(pairs=1024, count=60)
    endless = score()
    few = Scores(np.where(np.arange(1024) < 16, endless.losses, np.nan), endless.places)
    calibration = Calibration(3.0, (0.0,) * 3)
    low, high = posterior(few, calibration).intervals.transpose(2, 0, 1)
    truth = softmax(posterior(endless, calibration).logits)
    assert ((low <= truth) & (truth <= high)).mean() > 0.93
    said = posterior(few, calibration).probabilities
    assert ((low <= said) & (said <= high)).all()
    assert (high - low).mean() < 0.3
    assert np.ptp(posterior(endless, calibration).intervals, axis=2).mean() < (high - low).mean() / 3


def test_intervals_of_sums_are_those_of_findings():
    score, _ = scored(count=5)
    scores = score()
    whole = posterior(scores, sums=np.ones((3, 1))).intervals
    np.testing.assert_allclose(whole, np.ones((15, 1, 2)))
    np.testing.assert_allclose(posterior(scores, sums=np.eye(3)).intervals, posterior(scores).intervals)


@pytest.mark.parametrize("usual", [None, 2.0])
def test_rivals_share_the_error_of_the_leader(usual):
    """Classes that err by themselves: as often as the true posterior of their means has it, which independent differences overstate."""
    generator, pairs = np.random.default_rng(0), 16
    losses = generator.normal(size=(400, 6, pairs)).astype(np.float32)
    said = posterior(Scores(losses, np.arange(pairs) / pairs), Calibration(1.0, (0.0,) * 6, spread=usual))
    means = losses.mean(2)
    drawn = means + generator.normal(size=(1000, 1, 6)) / np.sqrt(pairs)
    true = (drawn.argmin(2) != means.argmin(1)).mean()
    assert said.p_flip.mean() == pytest.approx(true, rel=0.07)


def test_a_class_that_was_dropped_moves_with_those_that_go_on():
    """Errors of means over the first n and the first m pairs: the remaining ones have the covariance of a pair over m, less that over P."""
    plan = 16
    losses = np.random.default_rng(1).normal(size=(4000, 3, plan)) + np.array([-9.0, 0.0, 0.0])[:, None]
    raced = losses.copy()
    raced[:, :2, 8:] = np.nan
    raced[:, 2, 4:] = np.nan
    _, means, differences = differences_to_leader(raced)
    pairs, found = np.isfinite(raced).sum(2), error_correlation(differences, np.arange(plan) / plan)
    for endless, correlation in ((True, found), (False, found * common_share(plan - pairs))):
        whole = np.zeros_like(means) + [0, 9, 9] if endless else (losses - losses[:, :1]).mean(2)
        errors = (whole - means)[:, 1:]
        expected = np.sqrt(1 / 2 if endless else 1 / 3) / 2
        assert np.corrcoef(errors.T)[0, 1] == pytest.approx(expected, abs=0.03)
        assert correlation[:, 1, 2].mean() == pytest.approx(expected, abs=0.05)


def test_every_prefix_of_a_plan_is_spread_over_the_timesteps():
    plan = make_plan(schedule(), 64, (1, 2, 2))
    for prefix in (4, 8, 16, 32, 64):
        bins = torch.bincount(plan.timesteps[:prefix] * prefix // 1000, minlength=prefix)
        assert bins.max() <= 2 and (bins == 0).sum() <= 1


PROPOSAL = Proposal((0.4, 0.3, 0.2, 0.1), (True, False, True, False))


def test_a_proposal_moves_the_pairs_and_not_the_score():
    """Pairs follow the density, and the mean of weight x f(t) stays that of uniform timesteps."""
    plain, moved = (make_plan(schedule(), 4096, (1, 1, 1), proposal=proposal) for proposal in (None, PROPOSAL))
    shares = torch.bincount(moved.timesteps * 4 // 1000, minlength=4) / 4096
    np.testing.assert_allclose(shares, PROPOSAL.density, atol=0.01)
    means = [(plan.weights * (plan.timesteps / 1000) ** 2).mean() for plan in (plain, moved)]
    assert means[1] == pytest.approx(means[0].item(), rel=0.01)


def test_antithetic_pairs_share_a_timestep_with_opposite_noise():
    plan = make_plan(schedule(), 64, (1, 2, 2), proposal=PROPOSAL)
    opposite = [(plan.noise[i] == -plan.noise[i + 1]).all().item() for i in range(63)]
    inside = (plan.places * 4).long()
    assert sum(opposite[i] for i in range(63) if inside[i] in (0, 2)) > 15
    assert not any(opposite[i] for i in range(63) if inside[i] in (1, 3))
    assert all(plan.timesteps[i] == plan.timesteps[i + 1] for i in range(63) if opposite[i])


def test_a_plan_is_keyed_by_seed_and_pair():
    short, long = make_plan(schedule(), 8, (1, 2, 2), seed=5), make_plan(schedule(), 16, (1, 2, 2), seed=5)
    assert torch.equal(short.noise, long.noise[:8]) and torch.equal(short.timesteps, long.timesteps[:8])
    assert not torch.equal(short.noise, make_plan(schedule(), 8, (1, 2, 2), seed=6).noise)


def test_a_plan_leaves_out_timesteps_without_signal():
    plan = make_plan(schedule("v_prediction", rescale_betas_zero_snr=True), 64, (1, 2, 2), weighting="elbo")
    assert torch.isfinite(plan.weights).all()


def test_calibration_recovers_temperature_and_bias():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3)) * 2
    truth = softmax(logits + np.array([0.5, 0.0, -0.5]))
    labels = np.array([generator.choice(3, p=row) for row in truth])
    fitted = Calibration(*fit_temperature(logits * 50, Answers.of_classes(labels, 3), ridge=0.0))
    counts = np.bincount(labels) / len(labels)
    recovered = softmax(-Belief(fitted, counts).nats(-(logits * 50)[..., None], np.zeros(1))[..., 0])
    assert fitted.temperature == pytest.approx(50, rel=0.1)
    assert np.abs(recovered - truth).mean() < 0.03


def test_prior_and_bias_shift_the_posterior():
    scores = Scores(np.zeros((1, 2, 4)), np.zeros(4))
    np.testing.assert_allclose(posterior(scores, prior=np.array([0.9, 0.1])).probabilities, [[0.9, 0.1]])
    np.testing.assert_allclose(posterior(scores, Calibration(1.0, (np.log(3.0), 0.0))).probabilities, [[0.75, 0.25]])


def test_calibration_needs_every_class():
    with pytest.raises(InputError, match="class number 1"):
        fit_calibration(np.zeros((3, 2)), np.zeros(3, dtype=int))


def informative_stretch(informative, difference, images=300, pairs=64):
    """Losses of two classes that tell them apart, by a mean `difference`, only where a pair's place is within `informative`."""
    generator = np.random.default_rng(0)
    places, labels = (np.arange(pairs) + 0.5) / pairs, generator.integers(0, 2, images)
    losses = generator.normal(size=(images, 2, pairs))
    told = (places >= informative[0]) & (places < informative[1])
    losses[np.arange(images), 1 - labels] += difference * told
    return losses, places, labels


def test_weights_are_taken_where_they_win_and_nowhere_else():
    candidates = {"uniform": Weighting(), "fitted": Weighting(fitted=True)}
    losses, places, labels = informative_stretch((0.25, 0.5), 0.5)
    name, report = choose_weighting(candidates, losses, places, Answers.of_classes(labels, 2))
    assert name == "fitted" and report["fitted"]["gain"] > report["fitted"]["standard_error"] > 0
    weights = np.array(candidates[name].fit(losses, places, Answers.of_classes(labels, 2)).weights)
    assert weights[2:4].min() > 1.5 * np.delete(weights, [2, 3]).max()
    losses, places, labels = informative_stretch((0.0, 1.0), 0.25)
    assert choose_weighting(candidates, losses, places, Answers.of_classes(labels, 2))[0] == "uniform"


def test_folds_keep_groups_together_and_deal_classes_out():
    labels, groups = np.repeat([0, 1], 50), np.repeat(np.arange(20), 5)
    folds = assign_folds(labels, groups)
    assert all(len(set(folds[groups == group])) == 1 for group in range(20))
    assert all((folds[labels == label] == fold).sum() == 10 for label in (0, 1) for fold in range(5))


def test_a_class_of_a_single_patient_does_not_part_the_others():
    labels, groups = np.repeat([0, 1, 2], (50, 50, 5)), np.append(np.repeat(np.arange(20), 5), [20] * 5)
    folds = assign_folds(labels, groups)
    assert all(len(set(folds[groups == group])) == 1 for group in range(20))
    assert len(set(folds[labels == 2])) > 1


def pilot_losses(sizes, cancelled):
    """Losses of a pilot: classes differ by `sizes` `(B,)`, and opposite noises cancel where `cancelled` `(B,)`."""
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(60, 3, PILOT_BINS, 2))
    other = np.where(
        np.array(cancelled)[:, None], -0.8 * noise + 0.6 * generator.normal(size=noise.shape), generator.normal(size=noise.shape)
    )
    return (np.stack([noise, other], -1) * np.array(sizes)[:, None, None]).reshape(60, 3, -1).astype(np.float32)


def test_a_proposal_looks_where_classes_differ_and_pairs_noise_where_it_cancels():
    sizes, cancelled = np.linspace(4, 1, PILOT_BINS), np.arange(PILOT_BINS) < 10
    proposal = fit_proposal(pilot_losses(sizes, cancelled))
    expected = 0.9 * sizes / sizes.sum() + 0.1 / PILOT_BINS
    np.testing.assert_allclose(proposal.density, expected, rtol=0.3)
    assert all(proposal.antithetic[:8]) and not any(proposal.antithetic[12:])


def test_a_calibration_survives_json():
    fitted = {"spread": 2.5, "risks": (Risk(0.01, 0.0, 0.02),), "group_temperature": 3.0, "report": {"weighting": "vote"}}
    made = Calibration(2.0, (0.1, -0.1), (0.5, 1.5), True, "elbo", PROPOSAL, 64, precision="bf16", **fitted)
    assert Calibration.from_dict(json.loads(json.dumps(asdict(made)))) == made


def test_images_of_a_group_that_are_copies_count_as_one():
    generator = np.random.default_rng(0)
    labels, logits = generator.integers(0, 2, 400), generator.normal(size=(400, 2))
    logits[np.arange(400), labels] += 1.0
    group_of = np.repeat(np.arange(400), 5)
    assert fit_group_temperature(logits[group_of], group_of, labels) == pytest.approx(
        5 * fit_group_temperature(logits, np.arange(400), labels), rel=0.01
    )
