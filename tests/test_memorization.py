"""The audit finds planted copies, altered ones too, and leaves at its rate what was never copied."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medsd.errors import InputError
from medsd.evaluation.memorization import (
    Findings,
    Neighbours,
    audit_summary,
    feature_neighbours,
    find_copies,
    membership,
    pixel_neighbours,
)
from medsd.evaluation.shares import binomial_interval
from medsd.inference.auditing import possible_rate


def heads(count, seed, smooth=1.2):
    """Images `(N, 1, 64, 64)` in `[-1, 1]` that share an outline and differ in texture."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    texture = gaussian_filter(draws.normal(size=(count, 64, 64)), (0, smooth, smooth)) * 2
    shape = np.stack([np.where((x / a) ** 2 + (y / b) ** 2 < 1, 0.2, -0.9) for a, b in draws.uniform(0.6, 0.9, (count, 2))])
    return torch.from_numpy(np.clip(shape + texture * (shape > 0), -1, 1)[:, None]).float()


def altered(images):
    changes = (lambda x: x.flip(-1), lambda x: (0.8 * x + 0.15).clamp(-1, 1), lambda x: torch.roll(x, (4, -4), (1, 2)))
    return torch.stack([changes[number % 3](image) for number, image in enumerate(images)])


@pytest.fixture(scope="module")
def sets():
    return heads(400, 0), heads(300, 1), [str(i // 2) for i in range(300)]


def findings(samples, sets, rate=0.01):
    training, held_out, patients = sets
    found = pixel_neighbours(samples, training, held_out)
    reference = pixel_neighbours(held_out, training, held_out, patients, patients)
    return find_copies({"pixels": found}, {"pixels": reference}, rate)


def test_altered_copies_are_found_and_named(sets):
    planted = np.arange(0, 400, 20)
    samples = torch.cat([heads(180, 2), altered(sets[0][planted])])
    found = findings(samples, sets)
    assert found.flagged[180:].mean() >= 0.9 and found.copies[180:].mean() >= 0.9
    assert (found.nearest[180:] == planted).mean() >= 0.9
    assert not found.copies[:180].any()
    assert audit_summary(found, 0.01)["verdict"] == "failed"


def test_images_that_were_never_seen_are_flagged_at_the_rate(sets):
    flagged = np.concatenate([findings(heads(200, seed), sets, rate=0.05).flagged for seed in range(10, 15)])
    low, high = binomial_interval(int(flagged.sum()), len(flagged))
    assert low <= 0.05
    smooth = findings(heads(200, 20, smooth=3.0), sets)
    assert smooth.flagged.mean() <= 0.02 and audit_summary(smooth, 0.01)["verdict"] == "passed"


def test_few_held_out_images_vouch_for_no_small_rate(sets):
    training, held_out, patients = sets
    with pytest.raises(InputError, match="takes 99"):
        findings(heads(5, 3), (training, held_out[:50], patients[:50]))


@pytest.mark.parametrize("held_out", [2, 48, 97, 99, 161, 999])
def test_the_smallest_rate_is_possible(held_out):
    reference = Neighbours(np.arange(1.0, held_out + 1), np.ones(held_out), np.zeros(held_out, int))
    samples = Neighbours(np.array([0.5, 2.5]), np.ones(2), np.zeros(2, int))
    for rate in (possible_rate(1e-9, held_out), math.ceil(1e4 / (held_out + 1)) / 1e4):
        assert find_copies({"pixels": samples}, {"pixels": reference}, rate).flagged[0]


def test_slices_of_few_patients_are_no_many_witnesses():
    """Held-out scores that are alike within a patient: models that copy nothing still fail in less than one of 40 audits."""
    draws, failed = np.random.default_rng(0), 0
    for _ in range(300):
        alike = np.sqrt(0.6) * np.repeat(draws.normal(size=20), 30) + np.sqrt(0.4) * draws.normal(size=600)
        samples, held_out = (Neighbours(np.exp(x), np.ones(len(x)), np.zeros(len(x), int)) for x in (draws.normal(size=256), alike))
        found = find_copies({"pixels": samples}, {"pixels": held_out}, 0.01, patients=20)
        failed += audit_summary(found, 0.01)["verdict"] == "failed"
    assert failed <= 300 / 40


def test_a_patient_s_own_images_are_no_reference():
    """Two images of a patient that are the same would make every closeness a chance of nothing."""
    one = heads(40, 0)
    twice, patients = torch.cat([one, one]), [str(i) for i in range(40)] * 2
    own = pixel_neighbours(twice, heads(40, 1), twice, patients, patients)
    assert own.held_out.min() > 0.01


def test_flags_count_exactly():
    """Of 199 held-out queries at a rate of 2 %, three may score as low: a sample is flagged below the fourth."""
    reference = Neighbours(np.exp(np.arange(199) / 10.0), np.ones(199), np.zeros(199, int))
    samples = Neighbours(np.exp(np.array([2.9, 3.1]) / 10), np.ones(2), np.zeros(2, int))
    found = find_copies({"pixels": samples}, {"pixels": reference}, 0.02)
    assert found.flagged.tolist() == [True, False]
    assert found.p_values == pytest.approx([4 / 200, 5 / 200])


def test_mirrored_features_count():
    draws = np.random.default_rng(0)
    training, mirrored, held_out = draws.normal(size=(50, 8)), draws.normal(size=(50, 8)), draws.normal(size=(60, 8))
    found = feature_neighbours(mirrored[:3] + 1e-9, [training, mirrored], [held_out])
    assert found.nearest.tolist() == [0, 1, 2] and found.training.max() < 1e-6 and found.held_out.min() > 0.1


def test_more_flags_than_chance_fail_the_audit():
    def summary(flags, patients=300):
        flagged = np.arange(256) < flags
        none = np.zeros(256, bool)
        found = Findings(np.zeros(256), np.zeros(300), np.zeros(256), flagged, none, np.zeros(256, int), [], 0.0, patients)
        return audit_summary(found, 0.01)["verdict"]

    assert summary(5) == "passed" and summary(13) == "failed"
    assert summary(13, patients=20) == "passed"


def test_a_model_that_copies_nothing_fails_in_one_of_forty_audits():
    """Scores of samples and of held-out images from one distribution, few held-out images: the threshold itself is a matter of chance."""
    draws, failed = np.random.default_rng(0), 0
    for _ in range(1000):
        closeness = np.exp(draws.normal(size=(2, 256)))
        samples, held_out = (
            Neighbours(values, np.ones(len(values)), np.zeros(len(values), int)) for values in (closeness[0], closeness[1, :99])
        )
        failed += audit_summary(find_copies({"pixels": samples}, {"pixels": held_out}, 0.01), 0.01)["verdict"] == "failed"
    assert 2 <= failed <= 40


def test_membership_is_the_rank_of_training_losses():
    draws = np.random.default_rng(0)
    patients = [str(i) for i in range(400)]
    none = membership(draws.normal(1, 0.1, 200), draws.normal(1, 0.1, 200), patients)
    assert none["membership_auroc_ci"][0] < 0.5 < none["membership_auroc_ci"][1]
    much = membership(draws.normal(0.5, 0.1, 200), draws.normal(1, 0.1, 200), patients)
    assert much["membership_auroc"] > 0.99 and much["memorization_gap"] == pytest.approx(0.5, abs=0.02)
