"""Transplanting: an unconditional `UNet2DModel` becomes a `UNet2DConditionModel` that starts from the very same prediction.

The prompt enters by cross-attention, as in latent diffusion (Rombach et al., 2022, section 3.3): in the middle, and at levels whose
source has no attention (see `_heads`). Each such block adds to what passes by it, and its last layer starts at zero, so that it adds
nothing at first. It does not attend to the image, which at the fine levels of a model of pixels would cost too much.

`UNet2DConditionModel` has no middle block of (resnet, attention, resnet). So the middle's first resnet and its attention become
one more layer of the coarsest down level; its last resnet stays, before the cross-attention and a resnet that adds nothing. The extra layer
hands a skip connection to the first up level, which gets one more layer that passes its input through.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from medsd.errors import InputError
from medsd.models.trust import check_trust

EXACT = {
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
}
"""Settings of a `UNet2DModel` -> values that a `UNet2DConditionModel` can reproduce."""
DOWN_TYPES = {"DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"}
UP_TYPES = {"UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"}
KEPT = (
    "sample_size",
    "in_channels",
    "out_channels",
    "center_input_sample",
    "time_embedding_dim",
    "freq_shift",
    "flip_sin_to_cos",
    "block_out_channels",
    "downsample_padding",
    "dropout",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "resnet_time_scale_shift",
)
"""Settings that mean the same in both classes."""
LAST = {ResnetBlock2D: "conv2", Transformer2DModel: "proj_out", Attention: "to_out.0"}
"""Blocks that add to their input -> the layer that says what."""
PIPELINES = {"DDPMPipeline", "DDIMPipeline", "LDMPipeline"}
HEARING = {"DownBlock2D": "CrossAttnDownBlock2D", "UpBlock2D": "CrossAttnUpBlock2D"}
"""Levels without attention -> the same with cross-attention."""
HEADS = 8
"""Of the cross-attention at levels where the source's attention does not say another number."""
NARROWEST = 4
"""Width of a head below which a level gets no cross-attention."""


def transplant(source: UNet2DModel, cross_attention_dim: int) -> UNet2DConditionModel:
    """A UNet conditioned on `(B, tokens, cross_attention_dim)` which for any condition predicts what `source` does.

    It is a plain diffusers model in float32, on the source's device, with copies of the source's weights; what is new draws from
    torch's global generator, so all of it has to be trained.

    Raises InputError where a setting of `source` has no counterpart.
    """
    check_exact(source.config)
    unet = UNet2DConditionModel(**_settings(source.config, cross_attention_dim))
    weights = {_new_name(name, source.config): weight for name, weight in source.state_dict().items()}
    unet.load_state_dict(unet.state_dict() | weights)
    _silence(unet, weights.keys())
    return unet.to(source.device).train(source.training)


def check_exact(config: Any) -> None:
    """Raise InputError for a setting of a `UNet2DModel` that a `UNet2DConditionModel` cannot reproduce exactly."""
    for name, values in EXACT.items():
        if config[name] not in values:
            _refuse(name, config[name], values)
    for name, types in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
        if not types.issuperset(config[name]):
            _refuse(name, ", ".join(config[name]), sorted(types))
    widths = config.block_out_channels
    if config.attention_head_dim is None and "Attn" in config.up_block_types[-1] and widths[0] != widths[-1]:
        _refuse("attention_head_dim", "None and attention at the finest level going up", ["a number"])
    if config.add_attention and _middle_groups(config) != config.norm_num_groups:
        _refuse("attn_norm_num_groups", config.attn_norm_num_groups, [config.norm_num_groups])


def _refuse(name: str, value: Any, expected: Collection[Any]) -> None:
    wanted = " or ".join(str(choice) for choice in expected)
    raise InputError(f"this UNet2DModel has {name} {value}, and only {wanted} can be given prompts: start from another model or a --preset")


def _middle_groups(config: Any) -> int | None:
    """Groups of the middle attention's norm (None is no norm), by diffusers' rule."""
    if config.attn_norm_num_groups is not None or config.resnet_time_scale_shift != "default":
        return config.attn_norm_num_groups
    return config.norm_num_groups


