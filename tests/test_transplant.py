"""An unconditional model becomes a conditional one without a change of what it predicts, and can learn from there."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from medsd.errors import InputError
from medsd.models.conditioning import adopt_words, build_text_encoder, build_tokenizer, encode, tokenize
from medsd.models.presets import PRESETS
from medsd.models.transplant import check_exact, is_unconditional, load_unconditional, transplant

DIM = 12
TWO = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
PLAIN = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
THREE = {
    "block_out_channels": (8, 16, 24),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
SHAPES = {
    "attention at the coarsest level": {},
    "attention in the middle only": PLAIN,
    "attention at every level": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    "attention going down only": {"up_block_types": ("UpBlock2D",) * 2},
    "attention going up only": {"down_block_types": ("DownBlock2D",) * 2},
    "no attention in the middle": {"add_attention": False},
    "no attention at all": PLAIN | {"add_attention": False},
    "one level": {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("AttnUpBlock2D",)},
    "one head": {"attention_head_dim": None},
    "one head at every level": {
        "attention_head_dim": None,
        "block_out_channels": (16, 16),
        "down_block_types": ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2,
    },
    "three levels": THREE,
    "three levels, two layers, colour": THREE | {"layers_per_block": 2, "in_channels": 3, "out_channels": 3, "attention_head_dim": None},
    "three layers": {"layers_per_block": 3},
    "learned variance": {"in_channels": 3, "out_channels": 6},
    "as DDPM's own": {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-3, "act_fn": "swish"},
    "as in a U-Net of [0, 1]": {"center_input_sample": True, "time_embedding_dim": 24, "norm_num_groups": 2, "dropout": 0.5},
    "resnets that halve": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    },
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "scale and shift without attention": {"resnet_time_scale_shift": "scale_shift", "add_attention": False},
}
REFUSED = {
    "time_embedding_type": {"time_embedding_type": "fourier"},
    "class_embed_type": {"class_embed_type": "identity"},
    "num_class_embeds": {"num_class_embeds": 3},
    "act_fn": {"act_fn": "gelu"},
    "mid_block_type": {"mid_block_type": None},
    "mid_block_scale_factor": {"mid_block_scale_factor": 1.5},
    "downsample_type": {"downsample_type": "resnet"},
    "upsample_type": {"upsample_type": "resnet"},
    "down_block_types": {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")},
    "up_block_types": {"up_block_types": ("SkipUpBlock2D", "UpBlock2D")},
    "attention_head_dim": {"attention_head_dim": None, "up_block_types": ("UpBlock2D", "AttnUpBlock2D")},
    "attn_norm_num_groups": {"attn_norm_num_groups": 2},
    "attn_norm_num_groups None": {"resnet_time_scale_shift": "scale_shift"},
}


def random_source(**changes) -> UNet2DModel:
    """A UNet whose every weight matters: none is zero, and signals keep about their size."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TWO | changes).eval()
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3 * noise + ("norm" in name and "weight" in name))
    return unet


