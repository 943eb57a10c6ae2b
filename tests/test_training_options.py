"""Options of loss and noise through recipes/finetune_unet.py: each changes the training, and what it needs is kept and resumed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from medsd import MedSDPipeline
from medsd.commandline import parse
from medsd.config import FinetuneUNetConfig, FinetuneVAEConfig, PrepareDataConfig
from medsd.errors import InputError
from medsd.training.setup import check_launch
from recipes.finetune_unet import build_pipeline, choices, data_info, snr_gamma
from tests.test_recipes import losses, train


@pytest.fixture(scope="module")
def plain(phantom_data, tmp_path_factory):
    return losses(train(phantom_data, tmp_path_factory.mktemp("plain") / "unet", validation_steps=0))


@pytest.mark.parametrize(
    "flags",
    [
        {"loss_type": "l1"},
        {"loss_type": "smooth_l1"},
        {"loss_type": "huber"},
        {"noise_offset": 0.1},
        {"input_perturbation": 0.1},
        {"timestep_sampling": "logit_normal"},
        {"timestep_sampling": "importance"},
        {"lesion_weight": 5.0},
        {"prediction_type": "epsilon"},
        {"prediction_type": "sample"},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"learned_variance": True},
        {"snr_gamma": 5.0},
        {"proportion_empty_prompts": 0.9},
    ],
    ids=str,
)
def test_each_option_changes_the_training(phantom_data, tmp_path, plain, flags):
    run = train(phantom_data, tmp_path / "unet", **flags)
    assert np.isfinite(losses(run)).all() and losses(run) != plain
    pipe = MedSDPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe(class_name="epidural", num_inference_steps=3, guidance_scale=2.0, output_type="np").images).all()
    scores = pipe.classify([np.zeros((1, 32, 32), np.int16)], mode="full", max_pairs=4)
    assert np.isfinite(scores.log_likelihoods).all()


def test_zero_terminal_snr_is_learned_where_there_is_no_signal(phantom_data):
    """There the weights of a min-SNR gamma, which is a preset's default, are 0."""
    for flags, gamma in (({}, 20), ({"rescale_betas_zero_snr": True}, None), ({"rescale_betas_zero_snr": True, "snr_gamma": 5.0}, 5)):
        config = FinetuneUNetConfig(dataset_name=str(phantom_data), **flags)
        assert snr_gamma(config, build_pipeline(config, data_info(config))) == gamma


def test_the_threshold_of_huber_is_heard(phantom_data, tmp_path):
    variants = [{}, {"huber_schedule": "constant"}, {"huber_c": 0.5}, {"huber_schedule": "exponential"}]
    runs = [train(phantom_data, tmp_path / str(n), loss_type="huber", validation_steps=0, **flags) for n, flags in enumerate(variants)]
    assert len({losses(run)[0] for run in runs}) == len(variants)


