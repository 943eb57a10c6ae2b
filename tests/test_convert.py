"""Foreign checkpoints: what they become has the outputs of CompVis' networks; what does not fit is named."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from medsd.errors import InputError
from medsd.models.clip_vocabulary import clip_tokenizer
from medsd.models.convert import is_single_file, load_single_file, read_weights
from tests.compvis import VOCABULARY, WIDTHS, Net, decode, encode, open_clip, quantise, unet


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


def same(got, expected):
    assert expected.std() > 1e-2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def alphas(start, end):
    return (1 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()


def write(folder, net, settings=None, name="model.ckpt", **more):
    path = folder / name
    weights = {key: value.clone() for key, value in (net.weights | more).items()}
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save({"state_dict": weights, "global_step": 1}, path)
    if settings is not None:
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": settings}}))
    return path


LATENTS, TIMES, IMAGES = noise(2, 4, 8, 8), torch.tensor([3, 901]), noise(1, 3, 16, 16)
IDS = torch.tensor(clip_tokenizer()(["a photo of a cat"], padding="max_length").input_ids)


@torch.no_grad()
def test_stable_diffusion_1(tmp_path):
    net, context = Net(), noise(2, 7, 64)
    expected = unet(net, LATENTS, TIMES, context, layers=2, attends=(True, False))
    stage = net.under("first_stage_model.")
    moments, image = encode(stage, IMAGES, 8), decode(stage, LATENTS, 3)
    config = CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
    encoder = CLIPTextModel(config)
    for key, value in encoder.state_dict().items():
        net.weights[f"cond_stage_model.transformer.text_model.{key}"] = value
    net.weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    parts = load_single_file(write(tmp_path, net, alphas_cumprod=alphas(0.00085, 0.012)))
    same(parts.unet.double()(LATENTS, TIMES, context).sample, expected)
    same(parts.vae.double().encode(IMAGES).latent_dist.parameters, moments)
    same(parts.vae.decode(LATENTS).sample, image)
    same(parts.text_encoder(IDS)[0], encoder.eval()(IDS)[0])
    config = parts.unet.config
    assert (config.block_out_channels, config.layers_per_block, config.cross_attention_dim, config.attention_head_dim) == (WIDTHS, 2, 64, 8)
    assert config.down_block_types == ("CrossAttnDownBlock2D", "DownBlock2D") and not config.use_linear_projection
    assert parts.vae.config.scaling_factor == 0.18215 and parts.vae.config.layers_per_block == 2 and parts.class_embedding is None
    schedule = parts.scheduler.config
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (schedule.steps_offset, schedule.clip_sample, schedule.set_alpha_to_one, schedule.prediction_type) == (
        1,
        False,
        False,
        "epsilon",
    )
    assert parts.tokenizer.pad_token_id == 49407
    parts.unet.save_pretrained(tmp_path / "saved")
    same(type(parts.unet).from_pretrained(tmp_path / "saved").double()(LATENTS, TIMES, context).sample, expected)


@torch.no_grad()
def test_stable_diffusion_2(tmp_path):
    net, context = Net(), noise(2, 7, 64)
    expected = unet(net, LATENTS, TIMES, context, attends=(True, True), heads=lambda width: width // 64, linear_projection=True)
    tokens = open_clip(net, IDS)
    settings = {"parameterization": "v", "linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, "image_size": 96}
    parts = load_single_file(write(tmp_path, net, settings, "sd2.safetensors"))
    same(parts.unet.double()(LATENTS, TIMES, context).sample, expected)
    same(parts.text_encoder.double()(IDS)[0], tokens)
    assert (
        parts.unet.config.attention_head_dim == (1, 2) and parts.unet.config.use_linear_projection and parts.unet.config.sample_size == 96
    )
    assert parts.scheduler.config.prediction_type == "v_prediction" and parts.scheduler.config.beta_schedule == "scaled_linear"
    assert parts.tokenizer.pad_token_id == 0 and parts.vae is None
    assert parts.text_encoder.config.num_hidden_layers == 2 and parts.text_encoder.config.hidden_act == "gelu"


@torch.no_grad()
def test_class_conditional_with_vector_quantisation(tmp_path):
    net, latents = Net(), noise(2, 3, 8, 8)
    table = net.get("cond_stage_model.embedding.weight", 11, 24)
    expected = unet(net, latents, TIMES, table[[4, 10], None], heads=1)
    stage = net.under("first_stage_model.")
    encoded, image = encode(stage, IMAGES, 6, embedding=3), decode(stage, quantise(stage, latents), 3, latent_channels=6)
    parts = load_single_file(write(tmp_path, net, betas=torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2))
    condition = parts.class_embedding[[4, 10], None].double()
    same(parts.unet.double()(latents, TIMES, condition).sample, expected)
    same(parts.vae.double().encode(IMAGES).latents, encoded)
    same(parts.vae.decode(latents).sample, image)
    assert type(parts.vae).__name__ == "VQModel" and parts.vae.config.scaling_factor == 1.0 and parts.text_encoder is None
    assert parts.class_embedding.shape == (11, 24) and parts.unet.config.attention_head_dim == 1
    assert (parts.scheduler.config.beta_start, parts.scheduler.config.beta_end) == (0.0015, 0.0195)


@pytest.mark.parametrize("options", [{}, {"num_head_channels": 16}, {"num_heads": 1}, {"num_heads": 1, "use_new_attention_order": True}])
@torch.no_grad()
def test_unconditional(tmp_path, options):
    def heads(width):
        return 1 if "num_heads" in options else width // options.get("num_head_channels", 32)

    net, labels = Net(), torch.tensor([0, 4])
    new_order = "use_new_attention_order" in options
    expected = unet(net, LATENTS, TIMES, labels=labels, attends=(True, True), layers=2, heads=heads, new_order=new_order)
    parts = load_single_file(write(tmp_path, net, {"unet_config": {"params": options}} if options else None))
    same(parts.unet.double()(LATENTS, TIMES, class_labels=labels).sample, expected)
    assert type(parts.unet).__name__ == "UNet2DModel" and parts.unet.config.num_class_embeds == 5


@torch.no_grad()
def test_autoencoder_alone_with_attention_in_a_level(tmp_path):
    net, widths, attends = Net(), (32, 64, 64), (False, True, False)
    moments, image = encode(net, IMAGES, 8, widths, attends), decode(net, LATENTS, 3, widths, attends)
    more = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    for name in ("vae.pt", "vae.safetensors"):
        vae = load_single_file(write(tmp_path, net, name=name, **more)).vae.double()
        same(vae.encode(IMAGES).latent_dist.parameters, moments)
        same(vae.decode(LATENTS).sample, image)
        assert vae.config.down_block_types == ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D")


@torch.no_grad()
def test_averaged_weights_alone(tmp_path):
    for context in (noise(2, 7, 24), None):
        net = Net()
        expected = unet(net, LATENTS, TIMES, context, layers=5, heads=8 if context is not None else 2)
        flat = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": value for key, value in net.weights.items()}
        settings = {"unet_config": {"params": {"num_heads": 8 if context is not None else 2}}}
        path = write(tmp_path, Net(weights=flat), settings, **{"model_ema.num_updates": torch.tensor(3)})
        made = load_single_file(path).unet.double()
        same((made(LATENTS, TIMES) if context is None else made(LATENTS, TIMES, context)).sample, expected)


@pytest.fixture(scope="module")
def sd1_unet():
    net = Net()
    with torch.no_grad():
        unet(net, LATENTS, TIMES, noise(2, 7, 64))
    return net


def test_yaml_wins(tmp_path, sd1_unet):
    options = {
        "unet_config": {"params": {"num_heads": 4}},
        "first_stage_config": {"params": {}},
        "linear_start": 0.001,
        "beta_schedule": "sqrt_linear",
    }
    parts = load_single_file(write(tmp_path, sd1_unet, options))
    assert parts.unet.config.attention_head_dim == 4
    schedule = parts.scheduler.config
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (0.001, 0.02, "linear")


def test_scale_of_the_latents(tmp_path):
    net = Net("first_stage_model.")
    with torch.no_grad():
        encode(net, IMAGES, 8), decode(net, LATENTS, 3)
    for settings, more, expected in [
        (None, {}, 0.18215),
        ({"scale_factor": 0.3}, {}, 0.3),
        ({"scale_factor": 0.3}, {"scale_factor": torch.tensor(0.5)}, 0.5),
        ({"first_stage_config": {"target": "x", "params": {}}}, {}, 1.0),
    ]:
        assert load_single_file(write(tmp_path, net, settings, **more)).vae.config.scaling_factor == expected


@pytest.mark.parametrize(
    "table, expected",
    [
        (torch.linspace(1e-4, 0.02, 500), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500}),
        (torch.linspace(1e-4, 0.02, 1000).half(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085}),
        (torch.linspace(0.1, 0.3, 100) ** 3, {"num_train_timesteps": 100}),
    ],
)
def test_noise_tables(tmp_path, sd1_unet, table, expected):
    scheduler = load_single_file(write(tmp_path, sd1_unet, betas=table)).scheduler
    for key, value in expected.items():
        assert scheduler.config[key] == value
    if table.dtype == torch.float32:
        torch.testing.assert_close(scheduler.betas, table, rtol=1e-3, atol=0)


def test_a_hub_id_and_a_program_are_no_weights():
    assert not is_single_file("stabilityai/sd") and not is_single_file(Path(__file__))


def refusal(path):
    with pytest.raises(InputError) as caught:
        load_single_file(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda weights: weights.pop("model.diffusion_model.middle_block.2.out_layers.3.bias"), "missing mid_block.resnets.1.conv2.bias"),
        (lambda weights: weights.pop("model.diffusion_model.out.2.weight"), "lack out.2.weight"),
        (lambda weights: weights.update({"model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4)}), "label_emb.0.0.weight"),
        (lambda weights: weights.update({"cond_stage_model.transformer.token_emb.weight": torch.ones(4, 4)}), "is not CLIP"),
        (lambda weights: weights.update({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(3)}), "damaged, or of a kind"),
        (lambda weights: weights.pop("model.diffusion_model.output_blocks.1.2.conv.bias"), "damaged, or of a kind"),
        (lambda weights: weights.update({"conditioner.embedders.1.model.x": torch.ones(4, 4)}), "Stable Diffusion XL"),
        (lambda weights: weights.update({"model.diffusion_model.input_blocks.1.0.emb_layers.1.bias": torch.ones(128)}), "of another shape"),
        (
            lambda weights: weights.clear() or weights.update({"lora_unet_a.up": torch.ones(1), "b.c": torch.ones(2)}),
            "begin with b, lora_unet_a",
        ),
        (lambda weights: weights.clear() or weights.update({"time_embedding.linear_1.weight": torch.ones(1)}), "diffusers' names already"),
    ],
)
def test_misfits_are_named(tmp_path, sd1_unet, change, words):
    net = Net(weights=dict(sd1_unet.weights))
    change(net.weights)
    assert words in refusal(write(tmp_path, net))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"unet_config": {"params": {"num_heads": 7}}}, "do not divide by 7"),
        ({"unet_config": {"params": {"num_heads": "eight"}}}, "num_heads of the YAML"),
        ({"timesteps": "many"}, "timesteps of the YAML"),
        ({"parameterization": "w"}, "parameterization 'w'"),
        ({"timesteps": 10, "beta_schedule": "cosine"}, "beta_schedule 'cosine'"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, sd1_unet, settings, words):
    assert words in refusal(write(tmp_path, sd1_unet, settings))


def test_heads_of_different_width_have_no_place_in_an_unconditional_unet(tmp_path):
    net = Net()
    with torch.no_grad():
        unet(net, LATENTS, TIMES, attends=(True, True), heads=4)
    assert "one head width for all" in refusal(write(tmp_path, net, {"unet_config": {"params": {"num_heads": 4}}}))


class Surprise:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Surprise(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    assert "convert it to .safetensors on a machine you trust" in refusal(tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "model.pt"])
def test_damaged_files_are_named(tmp_path, sd1_unet, name):
    whole = write(tmp_path, sd1_unet, name=name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint", whole[:100] + b"\0" * 200 + whole[300:]):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)
    (tmp_path / name).unlink()
    assert "no such file" in refusal(tmp_path / name)


def test_nests_are_unwrapped(tmp_path):
    torch.save({"epoch": 1, "model": {"network": {"a.b": torch.ones(2), "note": "text"}}}, tmp_path / "nested.pth")
    assert list(read_weights(tmp_path / "nested.pth")) == ["a.b"] and is_single_file(tmp_path / "nested.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    assert "no weights by name" in refusal(tmp_path / "list.pth")


def test_tokenizer():
    tokenizer = clip_tokenizer()
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == VOCABULARY and tokenizer.model_max_length == 77
    assert tokenizer.get_vocab()["jekyll</w>"] == VOCABULARY - 3 and tokenizer.get_vocab()["!"] == 0
    assert tokenizer(["x"], padding="max_length").input_ids[0][-1] == 49407
    assert clip_tokenizer("!")(["x"], padding="max_length").input_ids[0][2:5] == [49407, 0, 0]
    assert clip_tokenizer()("Pneumothorax, LEFT lung!").input_ids == clip_tokenizer()("pneumothorax ,  left lung !").input_ids
