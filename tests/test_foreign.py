"""Models that others trained, opened and fine-tuned: single files, unconditional folders, ImageNet's classes, MONAI bundles."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from transformers import CLIPTextConfig, CLIPTextModel

from medsd import MedSDPipeline
from medsd.errors import InputError
from tests.compvis import VOCABULARY, Net, decode, encode, unet
from tests.test_convert import alphas, noise, write
from tests.test_recipes import losses, train

CONTEXT = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(2))
STILL = {"learning_rate": 1e-12, "use_ema": False, "validation_steps": 0}
"""Training that leaves the weights where they were."""


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A small Stable Diffusion 1 in one file."""
    net = Net()
    unet(net, noise(2, 4, 8, 8), torch.tensor([3, 901]), noise(2, 7, 64), layers=2, attends=(True, False))
    stage = net.under("first_stage_model.")
    encode(stage, noise(1, 3, 16, 16), 8), decode(stage, noise(2, 4, 8, 8), 3)
    config = CLIPTextConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
    for key, value in CLIPTextModel(config).state_dict().items():
        net.weights[f"cond_stage_model.transformer.text_model.{key}"] = value
    return write(tmp_path_factory.mktemp("sd"), net, alphas_cumprod=alphas(0.00085, 0.012))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A DDPMPipeline folder of grey images of 32 px, every weight random."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
    folder = tmp_path_factory.mktemp("ddpm") / "model"
    DDPMPipeline(model, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


def quiet(name):
    pipe = MedSDPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_a_single_file_is_a_pipeline(stable_diffusion):
    pipe = quiet(stable_diffusion)
    assert pipe.codec.kind == "kl" and pipe.class_names == [] and pipe.is_sd_shaped and pipe.unet.config.sample_size == 64
    drawn = pipe(prompt="a photo of a cat", latents=noise(1, 4, 16, 16), num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and np.isfinite(drawn).all()
    assert pipe.data.resolution == 128
    pipe.info = replace(pipe.info, data=replace(pipe.data, resolution=32))
    scores = pipe.classify([np.zeros((3, 32, 32), np.uint8)], prompts=["a cat", "a dog"], mode="full", max_pairs=2)
    assert np.isfinite(scores.log_likelihoods).all()


def test_a_folder_in_half_precision_is_fine_tuned_in_full(stable_diffusion, phantom_data, tmp_path):
    pipe = quiet(stable_diffusion)
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    half = quiet(tmp_path / "half")
    assert {half.unet.dtype, half.text_encoder.dtype} == {torch.float32}
    assert MedSDPipeline.from_pretrained(tmp_path / "half", dtype=torch.float16).text_encoder.dtype == torch.float16
    half.to(torch.float16).save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert quiet(tmp_path / "variant").unet.dtype == torch.float32
    (tmp_path / "variant" / "config.json").write_text("{}")  # As some repositories on the Hub have beside the index.
    assert quiet(tmp_path / "variant").unet.dtype == torch.float32
    run = train(phantom_data, tmp_path / "unet", pretrained_model_name_or_path=str(tmp_path / "half"))
    assert quiet(run)(class_name="epidural", num_inference_steps=2, output_type="np").images.shape[0] == 1


@pytest.mark.parametrize("rank", [None, 2])
def test_a_single_file_is_fine_tuned(stable_diffusion, phantom_data, tmp_path, rank):
    base = {"pretrained_model_name_or_path": str(stable_diffusion), "rank": rank}
    run = train(phantom_data, tmp_path / "unet", **base)
    assert quiet(run).class_names and "<epidural>" in quiet(run).tokenizer.get_vocab()
    assert json.loads((run / "medsd.json").read_text())["reads_prompts"]
    if rank:
        stable_diffusion.write_bytes(stable_diffusion.read_bytes() + b"\0")
        with pytest.raises(InputError, match="have changed since"):
            MedSDPipeline.from_pretrained(run)


@torch.no_grad()
def test_an_unconditional_folder_draws_what_it_drew(unconditional):
    pipe, theirs = quiet(unconditional), UNet2DModel.from_pretrained(unconditional, subfolder="unet")
    x, timesteps = torch.randn(2, 1, 32, 32), torch.tensor([10, 900])
    ours = pipe.unet(x, timesteps, pipe.encode_prompts(["", ""])).sample
    assert (ours - theirs(x, timesteps).sample).abs().max() <= 1e-6
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2" and pipe.scheduler.config.clip_sample
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 1)


def test_an_unconditional_folder_becomes_conditional_without_a_jump(unconditional, phantom_data, tmp_path):
    """After training that moves nothing, every class is predicted as before; after training that does, classes differ."""
    still = quiet(train(phantom_data, tmp_path / "still", pretrained_model_name_or_path=str(unconditional), **STILL))
    learning = {"max_train_steps": 20, "validation_steps": 0, "learning_rate": 1e-4, "lr_warmup_steps": 1}
    moved = quiet(train(phantom_data, tmp_path / "moved", pretrained_model_name_or_path=str(unconditional), **learning))
    theirs = UNet2DModel.from_pretrained(unconditional, subfolder="unet")
    x, timesteps = torch.randn(6, 1, 32, 32), torch.tensor([10, 100, 300, 500, 700, 900])
    with torch.no_grad():
        before = theirs(x, timesteps).sample
        assert (still.unet(x, timesteps, still.encode_prompts(still.data.prompts)).sample - before).abs().max() <= 1e-6
        same_x = x[:1].expand(6, -1, -1, -1)
        classes = moved.unet(same_x, timesteps[:1].expand(6), moved.encode_prompts(moved.data.prompts)).sample
    assert (classes[0] - classes[1]).abs().max() > 1e-5
    with pytest.raises(InputError, match="can only be trained in full"):
        train(phantom_data, tmp_path / "lora", pretrained_model_name_or_path=str(unconditional), rank=2)


def test_an_unconditional_run_of_ours_becomes_conditional_without_a_jump(phantom_data, tmp_path):
    base = train(phantom_data, tmp_path / "base", unconditional=True)
    before, still = quiet(base), quiet(train(phantom_data, tmp_path / "still", pretrained_model_name_or_path=str(base), **STILL))
    x, timesteps = torch.randn(6, 16, 8, 8), torch.full((6,), 300)
    with torch.no_grad():
        expected = before.unet(x, timesteps, before.encode_prompts([""] * 6)).sample
        assert (still.unet(x, timesteps, still.encode_prompts(still.data.prompts)).sample - expected).abs().max() <= 1e-6
    assert not before.reads_prompts and still.reads_prompts and len(still.class_names) == 6
    again = train(phantom_data, tmp_path / "again", pretrained_model_name_or_path=str(base), unconditional=True)
    assert not quiet(again).reads_prompts


def test_classes_of_imagenet_are_replaced_by_those_of_the_data(phantom_data, tmp_path):
    """The model starts as what it was without a class, whatever the prompt."""
    net, latents, timesteps = Net(), noise(2, 3, 8, 8), torch.tensor([3, 901])
    table = net.get("cond_stage_model.embedding.weight", 11, 24)
    expected = unet(net, latents, timesteps, table[[10, 10], None], heads=1)
    stage = net.under("first_stage_model.")
    encode(stage, noise(1, 3, 16, 16), 6, embedding=3), decode(stage, latents, 3, latent_channels=6)
    net.get("first_stage_model.quantize.embedding.weight", 13, 3)
    file = write(tmp_path, net, betas=torch.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)
    pipe = quiet(train(phantom_data, tmp_path / "still", pretrained_model_name_or_path=str(file), **STILL))
    with torch.no_grad():
        got = pipe.unet(latents.float(), timesteps, pipe.encode_prompts(pipe.data.prompts[:2])).sample
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
    assert pipe.codec.kind == "vq" and len(pipe.class_names) == 6


def test_a_monai_bundle_is_fine_tuned(phantom_data, tmp_path):
    pytest.importorskip("einops")
    nets = pytest.importorskip("monai.networks.nets")
    vae = nets.AutoencoderKL(
        2, 1, 1, (1, 1), (32, 32), (False, False), 3, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False
    )
    model = nets.DiffusionModelUNet(2, 3, 3, 1, (32, 32), (False, True), num_head_channels=32)
    (tmp_path / "bundle" / "models").mkdir(parents=True)
    torch.save(vae.state_dict(), tmp_path / "bundle" / "models" / "autoencoder.pt")
    torch.save({"model": model.state_dict()}, tmp_path / "bundle" / "models" / "unet.pt")
    (tmp_path / "bundle" / "configs").mkdir()
    definition = {"net": {"_target_": "DiffusionModelUNet", "num_head_channels": 32}}
    (tmp_path / "bundle" / "configs" / "train.json").write_text(json.dumps(definition))
    run = train(phantom_data, tmp_path / "unet", pretrained_model_name_or_path=str(tmp_path / "bundle"))
    assert quiet(run).codec.kind == "kl" and len(losses(run)) == 2


def test_what_holds_no_unet_is_refused(tmp_path):
    net = Net()
    encode(net, noise(1, 3, 16, 16), 8), decode(net, noise(2, 4, 8, 8), 3)
    with pytest.raises(InputError, match="autoencoder and no UNet"):
        MedSDPipeline.from_pretrained(write(tmp_path, net))
    with pytest.raises(InputError, match="no such file"):
        MedSDPipeline.from_pretrained(tmp_path / "nowhere.safetensors")
