"""The pipeline object: channels, output types, and folders that plain diffusers loads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from medsd import MedSDPipeline
from medsd.data.dataset import load_dataset, load_info
from medsd.data.intensity import parse_windows
from medsd.errors import InputError
from medsd.inference.likelihood import Calibration
from medsd.models.codec import KLCodec, PixelCodec
from medsd.training.fitting import adopt


def small_vae(channels):
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ).eval()


def pipeline(info, vae=None):
    torch.manual_seed(0)
    pipe = MedSDPipeline.from_preset("tiny", info, vae, pixel_mean=-0.5, pixel_std=0.5)
    pipe.set_progress_bar_config(disable=True)
    adopt(pipe, info)
    return pipe


@pytest.fixture(scope="module")
def info(phantom_data):
    return load_info(phantom_data)


@pytest.fixture(scope="module")
def images(phantom_data):
    return load_dataset(phantom_data, "test")[:4]["image"]


def draw(pipe, **options):
    return pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(1), **options).images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_plain_diffusers_loads_the_folder_and_draws_the_same_image(info, tmp_path, channels, guidance_scale):
    pipe = pipeline(
        info if channels == 1 else replace(info, intensity=parse_windows(("brain", "subdural", "bone")).to_dict()), small_vae(channels)
    )
    pipe.save_pretrained(tmp_path / "sd")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    plain.set_progress_bar_config(disable=True)
    ours = draw(pipe, class_name="epidural", output_type="np", guidance_scale=guidance_scale)
    options = {
        "num_inference_steps": 3,
        "guidance_scale": guidance_scale,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(1),
    }
    theirs = plain("a head CT with <epidural>", **options).images
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_one_channel_goes_through_a_three_channel_autoencoder(info, images, tmp_path):
    pipe = pipeline(info, small_vae(3))
    assert draw(pipe, class_name="normal", output_type="source").shape == (1, 1, 32, 32)
    pipe.save_pretrained(tmp_path / "sd")
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "sd").vae.config.in_channels == 3
    again = MedSDPipeline.from_pretrained(tmp_path / "sd")
    torch.testing.assert_close(again.encode_images(images), pipe.encode_images(images))


def test_repetition_and_mean(images):
    vae = small_vae(3)
    one, three = KLCodec(vae, 1), KLCodec(vae, 3)
    unit = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(one.encode(unit), three.encode(unit.repeat(1, 3, 1, 1)))
        latents = one.encode(unit)
        torch.testing.assert_close(one.decode(latents), three.decode(latents).mean(1, keepdim=True))
        assert not torch.equal(one.encode(unit, torch.Generator().manual_seed(0)), latents)


def test_channels_that_do_not_fit_are_refused(info):
    with pytest.raises(InputError, match="--adapt_channels"):
        KLCodec(small_vae(3), 2)
    three = replace(info, intensity=parse_windows(("brain", "subdural", "bone")).to_dict())
    with pytest.raises(InputError, match="start from a --preset"):
        adopt(pipeline(info), three)
    with pytest.raises(InputError, match="--resolution"):
        adopt(pipeline(info), replace(info, resolution=30))


def test_pixels_codec_is_exact():
    codec = PixelCodec(2, 4, 0.1, 0.6)
    images = torch.rand(3, 2, 16, 16) * 2 - 1
    latents = codec.encode(images)
    assert latents.shape == (3, codec.latent_channels, 4, 4)
    torch.testing.assert_close(codec.decode(latents), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_what_elements_say_is_spread_over_pixels_without_loss(channels):
    """An element of a latent lies where its pixels are, and the sum stays."""
    for codec in (PixelCodec(channels, 4, 0.1, 0.6), KLCodec(small_vae(channels), channels)):
        elements = torch.randn(codec.latent_channels, 8, 8)
        pixels = codec.spread(elements)
        assert pixels.shape == (8 * codec.factor,) * 2
        torch.testing.assert_close(pixels.sum(), elements.sum(), rtol=1e-4, atol=1e-4)
        one = torch.zeros_like(elements)
        one[:, 2, 5] = 1
        assert torch.nonzero(codec.spread(one))[:, 0].float().mean() == pytest.approx(2.5 * codec.factor - 0.5)


def test_folder_round_trip_keeps_scores(info, images, tmp_path):
    pipe = pipeline(info)
    pipe.info = replace(pipe.info, calibration=Calibration(120.0, (0.1, -0.1, 0.0, 0.0, 0.0, 0.0)))
    pipe.save_pretrained(tmp_path / "run")
    again = MedSDPipeline.from_pretrained(tmp_path / "run")
    assert again.vae is None and again.info == pipe.info
    first, second = (p.classify(images, mode="full", max_pairs=4) for p in (pipe, again))
    np.testing.assert_array_equal(first.log_likelihoods, second.log_likelihoods)
    assert set(first.predictions) <= set(info.class_names) and first.calibrated
    np.testing.assert_allclose(first.probabilities.sum(1), 1)


def test_output_types(info):
    pipe = pipeline(info)
    hounsfield = draw(pipe, class_name="normal", output_type="source")
    assert hounsfield.min() >= -15 and hounsfield.max() <= 115
    unit = draw(pipe, class_name="normal", output_type="pt")
    np.testing.assert_allclose(hounsfield, unit.numpy() * 130 - 15, atol=1e-4)
    view = draw(pipe, class_name="normal")[0]
    assert view.mode == "L" and view.size == (32, 32)
    np.testing.assert_allclose(np.asarray(view), unit[0, 0].numpy() * 255, atol=1)
    assert draw(pipe, class_name="normal", output_type="latent").shape == (1, 16, 8, 8)
    with pytest.raises(InputError, match="output_type"):
        draw(pipe, class_name="normal", output_type="nifti")


def test_any_scheduler_generates_and_scores_stay(info, images):
    pipe = pipeline(info)
    before = pipe.classify(images, mode="full", max_pairs=4).log_likelihoods
    for scheduler in (DPMSolverMultistepScheduler, DDPMScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        assert draw(pipe, class_name="normal", num_images_per_prompt=2, output_type="np").shape == (2, 32, 32, 1)
        np.testing.assert_array_equal(pipe.classify(images, mode="full", max_pairs=4).log_likelihoods, before)


def test_images_of_other_sizes_and_kinds(info, images):
    pipe = pipeline(info)
    large = np.kron(images[0], np.ones((1, 3, 3), dtype=np.int16))
    latents = pipe.encode_images([images[0], large])
    torch.testing.assert_close(latents[0], latents[1])
    with pytest.warns(UserWarning, match="8-bit grey values are taken for HU"):
        assert pipe.encode_images([Image.fromarray(np.zeros((40, 40), np.uint8))]).shape == (1, 16, 8, 8)
    with pytest.raises(InputError, match="2 channels"):
        pipe.encode_images([np.zeros((2, 32, 32))])
    with pytest.raises(InputError, match="shape"):
        pipe.encode_images([np.zeros((32, 32))])
    with pytest.raises(InputError, match="no image"):
        pipe.classify([])
    for alone in (images[0], "slice.dcm", Image.fromarray(np.zeros((40, 40), np.uint8))):
        with pytest.raises(InputError, match="a list of"):
            pipe.classify(alone)
    with pytest.raises(InputError, match="0 pairs"):
        pipe.classify(images[:1], max_pairs=0)


def test_names_and_prompts_are_checked(info):
    pipe = pipeline(info)
    for options, message in [
        ({"class_name": "glioma"}, "unknown class"),
        ({}, "say what"),
        ({"class_name": "normal", "prompt": "x"}, "exclude"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(pipe, **options)
    with pytest.raises(InputError, match="--prompt_template"):
        pipe.encode_prompts(["word " * 40])


def test_a_foreign_folder_classifies_by_prompts(info, tmp_path):
    colour = replace(info, intensity={"kind": "range", "low": 0.0, "high": 255.0}, image_channels=3)
    pipe = pipeline(colour, small_vae(3))
    pipe.save_pretrained(tmp_path / "sd")
    (tmp_path / "sd" / "medsd.json").unlink()
    foreign = MedSDPipeline.from_pretrained(tmp_path / "sd")
    assert foreign.class_names == []
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    output = foreign.classify([picture], prompts=["a cat", "a dog"], mode="full", max_pairs=4)
    assert output.predictions[0] in {"a cat", "a dog"} and output.rows.tolist() == [8]


def test_class_tokens_start_as_their_words_mean(info):
    pipe = MedSDPipeline.from_preset("tiny", replace(info, prompts=["two words", "b"], class_tokens=[], class_names=["two words", "b"]))
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    ids = pipe.tokenizer("two words", add_special_tokens=False).input_ids
    assert len(ids) == 2
    adopt(pipe, replace(info, class_names=["two words"], class_tokens=["<two-words>"], prompts=["of <two-words>"]))
    token = pipe.tokenizer.convert_tokens_to_ids("<two-words>")
    torch.testing.assert_close(pipe.text_encoder.get_input_embeddings().weight[token], table[ids].mean(0))
    assert pipe.tokenizer("of <two-words>", add_special_tokens=False).input_ids[-1] == token
