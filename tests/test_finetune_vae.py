"""recipes/finetune_vae.py as a user types it: KL and VQ, full, LoRA and decoder alone, discriminator, channels, resume."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, VQModel
from PIL import Image
from safetensors.torch import load_file

from medsd import MedSDPipeline
from medsd.config import FinetuneVAEConfig
from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.errors import InputError
from medsd.models.autoencoders import build_vae, load_vae
from medsd.models.presets import PRESETS
from recipes import finetune_vae
from tests.test_autoencoders import autoencoder
from tests.test_recipes import QUICK, losses
from tests.test_recipes import train as train_unet


def train(data, folder, **flags):
    finetune_vae.main(FinetuneVAEConfig(dataset_name=str(data), output_dir=str(folder), **(QUICK | flags)))
    return folder


@pytest.fixture(scope="module")
def joint_data(tmp_path_factory):
    """A phantom of two channels: the image and the mask of its bleed."""
    folder = tmp_path_factory.mktemp("joint")
    write_phantom(folder / "phantom_dicom_0", patients=12, slices=6, size=64)
    prepare_phantom(folder / "data", PrepareOptions(resolution=32, num_workers=0, mask_channel=True))
    return folder / "data"


@pytest.fixture(scope="module")
def trained(phantom_data, tmp_path_factory):
    """An autoencoder of each kind, after two steps."""
    folder = tmp_path_factory.mktemp("vae")
    return {kind: train(phantom_data, folder / kind, codec=kind) for kind in ("kl", "vq")}


@pytest.mark.parametrize(("kind", "model"), [("kl", AutoencoderKL), ("vq", VQModel)])
def test_the_folder_loads_in_plain_diffusers_and_reports_itself(trained, kind, model):
    vae = model.from_pretrained(trained[kind])
    assert vae.config.in_channels == 1 and vae.config.scaling_factor != 0.18215
    names = {path.name for path in trained[kind].iterdir()}
    assert {"medsd.json", "config.yaml", "metrics.jsonl", "metrics.json", "reconstructions.png", "checkpoint-2", "status.json"} <= names
    numbers = json.loads((trained[kind] / "metrics.json").read_text())
    assert numbers["split"] == "validation" and abs(numbers["latent_std"] - 1) < 0.2 and numbers["linear_psnr"] > numbers["psnr"]
    assert numbers["error_hu"]["all"] > 1 and numbers["error_hu_without_codec"] < 0.5
    assert numbers["lesions"] and all(0 <= row["half_kept"] <= 1 for row in numbers["lesions"].values())
    assert ("codebook_perplexity" in numbers) == (kind == "vq")
    assert np.asarray(Image.open(trained[kind] / "reconstructions.png").convert("L"))[:20].max() > 200


@pytest.mark.parametrize("flags", [{}, {"codec": "vq"}, {"gan_start": 1, "gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(phantom_data, tmp_path, flags):
    """To the bit, the discriminator's weights included."""
    whole = train(phantom_data, tmp_path / "whole", max_train_steps=3, **flags)
    train(phantom_data, tmp_path / "part", **flags)
    part = train(phantom_data, tmp_path / "part", max_train_steps=3, resume_from_checkpoint="latest", **flags)
    assert losses(part)[-1] == losses(whole)[-1]
    files = [file.relative_to(whole) for file in (whole / "checkpoint-3").rglob("*.safetensors")]
    assert len(files) == (8 if "gan_start" in flags else 5)
    for file in files:
        ours, theirs = load_file(part / file), load_file(whole / file)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), file


