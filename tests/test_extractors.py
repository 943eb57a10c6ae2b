"""Features: the same in any order, networks against arithmetic by hand, hashes that tell extractors apart, files that are refused."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from medsd import MedSDPipeline
from medsd.data.dataset import load_info
from medsd.data.intensity import parse_windows
from medsd.errors import InputError
from medsd.evaluation.features import check_same
from medsd.inference.extractors import CodecFeatures, ColourFeatures, ResNetFeatures, UNetFeatures, extract, load_extractor
from medsd.inference.plan import pair_noise
from medsd.models.inception import Block, InceptionV3
from medsd.models.resnet import ResNet
from medsd.models.vision import VisionModel, load_network, load_vision_model
from medsd.training.fitting import adopt
from tests.test_planted_code import PROGRAM, Trap, change_json

CPU = torch.device("cpu")
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}


def small_vae():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(32, 32), latent_channels=4, **blocks).eval()


def pipeline(phantom_data, vae=None, windows=("brain",)):
    info = replace(load_info(phantom_data), intensity=parse_windows(windows).to_dict())
    torch.manual_seed(0)
    pipe = MedSDPipeline.from_preset("tiny", info, vae, pixel_mean=-0.5, pixel_std=0.5)
    adopt(pipe, info)
    return pipe


@pytest.fixture(scope="module")
def pipe(phantom_data):
    return pipeline(phantom_data)


@pytest.fixture(scope="module")
def latent_pipe(phantom_data):
    return pipeline(phantom_data, small_vae())


def draw(count, channels=1, side=32, seed=0):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomised(module):
    """Away from the ones and zeros that vectors start with, so that none can be left out unseen."""
    draws = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim == 1:
            shift = name.endswith(("running_mean", "bias"))
            value.uniform_(-0.3 if shift else 0.5, 0.3 if shift else 1.5, generator=draws)
    return module.eval()


def vit(**changes):
    torch.manual_seed(0)
    return randomised(ViTModel(ViTConfig(**TINY_VIT | changes)))


def saved(model, folder, **processor):
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"} | processor))
    return str(folder)


def build_extractors(pipe, latent_pipe):
    torch.manual_seed(0)
    return {
        "unet": UNetFeatures(pipe),
        "unet of latents": UNetFeatures(latent_pipe),
        "codec": CodecFeatures(pipe.codec),
        "codec of latents": CodecFeatures(latent_pipe.codec),
        "resnet": ResNetFeatures(randomised(ResNet(1, 3, 32, width=8)), "resnet"),
        "vision": ColourFeatures(VisionModel(vit(), {}), CPU),
    }


@pytest.mark.parametrize("name", ["unet", "unet of latents", "codec", "codec of latents", "resnet", "vision"])
def test_features_are_the_same_in_any_order_and_company(pipe, latent_pipe, name):
    extractor, images = build_extractors(pipe, latent_pipe)[name], draw(37)
    features = extract(extractor, images, batch_size=16)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    # In attention, the kernels of some processors round by the place of a row.
    rounded = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    alike = rounded if name == "vision" else np.testing.assert_array_equal
    alike(extract(extractor, images[order], batch_size=16).values, features.values[order])
    alike(extract(extractor, iter(images[5:].split(7)), batch_size=16).values, features.values[5:])
    alike(extract(extractor, images[-1:], batch_size=16).values, features.values[-1:])
    with torch.autocast("cpu", torch.bfloat16):
        alike(extract(extractor, images, batch_size=16).values, features.values)
    assert features.values.dtype == np.float32 and len(np.unique(features.values, axis=0)) == 37
    assert features.extractor == f"{extractor.name} sha256:{extractor.sha256}" and len(extractor.sha256) == 16


def test_progress_counts_images(pipe):
    seen = []
    extract(CodecFeatures(pipe.codec), draw(5), batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1]


def test_no_image_and_no_number(pipe):
    with pytest.raises(InputError, match="no image"):
        extract(CodecFeatures(pipe.codec), [])
    with pytest.raises(InputError, match="features of codec are not finite"):
        extract(CodecFeatures(pipe.codec), draw(2) * torch.nan)


def test_different_extractors_refuse_to_be_compared(pipe):
    one, other, same = (extract(extractor, draw(4)) for extractor in (UNetFeatures(pipe), UNetFeatures(pipe, seed=1), UNetFeatures(pipe)))
    check_same(one, same)
    with pytest.raises(InputError, match="cannot be compared: extract both with one --features"):
        check_same(one, other)


# The pipeline's own


def by_hand(unet, noisy, timesteps, condition):
    """What leaves the middle block."""
    time = unet.time_embedding(unet.time_proj(timesteps))
    x = unet.conv_in(noisy)
    for block in unet.down_blocks:
        attends = {"encoder_hidden_states": condition} if hasattr(block, "attentions") else {}
        x = block(x, time, **attends)[0]
    return unet.mid_block(x, time, encoder_hidden_states=condition)


@torch.no_grad()
def test_unet_features_are_its_middle_block_at_a_tenth_of_the_schedule(latent_pipe):
    images, pipe = draw(2), latent_pipe
    latents = pipe.codec.encode(images)
    signal = pipe.noise_schedule.alphas_cumprod[100]
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * pair_noise(0, 0, tuple(latents.shape[1:]))
    expected = by_hand(pipe.unet, noisy, torch.tensor([100, 100]), pipe.encode_prompts(["", ""])).mean((2, 3))
    torch.testing.assert_close(UNetFeatures(pipe)(images), expected)


def test_codec_features_are_averages(pipe, latent_pipe):
    images = draw(2)
    areas = images.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    torch.testing.assert_close(CodecFeatures(pipe.codec)(images), areas.flatten(1))
    with torch.no_grad():
        latents = latent_pipe.vae.encode(images).latent_dist.mean * latent_pipe.vae.config.scaling_factor
    torch.testing.assert_close(
        CodecFeatures(latent_pipe.codec)(images), latents.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5)).flatten(1)
    )


def test_the_features_of_a_pipeline_with_several_channels(phantom_data):
    pipe = pipeline(phantom_data, windows=("brain", "bone"))
    assert extract(UNetFeatures(pipe), draw(3, 2)).values.shape == (3, 64)
    assert extract(CodecFeatures(pipe.codec), draw(3, 2)).values.shape == (3, 128)


def test_a_hash_is_that_of_the_weights(phantom_data, tmp_path):
    pipe = pipeline(phantom_data, small_vae())
    before = UNetFeatures(pipe).sha256, CodecFeatures(pipe.codec).sha256
    pipe.save_pretrained(tmp_path / "unet")
    again = MedSDPipeline.from_pretrained(tmp_path / "unet")
    assert (UNetFeatures(again).sha256, CodecFeatures(again.codec).sha256) == before
    with torch.no_grad():
        again.unet.mid_block.resnets[1].conv2.bias[-1] += 1e-3
    assert UNetFeatures(again).sha256 != before[0] and CodecFeatures(again.codec).sha256 == before[1]
    with torch.no_grad():
        pipe.vae.encoder.conv_out.bias[0] += 1e-3
    assert UNetFeatures(pipe).sha256 != before[0] and CodecFeatures(pipe.codec).sha256 != before[1]


def test_a_hash_is_that_of_what_else_determines_the_numbers(phantom_data):
    pipe = pipeline(phantom_data, small_vae())
    before = UNetFeatures(pipe).sha256
    assert UNetFeatures(pipe, seed=1).sha256 != before
    pipe.vae.register_to_config(scaling_factor=0.5)
    scaled = UNetFeatures(pipe).sha256
    pipe.scheduler.register_to_config(beta_end=0.02)
    assert len({before, scaled, UNetFeatures(pipe).sha256}) == 3


def test_a_resnet_of_ones_own():
    model = randomised(ResNet(2, 3, 64, width=8))
    extractor, images = ResNetFeatures(model, "resnet"), draw(2, 2, 64)
    torch.testing.assert_close(model.head(extractor(images)), model(images))
    other = ResNet(2, 3, 32, width=8)
    other.load_state_dict(model.state_dict())
    assert ResNetFeatures(other, "resnet").sha256 != extractor.sha256, "the same weights with another stride"


# Inception


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return randomised(InceptionV3())


def test_inception_has_the_published_keys(inception):
    keys = inception.state_dict()
    assert len(keys) == 94 * 6 and sum(value.numel() for value in inception.parameters()) == 21_785_568
    assert keys["Mixed_5b.branch5x5_2.conv.weight"].shape == (64, 48, 5, 5)
    assert keys["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)
    assert keys["Mixed_7a.branch7x7x3_4.conv.weight"].shape == (192, 192, 3, 3)
    assert keys["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert keys["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("average", [[2.0, 2.5, 3.0], [3.5, 4.0, 4.5], [5.0, 5.5, 6.0]]),
        ("maximum", [[4.0, 5.0, 5.0], [7.0, 8.0, 8.0], [7.0, 8.0, 8.0]]),
    ],
)
def test_a_pool_leaves_out_the_border_that_was_added(pool, expected):
    block = Block(1, pool, {"branch_pool": [(1, 1)]}).eval()
    block.branch_pool.conv.weight.fill_(1)
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    torch.testing.assert_close(block(image)[0, 0], torch.tensor(expected) / (1 + block.branch_pool.bn.eps) ** 0.5)


@torch.no_grad()
def test_branches_that_fork_and_that_halve():
    forked = Block(2, "average", {"branch3x3": [(3, 1), [(4, (1, 3)), (5, (3, 1))]]})
    assert [name for name, _ in forked.named_children()] == ["branch3x3_1", "branch3x3_2a", "branch3x3_2b"]
    x = draw(1, 2, 9)
    inner = forked.eval().branch3x3_1(x)
    torch.testing.assert_close(forked(x), torch.cat([forked.branch3x3_2a(inner), forked.branch3x3_2b(inner)], 1))
    halved = Block(2, "halve", {"branch3x3": [(3, 1), (4, 3)], "branch_pool": []}).eval()
    torch.testing.assert_close(halved(x)[:, 4:], F.max_pool2d(x, 3, 2))
    assert halved(x).shape == (1, 6, 4, 4) and halved.width == 6


@torch.no_grad()
def test_only_the_last_block_pools_by_maximum(inception):
    x = draw(1, 2048, 8)
    pooled = inception.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))
    torch.testing.assert_close(inception.Mixed_7c(x)[:, -192:], pooled)
    before = inception.Mixed_7b.branch_pool(F.avg_pool2d(x[:, :1280], 3, 1, 1, count_include_pad=False))
    torch.testing.assert_close(inception.Mixed_7b(x[:, :1280])[:, -192:], before)
    assert [block.pool for block in inception.children() if isinstance(block, Block)].count("average") == 8


@torch.no_grad()
def test_inception_from_a_file(inception, tmp_path):
    classes = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    kept = {name: value for name, value in inception.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(kept | classes, tmp_path / "pt_inception.pth")
    read, images = load_network(tmp_path / "pt_inception.pth"), draw(1, 3, 64)
    assert ColourFeatures(read, CPU).sha256 == ColourFeatures(inception, CPU).sha256
    features = read(images)
    assert features.shape == (1, 2048) and torch.equal(features, inception(images))
    torch.testing.assert_close(read(F.interpolate(images, (299, 299), mode="bilinear")), features)


def test_inceptions_that_are_not_that_of_fid(inception, tmp_path):
    save_file(inception.state_dict() | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.safetensors")
    with pytest.raises(InputError, match="torchvision.safetensors: this is torchvision's Inception, which is not that of FID"):
        load_network(tmp_path / "torchvision.safetensors")
    part = {name: value for name, value in inception.state_dict().items() if "Mixed_7c.branch_pool" not in name}
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match="do not fit InceptionV3: missing Mixed_7c.branch_pool.conv.weight"):
        load_network(tmp_path / "part.safetensors")


# ResNet-50

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))


def convolutions():
    """Every convolution of torchvision's ResNet-50 as (name, name of the normalisation behind it, shape)."""
    yield "conv1", "bn1", (64, 3, 7, 7)
    width = 64
    for stage, (inner, blocks) in enumerate(STAGES, 1):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            yield f"{place}.conv1", f"{place}.bn1", (inner, width, 1, 1)
            yield f"{place}.conv2", f"{place}.bn2", (inner, inner, 3, 3)
            yield f"{place}.conv3", f"{place}.bn3", (4 * inner, inner, 1, 1)
            if not block:
                yield f"{place}.downsample.0", f"{place}.downsample.1", (4 * inner, width, 1, 1)
            width = 4 * inner


