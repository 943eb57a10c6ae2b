"""FID and KID against other libraries and against mathematics; precision and its kin against their formulas worked out pair by pair."""

import numpy as np
import pytest

from medsd.errors import InputError
from medsd.evaluation import distribution
from medsd.evaluation.distribution import by_class, distribution_metrics, frechet_distance, kernel_distance, precision_recall
from medsd.evaluation.features import Features


def two_sets(seed=0, n=120, m=90, width=12, moved=0.4):
    draws = np.random.default_rng(seed)
    mix = draws.normal(size=(width, width))
    return draws.normal(size=(n, width)) @ mix, draws.normal(size=(m, width)) @ mix * 1.2 + moved


def test_the_frechet_distance_of_gaussians_on_one_line():
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2."""
    first, second = np.random.default_rng(0).normal(size=(500, 1)), 3 + 2 * np.random.default_rng(1).normal(size=(400, 1))
    expected = (first.mean() - second.mean()) ** 2 + (first.std(ddof=1) - second.std(ddof=1)) ** 2
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_by_scipys_root():
    from scipy.linalg import sqrtm

    first, second = two_sets()
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_the_frechet_distance_of_fewer_images_than_features():
    first = np.random.default_rng(0).normal(size=(20, 50))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, first + 1) == pytest.approx(50, rel=1e-6)


def test_fid_and_kid_are_those_of_torchmetrics():
    torch = pytest.importorskip("torch")
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    first, second = (torch.tensor(features) for features in two_sets(n=100, m=100))

    class AsTheyAre(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    measures = {
        frechet_distance: fid.FrechetInceptionDistance(feature=AsTheyAre(), input_img_size=(12, 1, 1)),
        kernel_distance: kid.KernelInceptionDistance(feature=AsTheyAre(), subsets=1, subset_size=100),
    }
    for ours, theirs in measures.items():
        theirs.set_dtype(torch.float64)
        theirs.update(first[:, :, None, None], real=True)
        theirs.update(second[:, :, None, None], real=False)
        value = theirs.compute()
        value = value[0] if isinstance(value, tuple) else value
        assert ours(first.numpy(), second.numpy()) == pytest.approx(value.item(), abs=1e-4)


def test_fid_is_that_of_monai():
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    first, second = two_sets()
    theirs = metrics.FIDMetric()(torch.tensor(first), torch.tensor(second)).item()
    assert frechet_distance(first, second) == pytest.approx(theirs, abs=1e-4)


def test_kid_pair_by_pair():
    first, second = two_sets(n=20, m=15)
    kernel = lambda one, other: (one @ other / 12 + 1) ** 3  # noqa: E731
    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (first, second)]
    across = np.mean([kernel(a, b) for a in first for b in second])
    assert kernel_distance(first, second) == pytest.approx(sum(within) - 2 * across, rel=1e-9)


def test_precision_recall_density_and_coverage_pair_by_pair():
    real, generated = two_sets(n=40, m=30, moved=1.0)
    k = 3
    distance = lambda one, other: np.sqrt(((one - other) ** 2).sum())  # noqa: E731
    radius = [[sorted(distance(x, y) for y in some)[k] for x in some] for some in (real, generated)]
    inside = np.array([[distance(x, y) <= r for y in generated] for x, r in zip(real, radius[0], strict=True)])
    reached = np.array([[distance(x, y) <= r for y, r in zip(generated, radius[1], strict=True)] for x in real])
    expected = {
        "precision": inside.any(0).mean(),
        "recall": reached.any(1).mean(),
        "density": inside.sum() / (k * len(generated)),
        "coverage": inside.any(1).mean(),
    }
    assert 0 < expected["precision"] < 1 and 0 < expected["coverage"] < 1
    assert precision_recall(generated, real, k) == pytest.approx(expected)


def test_blocks_change_nothing(monkeypatch):
    real, generated = two_sets()
    whole = kernel_distance(real, generated), precision_recall(generated, real)
    monkeypatch.setattr(distribution, "BLOCK_ELEMENTS", 500)
    assert kernel_distance(real, generated) == pytest.approx(whole[0], rel=1e-9)
    assert precision_recall(generated, real) == whole[1]


def features_of(values, extractor="unet sha256:0"):
    return Features(values.astype(np.float32), extractor)


def test_two_sets_of_real_images_are_at_the_floor():
    """One distribution: KID is 0 within its interval, and FID is its floor within the spread of chance."""
    draws = np.random.default_rng(3)
    real, generated, other = (features_of(draws.normal(size=(n, 8))) for n in (200, 150, 150))
    found = distribution_metrics(generated, real, [str(i // 2) for i in range(200)], other, resamples=200)
    assert found["kid_ci"][0] < 0 < found["kid_ci"][1] and found["kid_floor_ci"][0] < 0 < found["kid_floor_ci"][1]
    assert found["fid_ci"][0] <= found["fid"] <= found["fid_ci"][1]
    assert found["fid"] == pytest.approx(found["fid_floor"], abs=0.4) and found["fid"] < 1.5
    assert found["precision"] > 0.8 and found["coverage"] > 0.8 and found["density"] == pytest.approx(1, abs=0.25)


def test_slices_of_few_patients_have_low_floors():
    """A generator of the very distribution has hardly any precision beside ten alike slices of each patient, and the floor says so."""
    draws = np.random.default_rng(4)
    slices = np.repeat(draws.normal(size=(30, 8)), 10, axis=0) + 0.05 * draws.normal(size=(300, 8))
    generated, other = draws.normal(size=(150, 8)), draws.normal(size=(150, 8))
    found = distribution_metrics(features_of(generated), features_of(slices), [str(i // 10) for i in range(300)], features_of(other))
    for name in ("precision", "density", "coverage"):
        assert found[name] < 0.15 and found[f"{name}_floor"] < 0.15, name
    assert {name: found[f"{name}_floor"] for name in ("precision", "recall", "density", "coverage")} == pytest.approx(
        precision_recall(other, slices), rel=1e-5
    )


def test_intervals_hold_the_truth():
    """The KID of distributions moved by 0.5 in each of 4 features, from many images, lies in 90 to 99 % of the intervals of few."""
    draws = np.random.default_rng(0)
    truth = kernel_distance(draws.normal(size=(6000, 4)), draws.normal(size=(6000, 4)) + 0.5)
    held = 0
    for trial in range(100):
        real, generated = features_of(draws.normal(size=(80, 4))), features_of(draws.normal(size=(60, 4)) + 0.5)
        low, high = distribution_metrics(generated, real, [str(i) for i in range(80)], resamples=200, seed=trial)["kid_ci"]
        held += low <= truth <= high
    assert 86 <= held <= 99


def test_intervals_go_by_patient():
    """Four copies of each image are no more images."""
    values, generated = two_sets(n=30, m=60)
    copies = np.repeat(values, 4, axis=0) + 1e-3 * np.random.default_rng(0).normal(size=(120, 12))
    ids = [str(i // 4) for i in range(120)]
    by_patient = distribution_metrics(features_of(generated), features_of(copies), ids)["kid_ci"]
    by_image = distribution_metrics(features_of(generated), features_of(copies), [str(i) for i in range(120)])["kid_ci"]
    assert np.diff(by_patient) > 1.3 * np.diff(by_image)


def test_each_class_by_itself():
    real, generated = two_sets(n=60, m=60)
    labels = np.arange(60) % 2
    patients = [f"{i:02}" for i in range(60)]
    found = by_class(features_of(generated), labels, features_of(real), labels, patients, ["a", "b"])
    alone = distribution_metrics(features_of(generated[::2]), features_of(real[::2]), patients[::2])
    assert found["fid/a"] == alone["fid"] and found["kid/a_ci"] == alone["kid_ci"] and found["fid/b"] != found["fid/a"]
    assert found["fid_floor/a"] is None and "more than 5" in found["reasons"]["fid_floor/a"]


def test_too_few_images_have_a_reason():
    real, generated = two_sets(n=60, m=4)
    found = distribution_metrics(features_of(generated), features_of(real), [str(i) for i in range(60)])
    assert found["fid"] is None and "4 generated" in found["reasons"]["fid"]


def test_images_of_one_patient_that_are_alike_add_nothing_to_kid():
    """A perfect generator: patients with eight like images each, and samples of as many other patients."""
    held, values = 0, []
    for trial in range(40):
        draws = np.random.default_rng(trial)
        real = np.repeat(draws.normal(size=(30, 4)), 8, axis=0) + 0.2 * draws.normal(size=(240, 4))
        found = distribution_metrics(features_of(draws.normal(size=(100, 4)) * 1.02), features_of(real), [str(i // 8) for i in range(240)])
        values.append(found["kid"])
        held += found["kid_ci"][0] <= 0 <= found["kid_ci"][1]
    assert abs(np.mean(values)) < 2 * np.std(values) / 40**0.5 + 0.02 and held >= 34


def test_one_patient_leaves_no_interval_but_the_numbers():
    real, generated = two_sets(n=30, m=30)
    found = distribution_metrics(features_of(generated), features_of(real), ["one"] * 30, features_of(real))
    assert found["fid"] > 0 and found["fid_ci"] is None and found["recall_ci"] is None and found["precision_ci"] is not None
    assert all(name in found["reasons"] for name, value in found.items() if value is None)


def test_features_of_two_extractors_are_not_compared():
    real, generated = two_sets()
    with pytest.raises(InputError, match="cannot be compared"):
        distribution_metrics(features_of(generated), features_of(real, "inception sha256:1"), ["0"] * 120)
