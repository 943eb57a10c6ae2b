"""The bound on a likelihood against a model whose likelihood is known, and in bits per dimension."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medsd import MedSDPipeline
from medsd.data.dataset import load_dataset, load_info
from medsd.data.intensity import Labels, Range, Recorded, Stack, Windows, unit_steps
from medsd.errors import InputError
from medsd.inference.plan import make_plan
from medsd.training.fitting import adopt


@pytest.fixture(scope="module")
def pipe(phantom_data):
    torch.manual_seed(0)
    pipe = MedSDPipeline.from_preset("tiny", load_info(phantom_data), pixel_std=0.5)
    adopt(pipe, load_info(phantom_data))
    return pipe


def exact_denoiser(schedule, deviation):
    """v of latents that are N(0, deviation^2) in every element: E[x_0 | x_t] is linear in x_t."""

    def predict(x_t, timesteps, condition):
        alpha, sigma = (values.sqrt()[timesteps][:, None, None, None] for values in (schedule.alphas_cumprod, 1 - schedule.alphas_cumprod))
        clean = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * x_t
        return alpha * (x_t - alpha * clean) / sigma - sigma * clean

    return predict


@pytest.mark.parametrize("deviation", [0.5, 1.0, 2.0])
def test_the_bound_of_an_exact_denoiser_is_the_entropy(pipe, monkeypatch, deviation):
    monkeypatch.setattr(pipe, "_predict", exact_denoiser(pipe.noise_schedule, deviation), raising=False)
    shape = (pipe.unet.config.in_channels, 8, 8)
    latents = deviation * torch.randn((8, *shape), generator=torch.Generator().manual_seed(1))
    density = 0.5 * math.log(2 * math.pi * deviation**2) + 0.5 * latents.square().flatten(1).mean(1).numpy() / deviation**2
    bound = pipe.latent_bound(latents, [""] * 8, pairs=256) / math.prod(shape)
    assert bound == pytest.approx(density, abs=0.03)


def test_a_wrong_denoiser_is_further_away(pipe, monkeypatch):
    latents = torch.randn((4, pipe.unet.config.in_channels, 8, 8), generator=torch.Generator().manual_seed(1))
    bounds = []
    for deviation in (1.0, 0.3):
        monkeypatch.setattr(pipe, "_predict", exact_denoiser(pipe.noise_schedule, deviation), raising=False)
        bounds.append(pipe.latent_bound(latents, [""] * 4))
    assert (bounds[1] > bounds[0]).all()


def test_own_losses_are_those_of_each_image_s_prompt(pipe):
    latents = torch.randn((5, pipe.unet.config.in_channels, 8, 8), generator=torch.Generator().manual_seed(1))
    plan = make_plan(pipe.noise_schedule, 4, tuple(latents.shape[1:]))
    prompts = [pipe.data.prompts[index] for index in (0, 1, 0, 2, 1)]
    together = pipe.own_losses(latents, prompts, plan)
    alone = [pipe.own_losses(latents[place : place + 1], [prompt], plan)[0] for place, prompt in enumerate(prompts)]
    assert np.array_equal(together, np.stack(alone))


def test_bits_of_uniform_noise_are_those_of_its_levels(pipe, phantom_data):
    """An untrained model cannot say less of an image than there is in it: more bits than the phantom's own, which compress well."""
    images = [row["image"] for row in load_dataset(phantom_data, "test").select(range(3))]
    assert np.issubdtype(images[0].dtype, np.integer)
    bits = pipe.bits_per_dimension(images, [pipe.data.prompts[0]] * 3, pairs=16)
    assert bits.shape == (3,) and np.isfinite(bits).all() and (bits > 3).all()


def test_what_has_no_bits_is_refused(pipe):
    with pytest.raises(InputError, match="integers"):
        pipe.bits_per_dimension([np.zeros((1, 32, 32), np.float32)], [""])
    with pytest.raises(InputError, match="autoencoder"):
        type(pipe).bits_per_dimension(SimpleNamespace(codec=object(), data=pipe.data), [np.zeros((1, 32, 32), np.int16)], [""])


@pytest.mark.parametrize(
    "intensity, channels",
    [
        (Range(0.0, 255.0), 2),
        (Windows(((40.0, 80.0), (600.0, 2800.0))), 1),
        (Recorded("percentiles", ((0.0, 100.0),)), 1),
        (Labels((0.0, 1.0, 2.0)), 1),
        (Stack(((Range(0.0, 255.0), 1), (Labels((0.0, 1.0)), 1))), 2),
    ],
    ids=["range", "windows", "recorded", "labels", "stack"],
)
def test_a_step_is_what_one_integer_more_moves(intensity, channels):
    image = np.full((channels, 2, 2), 1.0)
    image[-1] = 0.0 if isinstance(intensity, Labels | Stack) else 1.0
    moved = intensity.to_unit(image + 1, np.array([[0.0, 100.0]])) - intensity.to_unit(image, np.array([[0.0, 100.0]]))
    assert unit_steps(intensity, channels) == pytest.approx(moved[:, 0, 0])


def test_steps_of_a_recorded_range_are_each_image_s_own():
    ranges = np.array([[[0.0, 100.0], [0.0, 1.0]], [[0.0, 50.0], [0.0, 1.0]]])
    stack = Stack(((Recorded("percentiles", ((0.0, 100.0),)), 1), (Labels((0.0, 1.0)), 1)))
    assert unit_steps(stack, 2, ranges) == pytest.approx(np.array([[0.02, 2.0], [0.04, 2.0]]))