def resnet50_weights(biases=False):
    draws = torch.Generator().manual_seed(0)
    weights = {}
    for name, norm, shape in convolutions():
        weights[f"{name}.weight"] = torch.randn(shape, generator=draws) * (2 / np.prod(shape[1:])) ** 0.5
        if biases:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=draws) * 0.1
        for part, low, high in (("weight", 0.5, 1), ("bias", -0.2, 0.2), ("running_mean", -0.2, 0.2), ("running_var", 0.5, 1.5)):
            weights[f"{norm}.{part}"] = torch.empty(shape[0]).uniform_(low, high, generator=draws)
    return weights


def by_paper(weights, x, in_first, epsilon):
    """He et al. (2016), with nothing but torch's functions."""

    def convolved(x, name, norm, stride=1, padding=0):
        x = F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), stride, padding)
        statistics = (weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=epsilon)

    x = F.max_pool2d(F.relu(convolved(x, "conv1", "bn1", 2, 3)), 3, 2, 1)
    for stage, (_, blocks) in enumerate(STAGES, 1):
        for block in range(blocks):
            place, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            inner = F.relu(convolved(x, f"{place}.conv1", f"{place}.bn1", stride if in_first else 1))
            inner = F.relu(convolved(inner, f"{place}.conv2", f"{place}.bn2", 1 if in_first else stride, 1))
            x = x if block else convolved(x, f"{place}.downsample.0", f"{place}.downsample.1", stride)
            x = F.relu(convolved(inner, f"{place}.conv3", f"{place}.bn3") + x)
    return x.mean((2, 3))