def test_a_learned_variance_is_drawn_with_and_left_out_of_scores(phantom_data, tmp_path):
    run = train(phantom_data, tmp_path / "unet", learned_variance=True)
    pipe = MedSDPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.learns_variance and type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert pipe.scheduler.config.variance_type == "learned_range" and not pipe.is_sd_shaped
    scores = pipe.classify([np.zeros((1, 32, 32), np.int16)], mode="full", max_pairs=4).log_likelihoods
    with torch.no_grad():
        pipe.unet.conv_out.bias[16:] += 100
    assert np.array_equal(scores, pipe.classify([np.zeros((1, 32, 32), np.int16)], mode="full", max_pairs=4).log_likelihoods)
    from diffusers import DDIMScheduler

    with pytest.raises(InputError, match="learns a variance"):
        train(phantom_data, tmp_path / "again", pretrained_model_name_or_path=str(run), snr_gamma=5.0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert np.isfinite(pipe(class_name="epidural", num_inference_steps=3, output_type="np").images).all()


def test_importance_sampling_is_resumed(phantom_data, tmp_path):
    flags = {"timestep_sampling": "importance", "validation_steps": 0, "train_batch_size": 64}
    whole = train(phantom_data, tmp_path / "whole", max_train_steps=8, **flags)
    train(phantom_data, tmp_path / "part", max_train_steps=6, **flags)
    part = train(phantom_data, tmp_path / "part", max_train_steps=8, resume_from_checkpoint="latest", **flags)
    assert losses(part)[-2:] == losses(whole)[-2:]
    state = load_file(whole / "checkpoint-8" / "memory.safetensors")["timesteps"]
    assert state.shape == (50, 2) and state[:, 1].min() > 0
    other = {"max_train_steps": 9, "resume_from_checkpoint": "latest", "validation_steps": 0, "train_batch_size": 64}
    with pytest.raises(InputError, match="timestep_sampling importance -> uniform"):
        train(phantom_data, part, **other)
    with pytest.raises(InputError, match="another --timestep_sampling"):
        train(phantom_data, part, allow_config_change=True, **other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rescale_betas_zero_snr", "--prediction_type", "epsilon"], "v_prediction or sample"),
        (["--learned_variance", "--vae", "x"], "in pixels"),
        (["--adapt_channels"], "--pretrained_model_name_or_path"),
        (["--vae", "v", "--cache_latents", "--random_flip", "both"], "--cached_augmentations 8"),
        (["--loss_type", "huber", "--huber_c", "0"], "above 0"),
        (["--noise_offset", "-1"], "0 or more"),
        (["--codec", "vq"], "--vae FOLDER"),
        (["--cache_latents"], "pixels have none"),
        (["--enable_vae_tiling"], "pixels have none"),
        (["--huber_c", "0.2"], "--loss_type huber"),
        (["--revision", "main"], "--pretrained_model_name_or_path"),
    ],
)
def test_contradictions_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        parse(FinetuneUNetConfig, flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gan_weight", "0", "--gan_start", "5"], "drop one"),
        (["--gan_start", "9", "--max_train_steps", "8"], "never joins"),
        (["--perceptual_weight", "0", "--perceptual_model", "m"], "--perceptual_weight above 0"),
        (["--decoder_only"], "--pretrained_model_name_or_path"),
        (["--kl_weight", "-1"], "0 or more"),
    ],
)
def test_contradictions_about_autoencoders_are_named(flags, message):
    with pytest.raises(InputError, match=message):
        parse(FinetuneVAEConfig, flags)


def test_noise_cannot_be_predicted_where_the_signal_is_gone(phantom_data, tmp_path):
    base = train(phantom_data, tmp_path / "base", prediction_type="epsilon", validation_steps=0)
    with pytest.raises(InputError, match="v_prediction or sample"):
        train(phantom_data, tmp_path / "unet", pretrained_model_name_or_path=str(base), rescale_betas_zero_snr=True)


def test_masks_are_stacked_where_there_are_masks():
    assert parse(PrepareDataConfig, ["--channels", "image", "mask"]).stacks_mask
    with pytest.raises(InputError, match="--mask_column names"):
        parse(PrepareDataConfig, ["--source", "csv", "--data_dir", "d", "--labels", "l.csv", "--channels", "image", "mask"])


def test_other_noise_is_another_setting(phantom_data):
    """Though the schedule has the same name."""
    config = FinetuneUNetConfig(dataset_name=str(phantom_data))
    pipe = build_pipeline(config, data_info(config))
    before = choices(config, pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_start=0.0015, beta_end=0.0195)
    after = choices(config, pipe)
    assert {name for name in before if before[name] != after[name]} == {"betas"} and after["betas"] == [0.0015, 0.0195]


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("FSDP", {"version": 1}, "fsdp2.yaml has version 2"),
        ("FSDP", {"mixed_precision": "fp16"}, "--mixed_precision bf16 or no"),
        ("DEEPSPEED", {}, "a launch as DEEPSPEED is not known: .*zero2.yaml"),
    ],
)
def test_a_launch_that_does_not_fit_is_refused(kind, flags, message):
    launched = {"distributed_type": DistributedType[kind], "num_processes": 2, "mixed_precision": flags.get("mixed_precision", "no")}
    accelerator = SimpleNamespace(**launched, is_fsdp2=flags.get("version", 2) == 2)
    with pytest.raises(InputError, match=message):
        check_launch(accelerator, False, may_shard=True)
    accelerator.distributed_type, accelerator.mixed_precision = DistributedType.MULTI_GPU, "no"
    check_launch(accelerator, False, may_shard=True)
