"""Codecs, autoencoders, channel surgery and what autoencoders are trained by."""

import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from medsd.errors import InputError
from medsd.models.autoencoders import (
    add_vae_lora,
    build_vae,
    choose_decoder,
    codebook_perplexity,
    last_layer,
    load_vae,
    merge_vae_lora,
    nearest_entries,
    save_memory,
    seed_codebook,
    training_pass,
)
from medsd.models.channels import adapt_unet, adapt_vae
from medsd.models.codec import (
    KLCodec,
    PixelCodec,
    codec_of,
    is_sd_shaped,
    latent_statistics,
    record_statistics,
    same_latents,
)
from medsd.models.presets import PRESETS
from medsd.models.unet import build_unet
from medsd.objectives.adversarial import PatchDiscriminator, adaptive_weight, deception_loss, discriminator_loss
from medsd.objectives.autoencoder import WeightedSum, codebook_loss, kl_divergence, reconstruction_error
from medsd.objectives.perceptual import PerceptualDistance, PretrainedFeatures, RandomFeatures, perceptual_distance

KINDS = ("kl", "vq")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def autoencoder(kind="kl", channels=1, seed=0):
    """With every weight random, so that nothing is equal because it is zero."""
    torch.manual_seed(seed)
    vae = build_vae(PRESETS["tiny"], channels, kind).eval()
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    return vae


def images(channels=1, count=3, side=32):
    return torch.rand(count, channels, side, side, generator=seeded(1)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_latents_come_from_moments_alone(kind, channels):
    codec, unit = codec_of(autoencoder(kind, channels), channels), images(channels)
    with torch.no_grad():
        moments = codec.moments(unit)
        assert torch.equal(codec.draw(moments, seeded()), codec.encode(unit, seeded()))
        assert torch.equal(codec.draw(moments), codec.encode(unit))
        assert codec.decode(codec.encode(unit)).shape == unit.shape
    assert moments.dtype == torch.float32 and codec.encode(unit).shape == (3, codec.latent_channels, 8, 8)


def test_draws_are_those_of_diffusers():
    vae, unit = autoencoder(), images()
    with torch.no_grad():
        theirs = vae.encode(unit).latent_dist.sample(seeded(5)) * vae.config.scaling_factor
        torch.testing.assert_close(KLCodec(vae, 1).encode(unit, seeded(5)), theirs)


def test_a_pixel_codec_has_one_latent_for_an_image():
    codec, unit = PixelCodec(2, 4, -0.3, 0.5), images(2)
    assert torch.equal(codec.draw(codec.moments(unit), seeded()), codec.encode(unit))
    torch.testing.assert_close(codec.decode(codec.encode(unit)), unit)


@pytest.mark.parametrize(("kind", "channels"), [("kl", 1), ("kl", 3), ("kl", 2), ("kl", 5), ("vq", 1), ("vq", 5)])
def test_latents_have_unit_scale_once_statistics_are_recorded(kind, channels, tmp_path):
    """One scaling factor where plain diffusers shall decode, and for a VQModel; else mean and deviation of each channel."""
    vae, unit = autoencoder(kind, channels), images(channels, 8)
    codec = codec_of(vae, channels)
    before = codec.decode(codec.encode(unit))
    record_statistics(codec, *latent_statistics(codec, unit))
    latents = torch.cat([codec.encode(unit, seeded(seed)) for seed in range(32)])
    own_class = kind == "kl" and channels in {2, 5}
    if own_class:
        torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)
        torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    else:
        assert abs(latents.std().item() - 1) < 0.02 and vae.config.get("latents_std") is None
    torch.testing.assert_close(codec.decode(codec.encode(unit)), before, atol=1e-5, rtol=1e-5)
    assert is_sd_shaped(vae) == (kind == "kl" and channels in {1, 3})
    vae.save_pretrained(tmp_path)
    torch.testing.assert_close(codec_of(load_vae(str(tmp_path)), channels).encode(unit), codec.encode(unit))