def _settings(config: Any, cross_attention_dim: int) -> dict[str, Any]:
    widths, layers, heads = config.block_out_channels, config.layers_per_block, _heads(config)
    hears = [number is not None and width // number >= NARROWEST for number, width in zip(heads, widths, strict=True)]
    return {name: config[name] for name in KEPT} | {
        "down_block_types": tuple(map(_with_attention, _down_types(config), hears)),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": tuple(map(_with_attention, config.up_block_types, reversed(hears))),
        "layers_per_block": (*(layers,) * (len(widths) - 1), layers + 1),
        "attention_head_dim": heads,
        "only_cross_attention": True,
        "cross_attention_dim": cross_attention_dim,
    }


def _heads(config: Any) -> tuple[int | None, ...]:
    """Per level, one number that diffusers reads twice: the width of a head of the source's attention, and how many cross-attention has.

    Going up, the source's attention reads it in the opposite order, so that the first level's number is also the last one's. None is one
    head as wide as the level.
    """
    pairs = zip(_down_types(config), config.up_block_types, strict=True)
    heads = [config.attention_head_dim if any("Attn" in kind for kind in pair) else HEADS for pair in pairs]
    return (*heads[:-1], heads[-1] or config.block_out_channels[-1])


def _down_types(config: Any) -> tuple[str, ...]:
    return (*config.down_block_types[:-1], "AttnDownBlock2D" if config.add_attention else config.down_block_types[-1])


def _with_attention(kind: str, hears: bool) -> str:
    return HEARING.get(kind, kind) if hears else kind


def _new_name(name: str, config: Any) -> str:
    """Where a weight of the source lies in the new UNet."""
    extra = rf"down_blocks.{len(config.block_out_channels) - 1}.\1.{config.layers_per_block}."
    if name.startswith("mid_block.resnets.1."):
        return name.replace("resnets.1.", "resnets.0.")
    if name.startswith("mid_block."):
        return re.sub(r"^mid_block\.(\w+)\.0\.", extra, name)
    return re.sub(r"^up_blocks\.0\.(resnets|attentions)\.(\d+)\.", lambda match: _next_layer(*match.groups()), name)


def _next_layer(kind: str, index: str) -> str:
    return f"up_blocks.0.{kind}.{int(index) + 1}."


@torch.no_grad()
def _silence(unet: UNet2DConditionModel, known: Collection[str]) -> None:
    """Make every block without a weight in `known` add zero to its input; its last layer still gets a gradient."""
    for name, block in unet.named_modules():
        # What lies in a transformer is behind its own last layer.
        if type(block) in LAST and "transformer_blocks" not in name and not any(weight.startswith(f"{name}.") for weight in known):
            _zero(block.get_submodule(LAST[type(block)]))
    shortcut = unet.up_blocks[0].resnets[0].conv_shortcut
    _zero(shortcut)
    nn.init.dirac_(shortcut.weight)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def is_unconditional(name: str) -> bool:
    """Whether a local folder holds a `UNet2DModel`, bare or as a pipeline's `unet`; False for whatever is no local folder."""
    for file in ("model_index.json", "config.json"):
        path = Path(name) / file
        if path.is_file():
            return _names_unet(_read(path))
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: copy the folder again") from error


def _names_unet(record: dict[str, Any]) -> bool:
    """Whether a `model_index.json` or a `config.json` is about a `UNet2DModel`."""
    if not isinstance(record, dict):
        return False
    return record.get("_class_name") == "UNet2DModel" or record.get("unet") == ["diffusers", "UNet2DModel"]


def load_unconditional(name: str, revision: str | None = None) -> tuple[UNet2DModel, Any | None, Any | None]:
    """UNet, autoencoder (`VQModel` or `AutoencoderKL`) or None, and scheduler or None.

    `name` is a folder or Hub id of a DDPMPipeline, DDIMPipeline or LDMPipeline, or a bare `UNet2DModel`; safetensors only.
    Raises InputError where it is none of them.
    """
    kind, record = _describe(name, revision)
    found = record.get("_class_name")
    if not _names_unet(record) or (kind is DiffusionPipeline and found not in PIPELINES):
        raise InputError(
            f"{name} is a {found}; a UNet2DModel, bare or in a {' or '.join(sorted(PIPELINES))}, is expected: name another model"
        )
    if Path(name).is_dir():
        check_trust(Path(name))
    try:
        loaded = kind.from_pretrained(name, revision=revision, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(
            f"{name}: not all weights are there as safetensors, or they do not fit their config ({problem}): convert with diffusers' "
            "save_pretrained, or copy the folder again"
        ) from error
    if kind is UNet2DModel:
        return loaded, None, None
    parts = loaded.components
    return parts["unet"], parts.get("vqvae") or parts.get("vae"), parts.get("scheduler")


def _describe(name: str, revision: str | None) -> tuple[type[DiffusionPipeline] | type[UNet2DModel], dict[str, Any]]:
    """What loads `name`, and its `model_index.json` or `config.json`."""
    problem = ""
    for kind in (DiffusionPipeline, UNet2DModel):
        try:
            return kind, kind.load_config(name, revision=revision)
        except OSError as error:
            problem = str(error).splitlines()[0]
    raise InputError(f"{name}: neither a diffusers pipeline nor a UNet2DModel is there ({problem})")
