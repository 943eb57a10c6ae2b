"""MONAI's networks and what they become have equal outputs, whatever the weights."""

import json

import pytest
import torch

from medsd.errors import InputError
from medsd.models.convert import load_monai_bundle, load_single_file
from medsd.models.monai import convert_monai, convert_monai_schedule

pytest.importorskip("monai")
pytest.importorskip("einops")

from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

SMALL_GROUPS = {"norm_num_groups": 8}


def scrambled(network):
    """No weight is zero or one, as a fresh network's zero convolutions and norms are; in double precision, where rounding is no excuse."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return network.eval().double()


def converted(weights, definition):
    """In double precision as well; the weights themselves went through float32, which they started from."""
    return convert_monai(weights, definition).double()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def assert_equal(got, expected):
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


AUTOENCODERS = {
    "plain": {"channels": (32, 64), "num_res_blocks": 1, "attention_levels": (False, False)},
    "attention levels": {"channels": (32, 64, 64), "num_res_blocks": 2, "attention_levels": (False, True, True)},
    "levels of different depth": {"channels": (32, 64, 64), "num_res_blocks": (1, 3, 2), "attention_levels": (True, False, True)},
    "no middle": {"channels": (32, 32), "attention_levels": (False, True), "middle": (False, False)},
    "one middle": {"channels": (32, 64), "attention_levels": (False, False), "middle": (True, False)},
    "the other middle": {"channels": (32, 64), "attention_levels": (False, True), "middle": (False, True)},
    "small groups": {"channels": (8, 16), "attention_levels": (False, True), **SMALL_GROUPS},
    "inferred groups": {"channels": (24, 40), "attention_levels": (False, True), "norm_num_groups": 8},
    "no output layer": {"channels": (32, 64), "attention_levels": (False, True), "include_fc": False},
    "combined linear": {"channels": (32, 64), "attention_levels": (False, True), "use_combined_linear": True},
    "one level": {"channels": (32,), "attention_levels": (True,), "num_res_blocks": 2},
}


def autoencoder(num_res_blocks=1, middle=(True, True), **keywords):
    return scrambled(
        AutoencoderKL(
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            latent_channels=3,
            num_res_blocks=num_res_blocks,
            with_encoder_nonlocal_attn=middle[0],
            with_decoder_nonlocal_attn=middle[1],
            **keywords,
        )
    )


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_autoencoder(name):
    keywords = AUTOENCODERS[name]
    reference = autoencoder(**keywords)
    made = converted(reference.state_dict(), None if name == "inferred groups" else keywords)
    images, latents = noise(2, 1, 16, 16), noise(2, 3, 8, 8)
    mean, deviation = reference.encode(images)
    posterior = made.encode(images).latent_dist
    assert_equal(posterior.mean, mean)
    assert_equal(posterior.std, deviation)
    assert_equal(made.decode(latents).sample, reference.decode(latents))
    assert made.config.scaling_factor == 1.0 and made.config.block_out_channels == tuple(2 * width for width in keywords["channels"])


UNETS = {
    "plain": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1},
    "defaults": {},
    "levels of different depth": {"channels": (32, 64, 96), "attention_levels": (True, False, True), "num_res_blocks": (1, 3, 2)},
    "classes": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 2, "num_class_embeds": 5},
    "no attention but in the middle": {"channels": (32, 32), "attention_levels": (False, False), "num_res_blocks": 1},
    "small groups, other eps": {
        "channels": (16, 32),
        "attention_levels": (True, True),
        "num_res_blocks": 1,
        "norm_eps": 1e-3,
        **SMALL_GROUPS,
    },
    "wide heads": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": (0, 64)},
    "no output layer": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "include_fc": False},
    "combined linear": {"channels": (32, 64), "attention_levels": (True, True), "num_res_blocks": 1, "use_combined_linear": True},
}
CONDITIONAL = {
    "plain": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1},
    "levels of different depth": {"channels": (32, 64, 96), "attention_levels": (True, False, True), "num_res_blocks": (2, 1, 3)},
    "head widths by level": {"channels": (32, 64), "attention_levels": (True, True), "num_res_blocks": 1, "num_head_channels": (4, 32)},
    "deep transformers": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "transformer_num_layers": 2},
    "classes as well": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "num_class_embeds": 3},
    "no output layer": {"channels": (32, 64), "attention_levels": (False, True), "num_res_blocks": 1, "include_fc": False},
    "combined linear": {"channels": (32, 64), "attention_levels": (True, False), "num_res_blocks": 1, "use_combined_linear": True},
}


def unet(**keywords):
    return scrambled(DiffusionModelUNet(spatial_dims=2, in_channels=3, out_channels=2, **keywords))


@torch.no_grad()
def assert_same_unet(reference, made, keywords, context=None):
    latents, timesteps = noise(2, 3, 16, 16), torch.tensor([7, 960])
    labels = torch.tensor([2, 0]) if "num_class_embeds" in keywords else None
    expected = reference(latents, timesteps, context=context, class_labels=labels)
    inputs = {} if context is None else {"encoder_hidden_states": context}
    assert_equal(made(latents, timesteps, class_labels=labels, **inputs).sample, expected)
    assert made.config.num_class_embeds == keywords.get("num_class_embeds")


@pytest.mark.parametrize("name", UNETS)
def test_unet_without_conditioning(name):
    reference = unet(**UNETS[name])
    made = converted(reference.state_dict(), UNETS[name])
    assert type(made).__name__ == "UNet2DModel"
    assert_same_unet(reference, made, UNETS[name])


@pytest.mark.parametrize("name", CONDITIONAL)
def test_unet_with_conditioning(name):
    reference = unet(**CONDITIONAL[name], with_conditioning=True, cross_attention_dim=24)
    made = converted(reference.state_dict(), CONDITIONAL[name])
    assert type(made).__name__ == "UNet2DConditionModel" and made.config.cross_attention_dim == 24
    assert_same_unet(reference, made, CONDITIONAL[name], context=noise(2, 5, 24))


def old_names(weights, pairs):
    """GenerativeModels' names, undoing what MONAI's own `load_old_state_dict` does."""
    for new, old in pairs:
        weights = {key.replace(new, old): value for key, value in weights.items()}
    return weights


@torch.no_grad()
def test_names_of_generative_models():
    pairs = [(".attn.to_", ".to_"), (".attn.out_proj.", ".proj_attn."), (".out_proj.", ".to_out.0."), ("postconv", "conv")]
    keywords = UNETS["plain"]
    for conditioning in ({}, {"with_conditioning": True, "cross_attention_dim": 24}):
        reference = unet(**keywords, **conditioning)
        old = old_names(reference.state_dict(), pairs)
        again = unet(**keywords, **conditioning)
        again.load_old_state_dict(dict(old))
        context = noise(2, 5, 24) if conditioning else None
        assert_same_unet(again, converted(old, None), keywords, context)
    reference = autoencoder(**AUTOENCODERS["attention levels"])
    made = converted(old_names(reference.state_dict(), pairs), None)
    assert_equal(made.decode(noise(2, 3, 4, 4)).sample, reference.decode(noise(2, 3, 4, 4)))


@pytest.mark.parametrize(
    "network, definition, words",
    [
        (
            lambda: AutoencoderKL(3, channels=(8, 8), attention_levels=(False, False), num_res_blocks=1, **SMALL_GROUPS),
            {},
            "three-dimensional",
        ),
        (lambda: DiffusionModelUNet(3, 1, 1, 1, (8, 8), (False, False), 8), {}, "three-dimensional"),
        (lambda: DiffusionModelUNet(2, 1, 1, 1, (32, 32), (False, True), resblock_updown=True), {}, "resblock_updown"),
        (lambda: autoencoder(**AUTOENCODERS["plain"], use_convtranspose=True), {}, "use_convtranspose"),
        (lambda: autoencoder(**AUTOENCODERS["plain"]), {"norm_eps": 1e-3}, "norm_eps"),
        (lambda: unet(**UNETS["plain"], with_conditioning=True, cross_attention_dim=8), {"norm_eps": 1e-5}, "norm_eps"),
        (lambda: unet(**UNETS["combined linear"]), {"num_head_channels": (4, 8)}, "one width for all"),
        (lambda: unet(**UNETS["plain"]), {"num_head_channels": 24}, "num_head_channels"),
        (lambda: unet(**UNETS["plain"]), {"norm_num_groups": 48}, "no such model"),
    ],
)
def test_what_cannot_be_represented_is_refused(network, definition, words):
    with pytest.raises(InputError, match=words):
        convert_monai(network().state_dict(), definition)


def test_missing_and_unknown_weights_are_named():
    weights = unet(**UNETS["plain"]).state_dict()
    missing = {key: value for key, value in weights.items() if key != "up_blocks.0.resnets.1.norm2.bias"}
    with pytest.raises(InputError, match=r"missing up_blocks.0.resnets.1.norm2.bias"):
        convert_monai(missing, None)
    with pytest.raises(InputError, match="something.weight"):
        convert_monai(weights | {"something.weight": torch.ones(1)}, None)


def test_schedule():
    made = convert_monai_schedule({"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0195})
    from monai.networks.schedulers import DDPMScheduler

    expected = DDPMScheduler(1000, "scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
    torch.testing.assert_close(made.alphas_cumprod, expected.alphas_cumprod)
    with pytest.raises(InputError, match="sigmoid_beta"):
        convert_monai_schedule({"schedule": "sigmoid_beta"})


@pytest.fixture
def bundle(tmp_path):
    """A bundle whose definitions refer to other entries, as MONAI's do, and whose weights lie in a training program's file."""
    keywords = {"channels": (16, 32), "attention_levels": (False, True), "num_res_blocks": 1, "num_head_channels": 16, **SMALL_GROUPS}
    networks = autoencoder(**AUTOENCODERS["small groups"]), unet(**keywords)
    (tmp_path / "models").mkdir()
    torch.save({"epoch": 3, "autoencoder_state_dict": networks[0].state_dict()}, tmp_path / "models" / "autoencoder.pt")
    wrapped = {f"module.{key}": value for key, value in networks[1].state_dict().items()}
    torch.save({"unet_state_dict": wrapped, "scale_factor": torch.tensor(0.5)}, tmp_path / "models" / "model.pt")
    (tmp_path / "configs").mkdir()
    config = {
        "groups": 8,
        "net": {"autoencoder": {"_target_": "AutoencoderKL", "spatial_dims": 2, "norm_num_groups": "@groups"}},
        "unet": {"_target_": "monai.networks.nets.DiffusionModelUNet", "norm_num_groups": "@net#autoencoder#norm_num_groups"},
        "noise": {"_target_": "monai.networks.schedulers.DDIMScheduler", "schedule": "scaled_linear_beta", "beta_end": 0.0195},
    }
    config["unet"]["num_head_channels"] = "$[16, 16]"
    (tmp_path / "configs" / "inference.json").write_text(json.dumps(config))
    return tmp_path, networks, keywords


@torch.no_grad()
def test_bundle(bundle):
    folder, (reference, reference_unet), keywords = bundle
    parts = load_monai_bundle(folder)
    parts.vae.double(), parts.unet.double()
    assert_equal(parts.vae.decode(noise(2, 3, 4, 4)).sample, reference.decode(noise(2, 3, 4, 4)))
    assert_same_unet(reference_unet, parts.unet, keywords)
    assert parts.vae.config.scaling_factor == 0.5
    assert parts.scheduler.config.beta_schedule == "scaled_linear" and parts.scheduler.config.beta_end == 0.0195
    parts.unet.save_pretrained(folder / "saved")
    assert_same_unet(reference_unet, type(parts.unet).from_pretrained(folder / "saved").double(), keywords)


def test_bundle_problems_are_named(bundle, tmp_path):
    folder, (reference, _), _ = bundle
    (folder / "configs" / "train.json").write_text(json.dumps({"net": {"_target_": "AutoencoderKL", "norm_num_groups": 4}}))
    with pytest.raises(InputError, match="in different ways"):
        load_monai_bundle(folder)
    (folder / "configs" / "train.json").write_text(json.dumps({"net": {"_target_": "AutoencoderKL", "norm_num_groups": "$len([1])"}}))
    with pytest.raises(InputError, match="norm_num_groups is"):
        load_monai_bundle(folder)
    (folder / "configs" / "train.json").write_text(json.dumps({"norm_num_groups": "@norm_num_groups", "_target_": "AutoencoderKL"}))
    with pytest.raises(InputError, match="norm_num_groups is"):
        load_monai_bundle(folder)
    torch.save(reference.state_dict(), folder / "models" / "second.pt")
    with pytest.raises(InputError, match="same kind"):
        load_monai_bundle(folder)
    with pytest.raises(InputError, match="no weights"):
        load_monai_bundle(folder / "configs")


@torch.no_grad()
def test_one_file_of_monai(tmp_path):
    reference = autoencoder(**AUTOENCODERS["plain"])
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "vae.pt")
    made = load_single_file(tmp_path / "vae.pt").vae.double()
    assert_equal(made.decode(noise(2, 3, 4, 4)).sample, reference.decode(noise(2, 3, 4, 4)))