def test_the_discriminator_joins_at_its_update(phantom_data, tmp_path):
    folder = train(phantom_data, tmp_path / "vae", max_train_steps=4, gan_weight=0.5, gan_start=3)
    assert sum("discriminator_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines()) == 2
    plain = train(phantom_data, tmp_path / "plain", max_train_steps=4)
    assert losses(folder)[:2] == losses(plain)[:2]
    ours, theirs = (load_file(run / "checkpoint-3" / "weights.safetensors") for run in (folder, plain))
    assert any(not torch.equal(value, theirs[name]) for name, value in ours.items())
    for run, flags in ((plain, {"gan_start": 3}), (folder, {})):
        again = {"max_train_steps": 5, "resume_from_checkpoint": "latest"} | flags
        with pytest.raises(InputError, match="gan_start .* -> .*--allow_config_change"):
            train(phantom_data, run, **again)
        with pytest.raises(InputError, match="discriminator: resume with the flags"):
            train(phantom_data, run, allow_config_change=True, **again)


def test_a_longer_run_keeps_the_update_at_which_the_discriminator_joined(phantom_data, tmp_path):
    folder = train(phantom_data, tmp_path / "vae", max_train_steps=4, gan_weight=0.5)
    train(phantom_data, folder, max_train_steps=7, gan_weight=0.5, resume_from_checkpoint="latest")
    named = ["discriminator_loss" in line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert named == [False] + [True] * 6


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_decoder_alone_keeps_the_latent_space(phantom_data, tmp_path, trained, kind):
    before = load_vae(str(trained[kind]))
    for name, flags in {"full": {}, "lora": {"rank": 2, "learning_rate": 0.01}}.items():
        start = {"pretrained_model_name_or_path": str(trained[kind]), "decoder_only": True}
        after = load_vae(str(train(phantom_data, tmp_path / name, **start, **flags)))
        weights = after.state_dict()
        for key, value in before.state_dict().items():
            if key.startswith(("encoder", "quant")):
                assert torch.equal(value, weights[key]), key
        assert not torch.equal(before.decoder.conv_in.weight, after.decoder.conv_in.weight)
        assert after.config.scaling_factor == before.config.scaling_factor


def test_adapters_are_merged_into_what_plain_diffusers_loads(phantom_data, tmp_path, trained):
    folder = train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(trained["kl"]), rank=2, learning_rate=0.01)
    record = json.loads((folder / "environment.json").read_text())
    before, after = AutoencoderKL.from_pretrained(trained["kl"]), AutoencoderKL.from_pretrained(folder)
    assert before.state_dict().keys() == after.state_dict().keys()
    assert not torch.equal(before.encoder.conv_in.weight, after.encoder.conv_in.weight)
    assert 0 < record["trained_parameters"] < sum(weight.numel() for weight in after.parameters()) / 4


def test_channels_are_adapted_on_request(phantom_data, joint_data, tmp_path):
    autoencoder(channels=3).save_pretrained(tmp_path / "colour")
    start = {"pretrained_model_name_or_path": str(tmp_path / "colour"), "learning_rate": 1e-12, "use_ema": False}
    tiled = train(phantom_data, tmp_path / "tiled", **start)
    one = train(phantom_data, tmp_path / "one", adapt_channels=True, **start)
    assert AutoencoderKL.from_pretrained(tiled).config.in_channels == 3 and AutoencoderKL.from_pretrained(one).config.in_channels == 1
    np.testing.assert_allclose(losses(one), losses(tiled), rtol=1e-5)
    with pytest.raises(InputError, match="--adapt_channels"):
        train(joint_data, tmp_path / "two", **start)
    two = AutoencoderKL.from_pretrained(train(joint_data, tmp_path / "two", adapt_channels=True, **start))
    assert two.config.in_channels == 2 and len(two.config.latents_std) == 4 and two.encoder.conv_in.weight[:, 1].abs().max() < 1e-9


def test_kinds_channels_and_perceptual_models_that_do_not_fit(phantom_data, tmp_path, trained):
    for flags, message in (
        ({"codec": "vq", "pretrained_model_name_or_path": str(trained["kl"])}, "is of codec kl"),
        ({"perceptual_model": str(tmp_path)}, "--perceptual_model"),
        ({"enable_vae_tiling": True, "codec": "vq"}, "neither sliced nor tiled"),
        ({"pretrained_model_name_or_path": str(tmp_path)}, "no AutoencoderKL or VQModel there"),
    ):
        with pytest.raises(InputError, match=message):
            train(phantom_data, tmp_path / "vae", **flags)
        assert not (tmp_path / "vae").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"_class_name": "Auto')
    with pytest.raises(InputError, match="is damaged"):
        train(phantom_data, tmp_path / "vae", pretrained_model_name_or_path=str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("kind", "shape"), [("kl", "StableDiffusionPipeline"), ("vq", "MedSDPipeline"), ("joint", "MedSDPipeline"), ("pixels", "MedSDPipeline")]
)
def test_every_codec_carries_a_pipeline(phantom_data, joint_data, tmp_path, trained, kind, shape):
    """Trained, saved, loaded, drawn from and scored."""
    flags, data = {"vae": str(trained.get(kind))}, phantom_data
    if kind == "joint":
        data, flags = joint_data, {"vae": str(train(joint_data, tmp_path / "vae"))}
    if kind == "pixels":
        flags = {"codec": "pixels", "pixel_factor": 1}
    run = train_unet(data, tmp_path / "unet", **flags)
    assert json.loads((run / "model_index.json").read_text())["_class_name"] == shape
    pipe = MedSDPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(class_name="epidural", num_inference_steps=2, output_type="source").images
    assert drawn.shape == (1, 2 if kind == "joint" else 1, 32, 32) and np.isfinite(drawn).all()
    scores = pipe.classify([np.zeros(drawn.shape[1:], np.float32)], mode="full", max_pairs=2)
    assert np.isfinite(scores.log_likelihoods).all()
    if shape == "StableDiffusionPipeline":
        StableDiffusionPipeline.from_pretrained(run)


def test_a_foreign_latent_space_is_warned_about(phantom_data, tmp_path, trained, capsys):
    base = train_unet(phantom_data, tmp_path / "unet", vae=str(trained["kl"]))
    tuned = train(phantom_data, tmp_path / "tuned", pretrained_model_name_or_path=str(trained["kl"]), decoder_only=True)
    start = {"pretrained_model_name_or_path": str(base), "rank": 2}
    capsys.readouterr()
    lora = train_unet(phantom_data, tmp_path / "lora", vae=str(tuned), **start)
    assert "warning" not in capsys.readouterr().out
    assert torch.equal(MedSDPipeline.from_pretrained(lora).vae.decoder.conv_out.weight, load_vae(str(tuned)).decoder.conv_out.weight)
    build_vae(PRESETS["tiny"], 1).save_pretrained(tmp_path / "other")
    train_unet(phantom_data, tmp_path / "full", vae=str(tmp_path / "other"), pretrained_model_name_or_path=str(base))
    assert "must be trained in full" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{}, {"rank": 2, "learning_rate": 0.01}])
def test_the_best_look_is_a_whole_autoencoder(phantom_data, tmp_path, trained, flags):
    """At the last step the best look and the run's own folder are the same model; adapters are merged in both."""
    start = {"pretrained_model_name_or_path": str(trained["kl"])}
    folder = train(phantom_data, tmp_path / "vae", max_train_steps=3, validation_steps=3, **start, **flags)
    best, final = (load_vae(str(path)) for path in (folder / "best", folder))
    assert best.config.latents_mean == final.config.latents_mean and json.loads((folder / "best" / "medsd.json").read_text())["codec"]
    weights = final.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in best.state_dict().items())