def inputs(unet, size=4):
    """Noised images `(B, C, 8, 8)`, timesteps `(B,)` and a condition `(B, 5, DIM)`."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, unet.config.in_channels, 8, 8, generator=generator)
    return images, torch.arange(size) * 300, torch.randn(size, 5, DIM, generator=generator)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_transplant_predicts_what_its_source_does(changes, tmp_path):
    """To the last digits of double precision, and in single precision up to the order in which sums are taken."""
    source = random_source(**changes)
    unet = transplant(source, DIM)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, use_safetensors=True)
    assert again.config.cross_attention_dim == DIM
    assert all(again.config[name] == source.config[name] for name in ("sample_size", "in_channels", "out_channels"))
    images, timesteps, condition = inputs(source)
    with torch.no_grad():
        single = unet(images, timesteps, condition).sample
        assert torch.equal(again(images, timesteps, condition).sample, single)
        assert (single - source(images, timesteps).sample).abs().max() < 1e-6 * single.abs().max()
        images, condition = images.double(), condition.double()
        expected = source.double()(images, timesteps).sample
        assert 0.1 < expected.std() < 10
        for one in (condition, 100 * condition, 0 * condition, condition[:, :1]):
            torch.testing.assert_close(again.double()(images, timesteps, one).sample, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weight", ["mid_block.resnets.0.conv2", "mid_block.attentions.0.to_v", "mid_block.resnets.1.conv1"])
def test_the_source_needs_each_part_of_its_middle(weight):
    """So that the test above could see one go missing."""
    source = random_source()
    images, timesteps, _ = inputs(source)
    with torch.no_grad():
        before = source(images, timesteps).sample
        source.get_submodule(weight).weight.mul_(-1)
        assert (source(images, timesteps).sample - before).abs().max() > 1e-2


def test_timesteps_may_be_one_number():
    source = random_source()
    images, _, condition = inputs(source)
    with torch.no_grad():
        assert torch.allclose(transplant(source, DIM)(images, 7, condition).sample, source(images, 7).sample, rtol=0, atol=1e-6)


def test_transplant_leaves_its_source_alone():
    source = random_source()
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    unet = transplant(source.train(), DIM)
    assert unet.training
    with torch.no_grad():
        for weight in unet.parameters():
            weight.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())


@pytest.mark.parametrize(
    "head_dim, down, up",
    [
        (8, [True, False, False], [True, False, True]),
        (32, [True, False, False], [False, False, True]),
        (None, [True, False, False], [False, False, True]),
    ],
)
def test_prompts_are_heard_where_the_source_has_no_attention_and_heads_are_wide_enough(head_dim, down, up):
    unet = transplant(random_source(**THREE | {"block_out_channels": (32, 64, 64), "attention_head_dim": head_dim}), DIM)
    assert ["CrossAttn" in kind for kind in unet.config.down_block_types] == down
    assert ["CrossAttn" in kind for kind in unet.config.up_block_types] == up
    assert unet.mid_block.attentions[0].add_k_proj.in_features == DIM


@pytest.mark.parametrize("changes", [{}, PLAIN | {"add_attention": False}])
def test_transplant_learns_two_conditions(changes):
    unet = transplant(random_source(**changes), DIM)
    images, timesteps, _ = inputs(unet)
    conditions = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(2)).requires_grad_()
    target = torch.cat([images[:2] + 1, images[2:] - 1])
    optimizer = torch.optim.Adam([*unet.parameters(), conditions], 3e-3)
    losses = []
    for _ in range(40):
        prediction = unet(images, timesteps, conditions.repeat_interleave(2, 0)).sample
        losses.append((prediction - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        if len(losses) == 1:
            assert unet.mid_block.attentions[0].to_out[0].weight.grad.abs().max() > 0
        optimizer.step()
    assert conditions.grad.abs().max() > 0
    with torch.no_grad():
        one, other = (unet(images, timesteps, condition.expand(4, -1, -1)).sample for condition in conditions)
    assert losses[-1] < losses[0] / 2
    assert (one - other).mean() > 0.01


def test_layers_that_pass_through_are_not_dead():
    """The attention that the source has not, and the extra layer going up, get gradients where they are silenced."""
    unet = transplant(random_source(down_block_types=("DownBlock2D",) * 2), DIM)
    images, timesteps, condition = inputs(unet)
    unet(images, timesteps, condition).sample.square().mean().backward()
    passing = unet.up_blocks[0]
    for layer in (unet.down_blocks[1].attentions[0].to_out[0], passing.attentions[0].to_out[0], passing.resnets[0].conv2):
        assert not layer.weight.any() and layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name, changes", REFUSED.items())
def test_what_cannot_be_exact_is_refused(name, changes):
    with pytest.raises(InputError, match=name.split()[0]):
        check_exact(UNet2DModel(**TWO | changes).config)


# Folders


def pipeline(kind, **parts):
    return kind(unet=random_source(), scheduler=DDPMScheduler(num_train_timesteps=50), **parts)


def vqvae():
    return VQModel(block_out_channels=(8,), norm_num_groups=4)


def test_ddpm_and_ddim_pipelines_load(tmp_path):
    for kind, scheduler in ((DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)):
        pipeline(kind).save_pretrained(tmp_path / kind.__name__)
        assert is_unconditional(str(tmp_path / kind.__name__))
        unet, vae, loaded = load_unconditional(str(tmp_path / kind.__name__))
        assert vae is None and isinstance(loaded, scheduler) and loaded.config.num_train_timesteps == 50
        assert all(torch.equal(weight, other) for weight, other in zip(unet.parameters(), random_source().parameters(), strict=True))


def test_latent_pipelines_load(tmp_path):
    pipeline(LDMPipeline, vqvae=vqvae()).save_pretrained(tmp_path / "vq")
    pipeline(LDMPipeline, vqvae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)).save_pretrained(tmp_path / "kl")
    for folder, kind in (("vq", VQModel), ("kl", AutoencoderKL)):
        assert is_unconditional(str(tmp_path / folder))
        unet, vae, scheduler = load_unconditional(str(tmp_path / folder))
        assert isinstance(unet, UNet2DModel) and isinstance(vae, kind) and isinstance(scheduler, DDPMScheduler)


def test_bare_unet_loads(tmp_path):
    random_source().save_pretrained(tmp_path)
    assert is_unconditional(str(tmp_path))
    unet, vae, scheduler = load_unconditional(str(tmp_path))
    assert isinstance(unet, UNet2DModel) and vae is None and scheduler is None


def test_weights_that_are_not_safetensors_are_refused(tmp_path):
    random_source().save_pretrained(tmp_path / "bare", safe_serialization=False)
    pipeline(DDPMPipeline).save_pretrained(tmp_path / "pipeline", safe_serialization=False)
    for folder in ("bare", "pipeline"):
        with pytest.raises(InputError, match="safetensors.*convert"):
            load_unconditional(str(tmp_path / folder))


def test_other_folders_are_refused(tmp_path):
    transplant(random_source(), DIM).save_pretrained(tmp_path / "conditional")
    (tmp_path / "other").mkdir()
    for record, found in (
        ({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}, "StableDiffusionPipeline"),
        ({"_class_name": "ConsistencyModelPipeline", "unet": ["diffusers", "UNet2DModel"]}, "ConsistencyModelPipeline"),
    ):
        (tmp_path / "other" / "model_index.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match=found):
            load_unconditional(str(tmp_path / "other"))
    with pytest.raises(InputError, match="UNet2DConditionModel"):
        load_unconditional(str(tmp_path / "conditional"))
    with pytest.raises(InputError, match="neither"):
        load_unconditional(str(tmp_path / "nothing"))
    assert not is_unconditional(str(tmp_path / "conditional"))
    assert not is_unconditional(str(tmp_path / "nothing"))


def test_damaged_index_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        is_unconditional(str(tmp_path))


# Words

PROMPTS = ["benign tissue", "malignant", "a long and malignant story of tissue"]


def random_encoder(tokenizer):
    torch.manual_seed(0)
    text_encoder = build_text_encoder(PRESETS["tiny"], tokenizer).eval()
    with torch.no_grad():
        for weight in text_encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return text_encoder


def read(text_encoder, tokenizer, prompts):
    return encode(text_encoder, tokenize(tokenizer, prompts))


def assert_learns(text_encoder, tokenizer):
    """One step of plain gradient descent towards two targets tells two prompts apart."""
    targets = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(text_encoder.parameters(), 0.1)
    (read(text_encoder, tokenizer, ["benign", "malignant"]) - targets).square().sum().backward()
    optimizer.step()
    one, other = read(text_encoder, tokenizer, ["benign", "malignant"])
    assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def empty(text_encoder, tokenizer):
    return read(text_encoder, tokenizer, [""] * len(PROMPTS))


@pytest.mark.parametrize("old_words, new_words", [([], PROMPTS), ([*PROMPTS, "and many other words"], PROMPTS)])
def test_adopted_words_read_as_the_empty_prompt(old_words, new_words, tmp_path):
    old, new = build_tokenizer(old_words, 16), build_tokenizer(new_words, 24)
    assert old.eos_token_id != new.eos_token_id
    text_encoder = random_encoder(old)
    expected = empty(text_encoder, old)
    adopt_words(text_encoder, old, new)
    assert new.model_max_length == 16
    assert torch.equal(empty(text_encoder, new), expected)
    assert torch.equal(read(text_encoder, new, PROMPTS), expected)
    text_encoder.save_pretrained(tmp_path)
    again = type(text_encoder).from_pretrained(tmp_path)
    ids = (again.config.vocab_size, again.config.bos_token_id, again.config.eos_token_id, again.config.pad_token_id)
    assert ids == (len(new), new.bos_token_id, new.eos_token_id, new.pad_token_id)
    assert torch.equal(read(again, new, PROMPTS), expected)
    assert_learns(text_encoder, new)


def test_pooled_output_of_the_empty_prompt_survives_an_adoption():
    old, new = build_tokenizer([], 16), build_tokenizer(PROMPTS, 16)
    text_encoder = random_encoder(old)
    expected = text_encoder(tokenize(old, [""])).pooler_output
    adopt_words(text_encoder, old, new)
    assert torch.equal(text_encoder(tokenize(new, [""])).pooler_output, expected)


def test_tokenizers_that_pad_with_another_token_are_refused():
    tokenizer, other = build_tokenizer(PROMPTS, 16), build_tokenizer(PROMPTS, 16)
    text_encoder = random_encoder(tokenizer)
    other.pad_token = "!"
    for act in (
        lambda: adopt_words(text_encoder, other, tokenizer),
        lambda: adopt_words(text_encoder, tokenizer, other),
    ):
        with pytest.raises(InputError, match="pads with !"):
            act()
