"""The moments cache: the same training as without it, drawn anew at each step, and never half-written."""

import json

import numpy as np
import pytest
import torch

from medsd.config import FinetuneUNetConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import Augmentation, TrainingRows
from medsd.errors import InputError
from medsd.models.codec import KLCodec
from medsd.objectives.diffusion import lesion_emphasis
from medsd.training import latents
from medsd.training.latents import CachedLatents, EncodedLatents, Images, cache_moments
from recipes import finetune_unet
from tests.test_autoencoders import autoencoder
from tests.test_recipes import QUICK, losses

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def rows(phantom_data):
    return load_dataset(phantom_data, "train").select(range(24))


@pytest.fixture(scope="module")
def images(phantom_data):
    return Images(load_info(phantom_data), Augmentation())


@pytest.fixture(scope="module")
def codec():
    return KLCodec(autoencoder(), 1)


def test_latents_from_disk_are_those_of_the_encoder(tmp_path, rows, images, codec):
    batch = TrainingRows(rows, with_masks=True)[[5, 0, 17]]
    folder = cache_moments(tmp_path, rows, images, codec, CPU, 1, 0, masks=True)
    cached, weights = CachedLatents(folder, codec, CPU, lesion_weight=3.0)({"rows": batch["rows"]}, seeded())
    encoded, expected = EncodedLatents(images, codec, lesion_weight=3.0)(batch, seeded())
    torch.testing.assert_close(cached, encoded, atol=1e-5, rtol=1e-5)
    assert torch.equal(weights, expected) and weights.max() > 1
    assert torch.equal(lesion_emphasis(batch["masks"], 3.0, 8), weights)


def test_moments_do_not_depend_on_classes_decoder_or_scale(tmp_path, rows, images, codec):
    folder = cache_moments(tmp_path, rows, images, codec, CPU, 1, 0, masks=False)
    other = KLCodec(autoencoder(), 1)
    for weight in other.vae.decoder.parameters():
        weight.data += 1
    other.vae.register_to_config(scaling_factor=3.0)
    for data in (images.data.without_classes(), images.data.with_words()):
        assert cache_moments(tmp_path, rows, Images(data, Augmentation()), other, CPU, 1, 0, masks=False) == folder
    other.vae.quant_conv.weight.data += 1
    assert cache_moments(tmp_path, rows, images, other, CPU, 1, 0, masks=False) != folder


def test_latents_vary_as_the_posterior_does(tmp_path, rows, images, codec):
    """Moments are kept, not samples: a sample kept would have no variance at all between steps."""
    source = CachedLatents(cache_moments(tmp_path, rows, images, codec, CPU, 1, 0, masks=False), codec, CPU)
    batch = TrainingRows(rows)[[3]]
    draws = torch.cat([source(batch, seeded(seed))[0] for seed in range(400)])
    unit, _ = images(batch, seeded())
    deviation = codec.vae.encode(unit).latent_dist.std[0].detach() * codec.vae.config.scaling_factor
    ratio = (draws.std(0) / deviation).flatten()
    assert abs(ratio.mean() - 1) < 0.02 and ratio.min() > 0.85 and ratio.max() < 1.15


def test_each_version_is_augmented_in_its_own_way(tmp_path, rows, phantom_data, codec):
    moved = Images(load_info(phantom_data), Augmentation(shift=4))
    folder = cache_moments(tmp_path, rows, moved, codec, CPU, 3, 0, masks=False)
    source = CachedLatents(folder, codec, CPU)
    assert source.moments.shape[:2] == (24, 3)
    assert not any(np.array_equal(source.moments[:, one], source.moments[:, two]) for one, two in ((0, 1), (0, 2), (1, 2)))
    drawn = {source({"rows": torch.tensor([0])}, seeded(seed))[0].mean().item() for seed in range(20)}
    assert len(drawn) > 3
    again = cache_moments(tmp_path / "again", rows, moved, codec, CPU, 3, 0, masks=False)
    assert np.array_equal(np.load(again / "moments.npy"), source.moments)


def test_the_folder_is_that_of_what_moments_depend_on(tmp_path, rows, images, codec, phantom_data, monkeypatch):
    folder = cache_moments(tmp_path, rows, images, codec, CPU, 1, 0, masks=False)
    other = KLCodec(autoencoder(seed=1), 1)
    for changed in (
        (rows.select(range(23)), images, codec, CPU, 1, 0, False),
        (rows, images, other, CPU, 1, 0, False),
        (rows, Images(load_info(phantom_data), Augmentation(shift=2)), codec, CPU, 2, 0, False),
        (rows, Images(load_info(phantom_data), Augmentation(shift=2)), codec, CPU, 2, 1, False),
        (rows, Images(load_info(phantom_data), Augmentation(shift=2)), codec, CPU, 1, 0, False),
        (rows, images, codec, CPU, 1, 0, True),
    ):
        assert cache_moments(tmp_path, *changed) != folder
    monkeypatch.setattr(latents, "_compute", lambda *arguments: pytest.fail("encoded again"))
    assert cache_moments(tmp_path, rows, images, codec, CPU, 1, 7, masks=False) == folder
    scaled = KLCodec(autoencoder(), 1)
    scaled.vae.register_to_config(scaling_factor=1.5)
    assert cache_moments(tmp_path, rows, images, scaled, CPU, 1, 0, masks=False) == folder


def test_what_was_interrupted_is_computed_again(tmp_path, rows, images, codec, monkeypatch):
    class Broken(KLCodec):
        def moments(self, unit):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_moments(tmp_path, rows, images, Broken(codec.vae, 1), CPU, 1, 0, masks=False)
    folder = cache_moments(tmp_path, rows, images, codec, CPU, 1, 0, masks=False)
    assert np.isfinite(np.load(folder / "moments.npy")).all() and {path.name for path in tmp_path.iterdir()} == {folder.name}


@pytest.fixture
def train(phantom_data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    autoencoder().save_pretrained(tmp_path / "vae")

    def run(name, **flags):
        folder, vae = tmp_path / name, {"vae": str(tmp_path / "vae")}
        finetune_unet.main(FinetuneUNetConfig(dataset_name=str(phantom_data), output_dir=str(folder), **(QUICK | vae | flags)))
        return losses(folder)

    return run


def test_training_is_the_same_with_it(train, tmp_path, monkeypatch):
    """Loss by loss; and the encoder does not run again once moments are there."""
    four = {"max_train_steps": 4, "validation_steps": 0}
    plain, first = train("plain", **four), train("first", cache_latents=True, **four)
    np.testing.assert_allclose(first, plain, rtol=1e-5)
    monkeypatch.setattr(KLCodec, "moments", lambda *arguments: pytest.fail("the encoder ran"))
    assert train("second", cache_latents=True, **four) == first
    (folder,) = (tmp_path / "home" / "medsd" / "moments").iterdir()
    assert json.loads((folder / "record.json").read_text())["augmentation"] is None


def test_augmentation_has_to_be_asked_for(train):
    with pytest.raises(InputError, match="--cached_augmentations 8"):
        train("unet", cache_latents=True, random_shift=2)
    with pytest.raises(InputError, match="--cached_augmentations belongs to"):
        train("unet", cache_latents=True, cached_augmentations=2)
    assert len(train("unet", cache_latents=True, random_shift=2, cached_augmentations=2, lesion_weight=4.0)) == 2


def test_lesions_weigh_what_they_are_told_to(train, tmp_path):
    assert train("weighted", lesion_weight=8.0) != train("plain")
    assert train("cached", lesion_weight=8.0, cache_latents=True) == pytest.approx(losses(tmp_path / "weighted"), rel=1e-5)
