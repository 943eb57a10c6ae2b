"""Transplanting: an unconditional `UNet2DModel` becomes a `UNet2DConditionModel` that starts from the very same prediction.

The prompt enters through the time embedding, as classes do in Dhariwal & Nichol (2021): diffusers' `addition_embed_type="text"`
pools the condition, and its last scale and offset start at zero, so that it adds nothing at first. From there alone it would hardly learn:
prompts differ in few tokens, and pooling leaves little of that. So `listen` first takes away what all classes' prompts say.

`UNet2DConditionModel` has no middle block of (resnet, attention, resnet). So the middle's first resnet and its attention become
one more layer of the coarsest down level, and only its last resnet stays. That layer hands a skip connection to the first up
level, which gets one more layer that passes its input through.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from medsd.errors import InputError

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
    "up_block_types",
    "block_out_channels",
    "downsample_padding",
    "dropout",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "resnet_time_scale_shift",
)
"""Settings that mean the same in both classes."""
PIPELINES = {"DDPMPipeline", "DDIMPipeline", "LDMPipeline"}
POOLING_WIDTH = 64
"""Width of a head that pools the condition."""


def transplant(source: UNet2DModel, cross_attention_dim: int) -> UNet2DConditionModel:
    """A UNet conditioned on `(B, tokens, cross_attention_dim)` which for any condition predicts what `source` does.

    It is a plain diffusers model in float32, on the source's device, with copies of the source's weights; what is new draws from
    torch's global generator. Train all of it: with the new layers frozen, as LoRA has them, it never takes notice of the condition.

    Raises InputError where a setting of `source` has no counterpart.
    """
    check_exact(source.config)
    unet = UNet2DConditionModel(**_settings(source.config, cross_attention_dim))
    weights = {_new_name(name, source.config): weight for name, weight in source.state_dict().items()}
    unet.load_state_dict(unet.state_dict() | weights)
    _silence(unet, weights.keys())
    return unet.to(source.device).train(source.training)


@torch.no_grad()
def listen(unet: UNet2DConditionModel, conditions: torch.Tensor) -> None:
    """Tell these conditions `(K, tokens, dim)` apart, in a transplanted UNet, by what each says beyond their mean.

    The offset of the pooled condition takes the mean away, and the norm behind it enlarges what is left. Nothing is predicted
    otherwise before the norm's scale has learned.
    """
    pooling = unet.add_embedding
    said = pooling.proj(pooling.pool(pooling.norm1(conditions.to(unet.device))))
    pooling.proj.bias.sub_(said.mean(0))


def check_exact(config: Any) -> None:
    """Raise InputError for a setting of a `UNet2DModel` that a `UNet2DConditionModel` cannot reproduce exactly."""
    for name, values in EXACT.items():
        if config[name] not in values:
            _refuse(name, config[name], values)
    for name, types in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
        if not types.issuperset(config[name]):
            _refuse(name, ", ".join(config[name]), sorted(types))
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
    levels, layers = len(config.block_out_channels), config.layers_per_block
    coarsest = "AttnDownBlock2D" if config.add_attention else config.down_block_types[-1]
    # One None per level is one head of the level's own width, as a single None is in UNet2DModel.
    head_width = (None,) * levels if config.attention_head_dim is None else config.attention_head_dim
    return {name: config[name] for name in KEPT} | {
        "down_block_types": (*config.down_block_types[:-1], coarsest),
        "mid_block_type": "UNetMidBlock2D",
        "layers_per_block": (*(layers,) * (levels - 1), layers + 1),
        "attention_head_dim": head_width,
        "cross_attention_dim": cross_attention_dim,
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 1 if cross_attention_dim % POOLING_WIDTH else cross_attention_dim // POOLING_WIDTH,
    }


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
    """Make every layer that has no weight in `known` pass its input through, or add zero; each still gets a gradient."""
    passing = unet.up_blocks[0].resnets[0]
    new = [
        module.to_out[0] for name, module in unet.named_modules() if isinstance(module, Attention) and f"{name}.to_q.weight" not in known
    ]
    for layer in (unet.add_embedding.norm2, passing.conv2, passing.conv_shortcut, *new):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.dirac_(passing.conv_shortcut.weight)


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
    try:
        loaded = kind.from_pretrained(name, revision=revision, use_safetensors=True)
    except OSError as error:
        problem = str(error).splitlines()[0]
        raise InputError(
            f"{name}: not all weights are there as safetensors ({problem}): convert with diffusers' save_pretrained"
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
