"""Weights of MONAI's two-dimensional `AutoencoderKL` and `DiffusionModelUNet` (1.4 or later, or GenerativeModels) -> diffusers.

The outputs are equal. Where a diffusers block has more layers than its counterpart, the additional ones are identities: all their
weights are zero, so that only their residual path is left. An autoencoder becomes twice as wide, see `_with_linear_exit`.
MONAI itself is not needed.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel

from medsd.errors import InputError
from medsd.models.parts import Model, Weights, build, count, fill, first, shape, strip, tensor
from medsd.models.presets import SAMPLE_SIZE

DEFINITION_KEYS = ("norm_num_groups", "norm_eps", "num_head_channels")
"""Constructor keywords that no shape tells."""
EPS = 1e-6
"""MONAI's default `norm_eps`, and what diffusers' autoencoder and transformers have built in."""
CURVES = {"linear_beta": "linear", "scaled_linear_beta": "scaled_linear"}
"""MONAI's `schedule` -> diffusers' `beta_schedule`."""
OLD_NAMES = (
    (r"(\.blocks\.\d+|\.attentions\.\d+|\.attention)\.(to_[qkv])\.", r"\1.attn.\2."),
    (r"\.proj_attn\.", ".attn.out_proj."),
    (r"\.to_out\.0\.", ".out_proj."),
    (r"(^decoder\.blocks\.\d+|\.upsampler)\.conv\.conv\.", r"\1.postconv.conv."),
)
"""Names of the GenerativeModels package -> MONAI's."""
NEW_NAMES = (
    (r"(nin_shortcut|skip_connection)\.", "conv_shortcut."),
    (r"^postconv\.", "conv."),
    (r"^attn\.out_proj\.", "to_out.0."),
    (r"^attn\.", ""),
    (r"\.out_proj\.", ".to_out.0."),
    (r"\.ff\.linear1\.", ".ff.net.0.proj."),
    (r"\.ff\.linear2\.", ".ff.net.2."),
)
"""Names within a layer of MONAI's -> diffusers'."""
REFUSED = {
    "downsampler.conv1.": "residual down- and upsampling (resblock_updown)",
    ".deconv.": "upsampling by transposed convolutions (use_convtranspose)",
}
KINDS = {"norm1": "r", "norm": "a", "conv": "s", "postconv": "s"}
"""A layer's part that tells an autoencoder's residual block, attention and resampling apart."""
OUTSIDE_LEVELS = {
    "conv_in": "conv_in",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "class_embedding",
    "mid_block.resnets.0": "middle_block.resnet_1",
    "mid_block.attentions.0": "middle_block.attention",
    "mid_block.resnets.1": "middle_block.resnet_2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""diffusers' name of a UNet's module -> MONAI's."""
Moves = dict[str, str]
"""diffusers' name of a module -> MONAI's."""


def plain(weights: Mapping[str, torch.Tensor]) -> Weights:
    """The weights under MONAI's present names, without wrappers' prefixes and without the `conv` of each convolution's wrapper."""
    inner = strip(weights, "module.") or dict(weights)
    result: Weights = {}
    for key, value in inner.items():
        for old, new in OLD_NAMES:
            key = re.sub(old, new, key)
        result[re.sub(r"\.conv\.(weight|bias)$", r".\1", key)] = value
    return result


def is_monai_autoencoder(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether `weights` are those of a MONAI `AutoencoderKL`."""
    return "quant_conv_mu.weight" in plain(weights)


def is_monai_unet(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether `weights` are those of a MONAI `DiffusionModelUNet`."""
    return {"middle_block.resnet_1.norm1.weight", "out.0.weight"} <= plain(weights).keys()


def convert_monai(weights: Weights, definition: Mapping[str, Any] | None) -> AutoencoderKL | UNet2DModel | UNet2DConditionModel:
    """The diffusers model with the same outputs; `definition` holds MONAI's constructor keywords, whose defaults count where it is None.

    A `UNet2DModel` comes of a UNet without conditioning. Raises InputError for what diffusers cannot represent exactly.
    """
    definition, autoencoder = definition or {}, is_monai_autoencoder(weights)
    weights = plain(weights)
    _check_supported(weights)
    weights = _with_plain_attention(weights)
    return _convert_autoencoder(weights, definition) if autoencoder else _convert_unet(weights, definition)


def _check_supported(weights: Weights) -> None:
    dimensions = max(value.ndim for value in weights.values()) - 2
    if dimensions != 2:
        word = {3: "three-dimensional", 1: "one-dimensional"}.get(dimensions, "no convolutional one")
        raise InputError(f"this MONAI network is {word}; only two-dimensional ones can be converted")
    for mark, what in REFUSED.items():
        if any(mark in key for key in weights):
            raise InputError(f"this MONAI network has {what}, which cannot be converted")


def _with_plain_attention(weights: Weights) -> Weights:
    """The same attention with separate queries, keys and values (undoes `use_combined_linear`) and an output layer (`include_fc`)."""
    result: Weights = {}
    for key, value in weights.items():
        if ".qkv." in key:
            result |= {key.replace(".qkv.", f".to_{name}."): piece for name, piece in zip("qkv", value.chunk(3), strict=True)}
        else:
            result[key] = value
    for key in [key for key in result if re.search(r"\.(attn|attn1)\.to_v\.weight$", key)]:
        output = key.replace(".to_v.weight", ".out_proj.")
        if f"{output}weight" not in result and f"{output}bias" not in result:
            width = len(result[key])
            result |= {f"{output}weight": torch.eye(width), f"{output}bias": torch.zeros(width)}
    return result


def _moved(weights: Weights, moves: Moves) -> Weights:
    """The weights under diffusers' names; raises InputError where one has no new name."""
    left, result = dict(weights), {}
    for new, old in moves.items():
        layer = strip(weights, f"{old}.")
        norm = "group_norm." if any(key.startswith("attn.") for key in layer) else "norm."
        for key, value in layer.items():
            result[f"{new}.{_layer_name(key, norm)}"] = value
            del left[f"{old}.{key}"]
    if left:
        raise InputError(f"{first(left)}: unknown weights in a MONAI network. This variant cannot be converted")
    return result


def _layer_name(key: str, norm: str) -> str:
    for old, new in NEW_NAMES:
        key = re.sub(old, new, key)
    return re.sub(r"^norm\.", norm, key)


def _with_identities(weights: Weights, shapes: Weights, added: Iterable[str]) -> Weights:
    """Weights of the `added` modules as well: zero, but for a shortcut, which passes on what is not the skip."""
    prefixes, result = tuple(f"{name}." for name in added), dict(weights)
    for key, value in shapes.items():
        if key.startswith(prefixes):
            result[key] = torch.zeros(value.shape)
            if key.endswith("conv_shortcut.weight"):
                result[key][:, : len(value), 0, 0] = torch.eye(len(value))
    return result


def _groups(channels: Iterable[int], definition: Mapping[str, Any]) -> int:
    """Of the group norms: the definition's, else 32 or the largest power of two below that divides all channels."""
    return definition.get("norm_num_groups", math.gcd(32, *channels))


def _check_eps(definition: Mapping[str, Any]) -> None:
    if definition.get("norm_eps", EPS) != EPS:
        raise InputError(f"norm_eps {definition['norm_eps']} of the MONAI definition: diffusers has {EPS} built in for this network")


@dataclass(frozen=True)
class Level:
    """MONAI's names of the layers of one level of an autoencoder's side."""

    residual: list[str]
    attention: list[str]
    resampling: list[str]


@dataclass(frozen=True)
class Side:
    """Encoder or decoder: the first convolution, the middle (empty or three layers), the levels in order, the last two layers."""

    entrance: str
    middle: list[str]
    levels: list[Level]
    exits: list[str]


def _read_side(weights: Weights, side: str) -> Side:
    names = [f"{side}.blocks.{index}" for index in range(count(weights, f"{side}.blocks."))]
    kinds = "".join(_kind(weights, name) for name in names[1:-2])
    body = names[1:-2]
    if "r" not in kinds or "?" in kinds:
        raise InputError(f"the {side} is not built as MONAI's: its file is not whole, or its kind is not known")
    if side == "encoder" and kinds.endswith("rar"):
        body, kinds, middle = body[:-3], kinds[:-3], body[-3:]
    elif side == "decoder" and kinds.startswith("rarr"):
        body, kinds, middle = body[3:], kinds[3:], body[:3]
    else:
        middle = []
    levels = [[]]
    for name, kind in zip(body, kinds, strict=True):
        levels[-1].append((kind, name))
        if kind == "s":
            levels.append([])
    return Side(
        names[0], middle, [Level(*([name for kind, name in level if kind == wanted] for wanted in "ras")) for level in levels], names[-2:]
    )


def _kind(weights: Weights, name: str) -> str:
    """r: residual block, a: attention, s: resampling."""
    return next((kind for mark, kind in KINDS.items() if f"{name}.{mark}.weight" in weights), "?")


def _side_moves(side: str, read: Side, layers: int, has_middle: bool) -> tuple[Moves, list[str]]:
    """Where everything goes, and the modules that are added: residual blocks up to `layers` a level, and the middle."""
    block, resampler = ("down_blocks", "downsamplers.0") if side == "encoder" else ("up_blocks", "upsamplers.0")
    moves = {f"{side}.conv_in": read.entrance, f"{side}.conv_norm_out": read.exits[0], f"{side}.conv_out": read.exits[1]}
    middle = ["resnets.0", "attentions.0", "resnets.1"]
    moves |= {f"{side}.mid_block.{new}": old for new, old in zip(middle, read.middle, strict=False)}
    added = [] if read.middle else [f"{side}.mid_block.{name}" for name in middle if has_middle or "resnets" in name]
    for index, level in enumerate(read.levels):
        name = f"{side}.{block}.{index}"
        moves |= {f"{name}.resnets.{place}": old for place, old in enumerate(level.residual)}
        moves |= {f"{name}.attentions.{place}": old for place, old in enumerate(level.attention)}
        moves |= {f"{name}.{resampler}": old for old in level.resampling}
        added += [f"{name}.{kind}.{place}" for place in range(len(level.residual), layers) for kind in ("resnets", "attentions")]
    return moves, added


def _convert_autoencoder(weights: Weights, definition: Mapping[str, Any]) -> AutoencoderKL:
    _check_eps(definition)
    encoder, decoder = _read_side(weights, "encoder"), _read_side(weights, "decoder")
    channels = tuple(shape(weights, f"{level.residual[0]}.conv1.weight")[0] for level in encoder.levels)
    kinds = ["Attn" if level.attention else "" for level in encoder.levels]
    layers, has_middle = max(len(level.residual) for level in encoder.levels), bool(encoder.middle or decoder.middle)
    config = {
        "in_channels": shape(weights, f"{encoder.entrance}.weight")[1],
        "out_channels": shape(weights, f"{decoder.exits[1]}.weight")[0],
        "block_out_channels": tuple(2 * width for width in channels),
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "layers_per_block": layers,
        "latent_channels": shape(weights, f"{decoder.entrance}.weight")[1],
        "norm_num_groups": _groups(channels, definition),
        "scaling_factor": 1.0,
        "sample_size": SAMPLE_SIZE,
        "mid_block_add_attention": has_middle,
    }
    weights = _with_moments(weights, encoder.exits[1])
    moves, added = _side_moves("encoder", encoder, layers, has_middle)
    decoder_moves, decoder_added = _side_moves("decoder", decoder, layers + 1, has_middle)
    moves |= decoder_moves | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    make = partial(AutoencoderKL, **config)
    shapes = build(make).state_dict()
    return fill(make, _with_linear_exit(_with_identities(_moved(weights, moves), shapes, [*added, *decoder_added]), shapes))


def _with_linear_exit(weights: Weights, shapes: Weights) -> Weights:
    """Undo the SiLU that diffusers has before the last convolution and MONAI has not.

    All levels are twice as wide as MONAI's and hold every channel twice, side by side, which changes no group norm. The two copies
    reach the SiLU with opposite signs: silu(x) - silu(-x) = x. (Two levels would do, but for diffusers' rule of where a shortcut is.)
    """
    result = {key: _widened(value, shapes.get(key, value).shape) for key, value in weights.items()}
    for key, value in result.items():
        if ".to_q." in key and value.shape != weights[key].shape:
            result[key] = value / math.sqrt(2)
    for side in ("encoder", "decoder"):
        norm, last = f"{side}.conv_norm_out", f"{side}.conv_out.weight"
        signs = torch.tensor([1.0, -1.0]).repeat(len(result[f"{norm}.weight"]) // 2)
        result |= {f"{norm}.{kind}": result[f"{norm}.{kind}"] * signs for kind in ("weight", "bias")}
        result[last] = result[last] * 2 * signs[:, None, None]
    return result


def _widened(value: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Every output and input channel twice along the axes where `size` is twice the value's, the inputs with half their weights."""
    for axis in range(value.ndim):
        if size[axis] == 2 * value.shape[axis]:
            value = value.repeat_interleave(2, axis) / (2 if axis == 1 else 1)
    return value


def _with_moments(weights: Weights, exit_name: str) -> Weights:
    """One `quant_conv` for mean and log-variance, which diffusers computes of 2 c encoder channels: the second half is zero here."""
    result = {key: value for key, value in weights.items() if not key.startswith("quant_conv_")}
    for kind in ("weight", "bias"):
        moments = torch.cat([tensor(weights, f"quant_conv_{name}.{kind}") for name in ("mu", "log_sigma")])
        result[f"quant_conv.{kind}"] = torch.cat([moments, torch.zeros_like(moments)], 1) if kind == "weight" else moments
        last = tensor(weights, f"{exit_name}.{kind}")
        result[f"{exit_name}.{kind}"] = torch.cat([last, torch.zeros_like(last)])
    return result


def _convert_unet(weights: Weights, definition: Mapping[str, Any]) -> UNet2DModel | UNet2DConditionModel:
    levels = count(weights, "down_blocks.")
    channels = tuple(shape(weights, f"down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(levels))
    attends = [any(key.startswith(f"down_blocks.{level}.attentions.") for key in weights) for level in range(levels)]
    context = "middle_block.attention.transformer_blocks.0.attn2.to_k.weight"
    kinds = [("CrossAttn" if context in weights else "Attn") if attending else "" for attending in attends]
    layers = [count(weights, f"down_blocks.{level}.resnets.") for level in range(levels)]
    config = {
        "in_channels": shape(weights, "conv_in.weight")[1],
        "out_channels": shape(weights, "out.2.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": max(layers),
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "norm_num_groups": _groups(channels, definition),
        "num_class_embeds": len(weights["class_embedding.weight"]) if "class_embedding.weight" in weights else None,
    }
    moves, added = _unet_moves(layers)
    widths = _head_widths(channels, [*attends[:-1], True], definition)
    if context not in weights:
        config |= {"attention_head_dim": _common_width(widths), "norm_eps": definition.get("norm_eps", EPS)}
        return _filled_unet(partial(UNet2DModel, **config), weights, moves, added)
    _check_eps(definition)
    config |= {
        "norm_eps": EPS,
        "attention_head_dim": tuple(level // (width or level) for level, width in zip(channels, widths, strict=True)),
        "cross_attention_dim": shape(weights, context)[1],
        "transformer_layers_per_block": count(weights, "middle_block.attention.transformer_blocks."),
    }
    return _filled_unet(partial(UNet2DConditionModel, **config), weights, moves, added)


def _filled_unet(make: Callable[[], Model], weights: Weights, moves: Moves, added: Iterable[str]) -> Model:
    return fill(make, _with_identities(_moved(weights, moves), build(make).state_dict(), added))


def _head_widths(channels: Sequence[int], attends: Sequence[bool], definition: Mapping[str, Any]) -> list[int | None]:
    """Channels of a head at each level; None where it does not attend."""
    given = definition.get("num_head_channels", 8)
    widths = [given] * len(channels) if isinstance(given, int) else list(given)
    used = [(level, width) for level, width, attending in zip(channels, widths, attends, strict=False) if attending]
    if len(widths) != len(channels) or any(width < 1 or level % width for level, width in used):
        raise InputError(
            f"heads of {given} channels do not fit levels of {list(channels)}: state num_head_channels in the bundle's definition"
        )
    return [width if attending else None for width, attending in zip(widths, attends, strict=True)]


def _common_width(widths: Sequence[int | None]) -> int:
    different = {width for width in widths if width is not None}
    if len(different) > 1:
        raise InputError(
            f"attention heads of {sorted(different)} channels at different levels: diffusers' UNet2DModel has one width for all"
        )
    return different.pop()


def _unet_moves(layers: Sequence[int]) -> tuple[Moves, list[str]]:
    """Where everything goes, and the added modules, which bring each of the `layers` of a level up to the largest.

    An added layer of the way down repeats its skip. On the way up the first layer takes the repeated skip, and the added ones stand
    behind it, so that the widths of the first and the last stay as they are.
    """
    moves = dict(OUTSIDE_LEVELS)
    added: list[str] = []
    for level, number in enumerate(layers):
        extra = max(layers) - number
        down, up = f"down_blocks.{level}", f"up_blocks.{len(layers) - 1 - level}"
        moves |= {f"{down}.downsamplers.0.conv": f"{down}.downsampler.op", f"{up}.upsamplers.0.conv": f"{up}.upsampler.postconv"}
        for kind in ("resnets", "attentions"):
            moves |= {f"{down}.{kind}.{place}": f"{down}.{kind}.{place}" for place in range(number)}
            moves |= {f"{up}.{kind}.{place + extra if place else 0}": f"{up}.{kind}.{place}" for place in range(number + 1)}
            added += [f"{down}.{kind}.{number + place}" for place in range(extra)] + [f"{up}.{kind}.{1 + place}" for place in range(extra)]
    return moves, added


def convert_monai_schedule(definition: Mapping[str, Any]) -> DDIMScheduler:
    """The schedule of a MONAI `DDPMScheduler` or `DDIMScheduler` with the keywords `definition`."""
    schedule = definition.get("schedule", "linear_beta")
    if schedule not in CURVES:
        raise InputError(f"the noise schedule {schedule} of the MONAI bundle is not one of {', '.join(CURVES)}")
    return DDIMScheduler(
        num_train_timesteps=definition.get("num_train_timesteps", 1000),
        beta_start=definition.get("beta_start", 1e-4),
        beta_end=definition.get("beta_end", 2e-2),
        beta_schedule=CURVES[schedule],
        prediction_type=definition.get("prediction_type", "epsilon"),
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
