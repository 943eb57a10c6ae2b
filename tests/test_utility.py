"""Classifiers and a segmentation that learn from generated images: on images whose answer is known, then on a pipeline's."""

import numpy as np
import pytest
import torch

from medsd import MedSDPipeline
from medsd.data.dataset import load_info
from medsd.data.intensity import Labels, Range, Stack
from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.errors import InputError
from medsd.inference.gallery import Gallery
from medsd.inference.generating import Sampling
from medsd.inference.judging import Judged, plan_samples
from medsd.training import discriminative, segmentation, usefulness
from medsd.training.discriminative import Labelled, fit_resnet
from medsd.training.fitting import adopt
from medsd.training.patience import PATIENCE, train_until_stale
from medsd.training.segmentation import Pairs, check_segmentation, label_names, mask_labels, segmentation_utility
from medsd.training.utility import agreement, as_labelled, classifier_utility, joined

SIDE = 16
LABELS = Labels((0.0, 1.0, 4.0))


def squares(count, seed):
    """Images `(N, 1, SIDE, SIDE)` of noise with two bright squares, of which the second is brighter, and their label numbers."""
    draws = np.random.default_rng(seed)
    images, masks = draws.normal(-0.5, 0.1, (count, 1, SIDE, SIDE)), np.zeros((count, SIDE, SIDE), int)
    for image, mask in zip(images[:, 0], masks, strict=True):
        for label, value in ((1, 0.2), (2, 0.8)):
            row, column = draws.integers(0, SIDE - 5), draws.integers(0, 3) + 8 * (label - 1)
            image[row : row + 5, column : column + 5], mask[row : row + 5, column : column + 5] = value, label
    return torch.from_numpy(images).float(), torch.from_numpy(masks)


def halves(count, seed, part="x"):
    """Images that are brighter on the left (class 0) or on the right (class 1)."""
    draws = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = draws.normal(-0.3, 0.3, (count, 1, 8, 8))
    images[labels == 0, :, :, :4] += 0.5
    images[labels == 1, :, :, 4:] += 0.5
    names = np.array([f"{part}{number}" for number in range(count)])
    return Labelled(torch.from_numpy(images).float(), labels, names, names)


def test_the_utility_of_images_that_lie_about_their_class():
    """Of images with the classes exchanged nothing true is learnt: real validation images keep the model that knows least."""
    wrong = halves(64, 0)
    liars = as_labelled(torch.cat([wrong.images, torch.ones_like(wrong.images)], 1), 1 - wrong.labels, channels=1)
    rounds = []
    found = classifier_utility(
        liars, halves(64, 1), halves(40, 2), halves(60, 3), ["left", "right"], epochs=10, progress=lambda: rounds.append(1)
    )
    assert found["utility/real/auroc"] > 0.95 and found["utility/synthetic/auroc"] < 0.6
    assert found["utility/synthetic/images"] == 64 and found["utility/both/images"] == 128 and len(rounds) == 30
    assert found["utility/real/balanced_accuracy"] > 0.9 and found["utility/synthetic/balanced_accuracy"] < 0.6
    low, high = found["utility/real/accuracy_ci"]
    assert low <= found["utility/real/accuracy"] <= high and not found["reasons"]


def test_images_of_both_keep_their_labels_and_patients():
    one, other = halves(6, 0, "a"), as_labelled(halves(4, 1).images, np.array([0, 1, 0, 1]), channels=1)
    both = joined(one, other)
    assert len(both) == 10 and both.labels.tolist() == [*one.labels, *other.labels] and len(set(both.patients)) == 10
    assert torch.equal(both.images[6:], other.images) and both.keys[0] == "a0"


def test_a_split_without_images_is_refused():
    some = halves(4, 0)
    with pytest.raises(InputError, match="no validation image"):
        classifier_utility(some, some, some[np.zeros(4, bool)], some, ["left", "right"])


def test_agreement_with_a_judge_that_knows():
    judge = fit_resnet(halves(64, 1), halves(40, 2), 2, seed=0, epochs=10)
    images = halves(30, 5)
    stacked = torch.cat([images.images, torch.zeros_like(images.images)], 1)
    labels = np.where(np.arange(30) < 6, 1 - images.labels, images.labels)
    found = agreement("agreement", judge, stacked, labels, ["left", "right"])
    assert found["agreement"] == pytest.approx(24 / 30, abs=0.07) and 0 < found["agreement_ci"][0] < found["agreement"]
    assert found["agreement/left"] == pytest.approx(12 / 15, abs=0.14)


def test_masks_are_read_from_a_generated_channel():
    intensity = Stack(((Range(-10.0, 10.0), 1), (LABELS, 1)))
    image, masks = squares(3, 0)
    source = torch.cat([10 * image, torch.tensor(LABELS.values)[masks][:, None]], 1)
    unit = intensity.to_unit(source.numpy())
    found = Pairs.of(torch.from_numpy(unit).float() + torch.tensor([0.0, 0.3])[:, None, None], mask_labels(intensity))
    assert torch.equal(found.masks, masks) and torch.allclose(found.images, image, atol=1e-6) and len(found) == 3
    assert label_names(LABELS) == ["1", "4"] and mask_labels(Range(0.0, 1.0)) is None
    assert mask_labels(Stack(((Range(0.0, 1.0), 2),))) is None