@torch.no_grad()
def test_radimagenet_in_either_spelling(tmp_path):
    weights, images = resnet50_weights(), draw(2, 3, 64)
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    spelt = {f"backbone.{numbers[key.split('.')[0]]}.{key.partition('.')[2]}": value for key, value in weights.items()}
    torch.save(spelt, tmp_path / "ResNet50.pt")
    save_file(weights, tmp_path / "ported.safetensors")
    one, other = load_network(tmp_path / "ResNet50.pt"), load_network(tmp_path / "ported.safetensors")
    blue_green_red = (images[:, [2, 1, 0]] + 1) / 2 - torch.tensor([0.406, 0.456, 0.485])[:, None, None]
    torch.testing.assert_close(one(images), by_paper(weights, blue_green_red, False, 1e-5), rtol=1e-4, atol=1e-4)
    assert torch.equal(one(images), other(images)) and one.name == "radimagenet-resnet50"
    assert ColourFeatures(one, CPU).sha256 == ColourFeatures(other, CPU).sha256


@torch.no_grad()
def test_the_port_of_radimagenets_keras_model(tmp_path):
    weights, images = resnet50_weights(biases=True), draw(2, 3, 64)
    torch.save(weights, tmp_path / "RadImageNet-ResNet50_notop.pth")
    seen = (images.flip(1) + 1) / 2 - torch.tensor([0.406, 0.456, 0.485])[:, None, None]
    expected = by_paper(weights, seen, True, 1.001e-5)
    network = load_network(tmp_path / "RadImageNet-ResNet50_notop.pth")
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    assert {module.eps for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {1.001e-5}
    assert not torch.allclose(by_paper(weights, seen, False, 1e-5), expected, rtol=0.01)


@torch.no_grad()
def test_a_resnet50_with_imagenets_classes_sees_what_it_was_trained_on(tmp_path):
    weights, images = resnet50_weights(), draw(1, 3, 224)
    torch.save(weights | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "resnet50.pth")
    network = load_network(tmp_path / "resnet50.pth")
    seen = ((images + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(network(images), by_paper(weights, seen, False, 1e-5), rtol=1e-4, atol=1e-4)
    assert network.name == "imagenet-resnet50"


# Vision models of transformers


@torch.no_grad()
def test_a_vision_model_with_its_processor(tmp_path):
    model = vit()
    name = saved(
        model, tmp_path / "vit", size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3
    )
    images = draw(2, 3, 64)
    shrunk = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    seen = ((shrunk + 1) / 2 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.4, 0.5, 0.6])[:, None, None]
    torch.testing.assert_close(load_vision_model(name)(images), model(pixel_values=seen).pooler_output)


@torch.no_grad()
def test_a_vision_model_without_a_processor(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    model = randomised(ResNetModel(config))
    features = load_vision_model(saved(model, tmp_path / "resnet"))(draw(2, 3, 224))
    torch.testing.assert_close(features, model(pixel_values=draw(2, 3, 224)).pooler_output.flatten(1))


@torch.no_grad()
def test_a_pooler_that_was_never_trained_is_not_used(tmp_path):
    """A classifier's file has none, and transformers would fill it with random numbers."""
    torch.manual_seed(0)
    classifier = randomised(ViTForImageClassification(ViTConfig(**TINY_VIT)))
    name = saved(classifier, tmp_path / "classifier")
    torch.manual_seed(1)
    one, images = ColourFeatures(load_vision_model(name), CPU), draw(2, 3)
    torch.manual_seed(2)
    other = ColourFeatures(load_vision_model(name), CPU)
    assert one.sha256 == other.sha256 and torch.equal(one(images), other(images))
    tokens = classifier.vit(pixel_values=images).last_hidden_state
    torch.testing.assert_close(one(images), tokens[:, 1:].mean(1))


def test_weights_that_are_not_in_the_file(tmp_path):
    name = saved(vit(num_hidden_layers=1), tmp_path / "vit")
    change_json(tmp_path / "vit" / "config.json", num_hidden_layers=2)
    with pytest.raises(InputError, match="lacks .*layer.*, which would be random numbers"):
        load_vision_model(name)


@torch.no_grad()
def test_the_image_tower_of_a_clip_model(tmp_path):
    torch.manual_seed(0)
    model = randomised(CLIPModel(CLIPConfig(vision_config=TINY_VIT, text_config={"hidden_size": 16, "num_hidden_layers": 1})))
    name = saved(model, tmp_path / "clip", size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, do_center_crop=True)
    expected = model.vision_model(pixel_values=draw(2, 3)).pooler_output
    torch.testing.assert_close(load_vision_model(name)(draw(2, 3)), expected)


@torch.no_grad()
def test_a_model_at_another_side_than_it_was_trained_on(tmp_path):
    torch.manual_seed(0)
    model = randomised(Dinov2Model(Dinov2Config(**TINY_VIT)))
    features = load_vision_model(saved(model, tmp_path / "dino", size={"shortest_edge": 64}))(draw(2, 3, 64))
    torch.testing.assert_close(features, model(pixel_values=draw(2, 3, 64)).pooler_output)
    plain = load_vision_model(saved(vit(), tmp_path / "vit", size=64))
    torch.testing.assert_close(plain(draw(2, 3, 64)), vit()(pixel_values=draw(2, 3, 64), interpolate_pos_encoding=True).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_are_looked_at_one_by_one_unless_they_are_colours(channels):
    network = VisionModel(vit(), {})
    extractor, images = ColourFeatures(network, CPU), draw(2, channels)
    greys = [network(images[:, [channel] * 3]) for channel in range(channels)]
    torch.testing.assert_close(extractor(images), network(images) if channels == 3 else torch.cat(greys, 1))


# What --features names


def test_extractors_by_name(pipe, tmp_path):
    names = {"unet": "unet", "codec": "codec", saved(vit(), tmp_path / "vit"): "vit"}
    torch.save(resnet50_weights(), tmp_path / "net.pth")
    names[str(tmp_path / "net.pth")] = "radimagenet-resnet50"
    for wanted, name in names.items():
        assert load_extractor(wanted, pipe, CPU).name == name


def refused(pipe, wanted, message):
    with pytest.raises(InputError, match=message) as caught:
        load_extractor(str(wanted), pipe, CPU)
    assert str(caught.value).startswith("--features ") and "\n" not in str(caught.value)


def test_what_is_no_extractor(pipe, tmp_path):
    refused(pipe, "uent", "uent is neither unet, codec, a file of weights, the folder of a vision model, nor a Hub id")
    refused(pipe, tmp_path / "gone.pth", "no such file")
    (tmp_path / "model.h5").write_bytes(b"\x89HDF")
    refused(pipe, tmp_path / "model.h5", "weights in .safetensors, .pt, .pth are expected")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    refused(pipe, tmp_path / "noise.pt", "damaged or no checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    refused(pipe, tmp_path / "noise.safetensors", "cannot be read")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "vgg.safetensors")
    refused(pipe, tmp_path / "vgg.safetensors", "its keys begin with features: known are")
    refused(pipe, tmp_path, "no vision model of transformers")
    (tmp_path / "model_index.json").write_text("{}")
    refused(pipe, tmp_path, "is a pipeline folder")


def test_models_that_see_no_colour_images(pipe, tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    refused(pipe, saved(BertModel(BertConfig(**tiny)), tmp_path / "bert"), "a model of colour images is expected, this is a BertModel")
    refused(pipe, saved(vit(num_channels=1), tmp_path / "grey"), "a model of colour images is expected, this is a ViTModel")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_file(pipe, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    refused(pipe, tmp_path / "model.pt", "is TorchScript, which holds code")


def test_planted_code_is_not_executed(pipe, tmp_path):
    trap = tmp_path / "executed"
    torch.save({"conv1.weight": Trap(trap)}, tmp_path / "model.pth")
    refused(pipe, tmp_path / "model.pth", "holds Python objects")
    pickled = tmp_path / "pickled"
    saved(vit(), pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({"a": Trap(trap)}, pickled / "pytorch_model.bin")
    refused(pipe, pickled, "no vision model of transformers with safetensors weights")
    coded = tmp_path / "coded"
    saved(vit(), coded)
    (coded / "modeling.py").write_text(PROGRAM.format(path=str(trap)))
    change_json(coded / "config.json", auto_map={"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}, model_type="mine")
    refused(pipe, coded, "asks for code of its own")
    assert not trap.exists()