def test_statistics_are_those_of_the_posterior():
    """Their variance is that of the means and, on average, that of the posteriors."""
    codec, unit = KLCodec(autoencoder(), 1), images(count=4)
    mean, std = latent_statistics(codec, unit)
    posterior = codec.vae.encode(unit).latent_dist
    draws = torch.stack([posterior.sample(seeded(seed)) for seed in range(200)]).detach()
    torch.testing.assert_close(draws.mean((0, 1, 3, 4)).double(), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(draws.movedim(2, 0).flatten(1).std(1).double(), std, rtol=0.01, atol=0)


def test_a_latent_space_is_known_by_its_encoder():
    one, other = autoencoder(), autoencoder()
    assert same_latents(one, other)
    torch.nn.init.normal_(other.decoder.conv_out.weight)
    assert same_latents(one, other)
    other.register_to_config(scaling_factor=0.3)
    assert not same_latents(one, other)
    assert not same_latents(one, autoencoder(seed=1)) and not same_latents(one, autoencoder("vq"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_is_found_by_its_folder(kind, tmp_path):
    autoencoder(kind).save_pretrained(tmp_path / "bare")
    autoencoder(kind).save_pretrained(tmp_path / "pipeline" / ("vae" if kind == "kl" else "vqvae"))
    for name in ("bare", "pipeline"):
        assert isinstance(load_vae(str(tmp_path / name)), AutoencoderKL if kind == "kl" else VQModel)
    with pytest.raises(InputError, match="no AutoencoderKL or VQModel there"):
        load_vae(str(tmp_path))


# Channel surgery


@pytest.mark.parametrize("kind", KINDS)
def test_a_codec_of_one_channel_is_the_old_one_tiled_and_averaged(kind):
    """Exactly the figure of the issue: 1e-5 against tiling going in and averaging coming out."""
    old, new, unit = autoencoder(kind, 3), autoencoder(kind, 3), images()
    adapt_vae(new, 1)
    tiled, adapted = codec_of(old, 1), codec_of(new, 1)
    assert (tiled.repeats, adapted.repeats, new.config.in_channels, new.config.out_channels) == (3, 1, 1, 1)
    with torch.no_grad():
        assert (tiled.moments(unit) - adapted.moments(unit)).abs().max() <= 1e-5
        assert (tiled.decode(tiled.encode(unit)) - adapted.decode(adapted.encode(unit))).abs().max() <= 1e-5


def test_a_unet_of_one_channel_is_the_old_one_tiled_and_averaged():
    torch.manual_seed(0)
    old = build_unet(PRESETS["tiny"], 12, 16, learned_variance=True).eval()
    new = build_unet(PRESETS["tiny"], 12, 16, learned_variance=True).eval()
    new.load_state_dict(old.state_dict())
    adapt_unet(new, 3, 1)
    three, one, x = PixelCodec(3, 2, 0.0, 1.0), PixelCodec(1, 2, 0.0, 1.0), images()
    condition, timesteps = torch.randn(3, 4, 64), torch.tensor([1, 500, 999])
    with torch.no_grad():
        theirs = old(three.encode(x.repeat(1, 3, 1, 1)), timesteps, condition).sample.chunk(2, 1)
        ours = new(one.encode(x), timesteps, condition).sample.chunk(2, 1)
    assert new.config.in_channels == 4 and new.config.out_channels == 8
    for many, single in zip(theirs, ours, strict=True):
        assert (three.decode(many).mean(1, keepdim=True) - one.decode(single)).abs().max() <= 1e-5


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_channels_that_show_the_same_give_what_one_gives(channels):
    one, many, unit = autoencoder(channels=3), autoencoder(channels=3), images()
    adapt_vae(one, 1)
    adapt_vae(many, channels)
    with torch.no_grad():
        expected, made = KLCodec(one, 1), KLCodec(many, channels)
        torch.testing.assert_close(made.encode(unit.repeat(1, channels, 1, 1)), expected.encode(unit), atol=1e-5, rtol=1e-5)
        latents = expected.encode(unit)
        decoded = made.decode(latents)
        torch.testing.assert_close(decoded, expected.decode(latents).repeat(1, channels, 1, 1), atol=1e-5, rtol=1e-5)


def test_a_mask_channel_disturbs_nothing_and_can_learn():
    one, masked, unit = autoencoder(channels=3), autoencoder(channels=3), images()
    adapt_vae(one, 1)
    adapt_vae(masked, 2, label_channels=1)
    stacked = torch.cat([unit, images().sign()], 1)
    latents = KLCodec(masked, 2).encode(stacked)
    torch.testing.assert_close(latents, KLCodec(one, 1).encode(unit), atol=1e-5, rtol=1e-5)
    decoded = KLCodec(masked, 2).decode(latents)
    torch.testing.assert_close(decoded[:, :1], KLCodec(one, 1).decode(latents), atol=1e-5, rtol=1e-5)
    assert (decoded[:, 1] == -1).all()
    (decoded - stacked).square().mean().backward()
    assert masked.encoder.conv_in.weight.grad[:, 1].abs().max() > 0 and masked.decoder.conv_out.weight.grad[1].abs().max() > 0


def test_an_autoencoder_of_unlike_channels_takes_no_others():
    """Grey repeated into a mask's channel would come out as the mean of image and mask."""
    for channels in (2, 5):
        with pytest.raises(InputError, match="do not fit"):
            codec_of(autoencoder(channels=channels), 1)
        with pytest.raises(InputError, match=f"this one has {channels}"):
            adapt_vae(autoencoder(channels=channels), 1)


# What learns


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_at_nothing_and_are_merged_exactly(kind):
    vae, unit = autoencoder(kind), images()
    codec = codec_of(vae, 1)
    noise = torch.randn(3, 4, 8, 8, generator=seeded())
    before = training_pass(codec)(unit, noise)
    adapters = add_vae_lora(vae, 2, 4, decoder_only=False)
    torch.testing.assert_close(training_pass(codec)(unit, noise)[0], before[0])
    assert all("lora" in name for name, weight in vae.named_parameters() if weight.requires_grad) and len(last_layer(vae)) == 2
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=seeded())
    trained = training_pass(codec)(unit, noise)[1]
    merge_vae_lora(adapters)
    assert type(vae) in {AutoencoderKL, VQModel} and not any("lora" in name for name in vae.state_dict())
    torch.testing.assert_close(training_pass(codec)(unit, noise)[1], trained, atol=1e-4, rtol=1e-4)
    assert (trained - before[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_decoder_alone_learns(kind, rank):
    vae = autoencoder(kind)
    if rank:
        add_vae_lora(vae, rank, None, decoder_only=True)
    choose_decoder(vae)
    learning = {name.split(".")[0] for name, weight in vae.named_parameters() if weight.requires_grad}
    assert learning == {"decoder", "post_quant_conv"}


def test_slices_and_tiles():
    vae, unit = autoencoder(), images(side=64)
    vae.register_to_config(sample_size=32)
    with torch.no_grad():
        whole = vae.encode(unit).latent_dist.mean
        save_memory(vae, slicing=True, tiling=False)
        torch.testing.assert_close(vae.encode(unit).latent_dist.mean, whole, atol=1e-5, rtol=1e-4)
    assert vae.use_slicing
    save_memory(vae, slicing=False, tiling=True)
    assert vae.use_tiling
    with pytest.raises(InputError, match="VQModel can be neither sliced nor tiled"):
        save_memory(autoencoder("vq"), slicing=True, tiling=False)


# The codebook


def test_nearest_entries_pass_gradients_straight_through():
    vae = autoencoder("vq")
    codec, unit = codec_of(vae, 1), images()
    reconstruction, encoded, entries = training_pass(codec)(unit, torch.zeros(3, 4, 8, 8))
    torch.testing.assert_close(reconstruction, vae.decode(vae.encode(unit).latents).sample, atol=1e-5, rtol=1e-5)
    distances = torch.cdist(encoded.movedim(1, -1).flatten(0, -2), vae.quantize.embedding.weight)
    chosen = torch.cdist(encoded.movedim(1, -1).flatten(0, -2)[:, None], entries.movedim(1, -1).flatten(0, -2)[:, None])[:, 0, 0]
    torch.testing.assert_close(chosen, distances.min(1).values)
    reconstruction.square().mean().backward()
    assert vae.quant_conv.weight.grad.abs().max() > 0 and vae.quantize.embedding.weight.grad is None


def test_each_term_of_the_codebook_loss_moves_its_own_side():
    encoded, table = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = codebook_loss(encoded, nearest_entries(table, encoded), commitment=0.25)
    distance = (encoded - nearest_entries(table, encoded)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, 1.25 * distance)
    loss.sum().backward()
    places, entries = encoded.grad.clone(), table.grad.clone()
    torch.testing.assert_close(places.movedim(1, 0).flatten(1).sum(1), -0.25 * entries.sum(0))


def test_a_new_codebook_begins_where_latents_are():
    vae = autoencoder("vq")
    codec, unit = codec_of(vae, 1), images(count=32)
    lazy = codebook_perplexity(codec, unit)
    seed_codebook(codec, unit, seeded())
    assert codebook_perplexity(codec, unit) > max(100, 2 * lazy)
    places = codec.moments(unit).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(torch.cdist(vae.quantize.embedding.weight, places).min(1).values, torch.zeros(1024), atol=2e-3, rtol=0)


# Losses


def test_kl_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    ours = torch.distributions.Normal(mean, (log_variance / 2).exp())
    theirs = torch.distributions.kl_divergence(ours, torch.distributions.Normal(0, 1)).flatten(1).mean(1)
    torch.testing.assert_close(kl_divergence(mean, log_variance), theirs)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_perceptual_and_adversarial_losses_reach_the_decoders_last_layer(channels):
    """Each term alone has a gradient there; diffusers' own script computes the first under no_grad."""
    vae, unit = autoencoder(channels=channels), images(channels)
    for loss in (perceptual_distance(None), lambda again, _: deception_loss(PatchDiscriminator(channels), again)):
        vae.zero_grad()
        again = training_pass(codec_of(vae, channels))(unit, torch.zeros(3, 4, 8, 8))[0]
        terms = loss(again, unit)
        assert terms.shape == (3,)
        terms.mean().backward()
        assert vae.decoder.conv_out.weight.grad.abs().max() > 0


def test_the_perceptual_distance_sees_structure():
    """Zero for the same image, larger for a blur than for a faint change of brightness of the same squared error, and per image."""
    distance = PerceptualDistance(RandomFeatures())
    unit = torch.nn.functional.avg_pool2d(images(2, side=66), 3, 1)
    blurred = torch.nn.functional.avg_pool2d(unit, 5, 1, 2)
    brighter = unit + (blurred - unit).square().mean().sqrt()
    assert distance(unit, unit).abs().max() < 1e-6
    assert (distance(blurred, unit) > 2 * distance(brighter, unit)).all()
    one = distance(blurred[1:2], unit[1:2])
    torch.testing.assert_close(distance(blurred, unit)[1:2], one)
    assert not list(distance.parameters()) and torch.equal(RandomFeatures().weight1, RandomFeatures().weight1)


def test_a_vision_model_of_transformers_serves_as_features(tmp_path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}')
    distance = perceptual_distance(str(tmp_path / "vit"))
    assert isinstance(distance.features, PretrainedFeatures) and distance.features.mean.flatten().tolist() == pytest.approx([0.4] * 3)
    again, unit = images(2, side=64).requires_grad_(), images(2, side=64).flip(-1)
    distance(again, unit).sum().backward()
    assert again.grad.abs().max() > 0 and not any(weight.requires_grad for weight in distance.parameters())
    with pytest.raises(InputError, match="--perceptual_model"):
        perceptual_distance(str(tmp_path))


def test_a_vision_model_of_large_images_looks_at_smaller_ones(tmp_path):
    """Each channel is a plane, so the 518 px of DINOv2 would be more than memory holds."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=448, patch_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    distance = perceptual_distance(str(tmp_path / "vit"))
    assert [tuple(state.shape) for state in distance.features(images(side=64))] == [(3, 32, 1 + 7 * 7)] * 2
    assert distance(images(side=64), images(side=64)).tolist() == pytest.approx([0] * 3)


def test_the_discriminator_learns_from_its_loss_and_not_from_deception():
    net, unit, again = PatchDiscriminator(1), images(), images().flip(0).requires_grad_()
    deception_loss(net, again).sum().backward()
    assert all(weight.grad is None for weight in net.parameters()) and again.grad.abs().max() > 0
    again.grad = None
    loss = discriminator_loss(net, unit, again)
    loss.sum().backward()
    assert loss.shape == (3,) and again.grad is None and all(weight.grad is not None for weight in net.parameters())


def test_hinge_loss_by_hand():
    judge = lambda x: x.mean((1, 2, 3), keepdim=True)  # noqa: E731
    real, false = torch.full((1, 1, 4, 4), 0.4), torch.full((1, 1, 4, 4), -0.3)
    assert discriminator_loss(judge, real, false).item() == pytest.approx(0.5 * (0.6 + 0.7))


def test_the_adaptive_weight_makes_both_gradients_equally_long():
    layer = torch.randn(4, 4, requires_grad=True)
    output = torch.randn(5, 4) @ layer
    error, deception = output.square().mean(), (3 * output).sin().sum()
    weight = adaptive_weight(error, deception, [layer])
    norms = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (error, weight * deception)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=0)
    assert not weight.requires_grad


def test_weights_of_distances_add_up():
    unit, again = images(), images().flip(-1)
    parts = [(1.0, reconstruction_error), (0.5, perceptual_distance(None))]
    total = WeightedSum(parts)
    torch.testing.assert_close(total(again, unit), sum(weight * distance(again, unit) for weight, distance in parts))
    assert len(list(total.buffers())) == 4


def test_huber_is_quadratic_then_linear():
    unit = torch.zeros(2, 1, 2, 2)
    again = torch.stack([torch.full((1, 2, 2), 0.5), torch.full((1, 2, 2), 3.0)])
    np.testing.assert_allclose(reconstruction_error(again, unit, "huber"), [0.125, 2.5])
    assert math.isclose(reconstruction_error(again, unit, "l2")[1].item(), 9.0)