def test_the_utility_of_pairs_with_wrong_masks_by_monai_s_unet():
    """Real pairs are learnt; of generated ones whose masks belong to other images nothing is."""
    pytest.importorskip("monai")
    real, validation, test = (Pairs(*squares(count, seed)) for count, seed in ((64, 0), (24, 1), (24, 2)))
    images, masks = squares(64, 3)
    patients = [str(number // 2) for number in range(24)]
    rounds = []
    synthetic = Pairs(images, masks.roll(1, 0))
    found = segmentation_utility(synthetic, real, validation, test, patients, LABELS, epochs=40, progress=lambda: rounds.append(1))
    assert found["utility/real/dice/1"] > 0.8 and found["utility/real/dice/4"] > 0.8
    assert found["utility/synthetic/dice/1"] < 0.6 and found["utility/synthetic/dice/4"] < 0.6
    low, high = found["utility/real/dice/4_ci"]
    assert low < found["utility/real/dice/4"] < high and found["utility/synthetic/pairs"] == 64 and len(rounds) <= 80
    again = segmentation.fit_unet(synthetic, validation, 3, seed=0, epochs=1), segmentation.fit_unet(synthetic, validation, 3, 0, 1)
    assert all(torch.equal(one, other) for one, other in zip(*(model.state_dict().values() for model in again), strict=True))


def test_what_cannot_be_segmented_is_refused(monkeypatch):
    monkeypatch.setattr(segmentation, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install -c constraints.txt -e "\.\[segmentation\]"'):
        check_segmentation(64)
    monkeypatch.undo()
    monkeypatch.setattr(segmentation, "find_spec", lambda name: name)
    for side in (8, 28):
        with pytest.raises(InputError, match=f"{side} px is not a larger multiple of 8"):
            check_segmentation(side)
    check_segmentation(16)


def judged_of(folder, data, total):
    """A pipeline of random weights for prepared data, and images that it drew."""
    info = load_info(data)
    torch.manual_seed(0)
    pipe = MedSDPipeline.from_preset("tiny", info, pixel_std=0.5)
    pipe.set_progress_bar_config(disable=True)
    adopt(pipe, info)
    labels = np.arange(len(info.class_names))
    gallery = Gallery(folder / "gallery", {})
    gallery.begin()
    judged = Judged(gallery, plan_samples(labels, pipe.class_names, total, 8), pipe.class_names)
    judged.draw(pipe, Sampling(num_inference_steps=2, guidance_scale=1.0), 0, 1)
    return pipe, judged


@pytest.fixture
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(discriminative, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(discriminative, "QUICK_UPDATES", 1)
    monkeypatch.setattr(discriminative, "cache_folder", lambda kind: tmp_path / kind)


def test_the_utility_of_a_pipeline_s_images(phantom_data, tmp_path, quick):
    pipe, judged = judged_of(tmp_path, phantom_data, 24)
    found = usefulness.utility_of(pipe, str(phantom_data), judged, seed=0)
    assert found["utility/synthetic/images"] == len(judged.labels) == 24 and found["utility/real/images"] <= 24
    for name in ("utility/synthetic/auroc", "utility/real/balanced_accuracy", "utility/both/accuracy", "agreement", "agreement_of_real"):
        assert 0 <= found[name] <= 1 and found[f"{name}_ci"][0] <= found[name] <= found[f"{name}_ci"][1]
    assert {f"agreement/{name}" for name in pipe.class_names} <= set(found) and not any("dice" in name for name in found)
    assert len(list((tmp_path / "resnet").iterdir())) == 1, "the judge is kept for the next time"


def test_the_utility_of_a_pipeline_s_masks_by_monai_s_unet(tmp_path, quick):
    pytest.importorskip("monai")
    write_phantom(tmp_path / "phantom_dicom_0", patients=24, slices=4, size=64)
    prepare_phantom(tmp_path / "data", PrepareOptions(resolution=16, num_workers=0, mask_channel=True))
    pipe, judged = judged_of(tmp_path, tmp_path / "data", 12)
    found = usefulness.utility_of(pipe, str(tmp_path / "data"), judged, seed=0)
    assert found["utility/synthetic/pairs"] == 12 and found["utility/synthetic/images"] == 12
    (name,) = label_names(mask_labels(pipe.data.intensity_map))
    for kind in ("synthetic", "real"):
        low, high = found[f"utility/{kind}/dice/{name}_ci"]
        assert 0 <= low <= found[f"utility/{kind}/dice/{name}"] <= high <= 1
    assert pipe.data.channels == 2 and 0 <= found["agreement"] <= 1


def test_training_ends_with_the_best_weights_and_not_without_any():
    model, losses = torch.nn.Linear(1, 1, bias=False), iter([3.0, 1.0, *[2.0] * 50])
    seen = []

    def epoch():
        torch.nn.init.constant_(model.weight, len(seen))
        seen.append(1)

    train_until_stale(model, 60, epoch, lambda: next(losses), lambda: None)
    assert len(seen) == 2 + PATIENCE and model.weight.item() == 1 and not model.training
    with pytest.raises(InputError, match="no number"):
        train_until_stale(model, 3, epoch, lambda: float("nan"), lambda: None)
