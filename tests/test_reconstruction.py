"""Numbers on reconstructions: against formulas, and against images whose answer is known."""

import numpy as np
import pytest
import torch

from medsd.evaluation.reconstruction import (
    Lesion,
    lesions,
    lesions_by_size,
    ms_ssim,
    patch_pca,
    psnr,
    sharpness,
    ssim,
    tissue_errors,
)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand():
    unit = noise(2, 1, 8, 8) * 0.5
    np.testing.assert_allclose(psnr(unit + torch.tensor([0.1, 0.2])[:, None, None, None], unit), [26.0206, 20.0], atol=1e-3)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_similarity_is_one_for_equals_and_falls_with_noise(measure):
    unit = torch.nn.functional.avg_pool2d(noise(2, 2, 194, 194), 5, 1)
    slight, strong = (measure(unit + amount * noise(*unit.shape, seed=1), unit) for amount in (0.05, 0.5))
    torch.testing.assert_close(measure(unit, unit), torch.ones(2, dtype=torch.float64))
    assert (slight > strong).all() and (slight < 1).all() and strong.shape == (2,)


def test_ssim_of_constants_is_its_first_term():
    """Without structure SSIM is (2 a b + C1) / (a^2 + b^2 + C1), with C1 = (0.01 x 2)^2."""
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), 0.25)
    assert ssim(a, b).item() == pytest.approx((2 * 0.125 + 4e-4) / (0.25 + 0.0625 + 4e-4), rel=1e-5)


@pytest.mark.parametrize("side", [32, 64, 200])
def test_similarity_agrees_with_monai(side):
    """Five scales from 176 pixels on; below, as many as the window fits into."""
    metrics = pytest.importorskip("monai.metrics")
    unit = torch.nn.functional.avg_pool2d(noise(2, 1, side + 4, side + 4), 5, 1)
    again = unit + 0.1 * noise(*unit.shape, seed=1)
    theirs = metrics.SSIMMetric(spatial_dims=2, data_range=2.0, win_size=11, kernel_sigma=1.5)(again, unit)
    np.testing.assert_allclose(ssim(again, unit), theirs[:, 0], atol=1e-4)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[: {32: 2, 64: 3, 200: 5}[side]]
    several = metrics.MultiScaleSSIMMetric(
        spatial_dims=2, data_range=2.0, kernel_size=11, kernel_sigma=1.5, weights=tuple(weights / weights.sum())
    )
    np.testing.assert_allclose(ms_ssim(again, unit), several(again, unit)[:, 0], atol=1e-3)


def test_sharpness_is_below_one_for_a_blur():
    unit = noise(2, 1, 32, 32)
    assert sharpness(unit, unit) == pytest.approx(1) and sharpness(torch.nn.functional.avg_pool2d(unit, 3, 1, 1), unit) < 0.2


def test_patch_pca_is_exact_for_what_it_spans_and_the_best_below():
    """Patches of rank 2 come back; of random ones, the best 2 of 4 components leave less error than any 2 pixels of 4."""
    basis, weights = noise(2, 4, seed=1), noise(64, 2, seed=2) * 0.3
    patches = (weights @ basis).unflatten(1, (2, 2))
    images = patches.unflatten(0, (1, 1, 8, 8)).movedim(4, 3).flatten(2, 3).flatten(3)
    torch.testing.assert_close(patch_pca(images, images, 2, 2), images, atol=1e-5, rtol=0)
    wild = noise(4, 1, 32, 32)
    error = (patch_pca(wild, wild, 2, 2) - wild).square().mean()
    assert 0.1 < error / wild.square().mean() < 0.5


def test_errors_are_told_by_tissue_within_the_window():
    truth = np.array([[-500.0, 0.0, 40.0, 80.0, 2000.0]])
    assert tissue_errors(truth + 2, truth, (-10, 100)) == {"all": 2.0, "fluid": 2.0, "soft tissue": 2.0, "fresh blood": 2.0}


def test_contrast_that_a_lesion_keeps():
    image, mask = np.zeros((32, 32)), np.zeros((32, 32))
    mask[4:8, 4:8], mask[20:22, 20:30] = 1, 1
    image[mask == 1] = 0.8
    again = np.where(mask == 1, 0.2, 0.0)
    again[20:22, 20:30] = 0.6
    first, second = lesions(again, image, mask, pixel_area=2.0)
    assert (first.area, second.area) == (32.0, 40.0)
    assert first.kept == pytest.approx(0.25) and second.kept == pytest.approx(0.75) and first.error == pytest.approx(0.6)
    table = lesions_by_size([first, second, Lesion(5.0, 1.0, 0.9, 0.1)])
    assert table["30-100 mm2"] == pytest.approx({"n": 2, "half_kept": 0.5, "kept": 0.5, "error": 0.4}) and table["0-30 mm2"]["n"] == 1
