"""Weights in CompVis' names (Rombach et al., 2022) -> diffusers: Stable Diffusion 1.x and 2.x, class-conditional and unconditional ones.

Widths, depths and which levels attend are read off the shapes. What no shape tells, the number of heads and the noise schedule, comes
from the `settings`: CompVis' YAML as a dict, which lies beside the file and may be empty.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel

from medsd.errors import InputError
from medsd.models.clip_vocabulary import END, VOCABULARY_SIZE, clip_tokenizer
from medsd.models.parts import Parts, Weights, count, fill, first, shape, strip

UNET, EMA, FIRST_STAGE, CONDITION = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
CLIP, OPEN_CLIP, CLASS_TABLE = f"{CONDITION}transformer.", f"{CONDITION}model.", f"{CONDITION}embedding.weight"
GROUPS = 32
"""Of every group norm in CompVis' code."""
KL_SCALE = 0.18215
SD_LATENT_SIDE = 64
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
YAML_CURVES = {"linear": "scaled_linear", "sqrt_linear": "linear"}
"""CompVis' `beta_schedule` -> diffusers' name of the same curve."""
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
TEXT_HEAD_WIDTH = 64


def is_ldm(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the keys are those of a whole CompVis model."""
    return any(key.startswith((UNET, f"{EMA}diffusion_model", FIRST_STAGE)) for key in weights)


def is_ldm_vae(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the keys are those of a CompVis autoencoder alone."""
    return "encoder.conv_in.weight" in weights and "encoder.mid.block_1.conv1.weight" in weights


def convert_ldm(weights: Weights, settings: Mapping[str, Any]) -> Parts:
    """The parts of a CompVis model; raises InputError where one is of a kind that diffusers lacks."""
    vae_weights, unet_weights = strip(weights, FIRST_STAGE), strip(weights, UNET) or restore_ema(weights)
    vae = convert_ldm_vae(vae_weights, settings, weights.get("scale_factor")) if vae_weights else None
    unet = convert_unet(unet_weights, settings, CLASS_TABLE in weights) if unet_weights else None
    text_encoder, pad_token = convert_text_encoder(weights)
    return Parts(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(pad_token) if text_encoder is not None else None,
        class_embedding=weights[CLASS_TABLE].float() if CLASS_TABLE in weights else None,
        scheduler=convert_schedule(weights, settings) if unet is not None else None,
    )


def section(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`model.params` of the YAML, or what lies below it; empty where it is not there."""
    found: Any = settings
    for name in ("model", "params", *names):
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def number(params: Mapping[str, Any], name: str, default: float) -> float:
    """A number of the YAML, which may be written as 1e-4, a text to YAML."""
    try:
        return float(params.get(name, default))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} of the YAML beside the checkpoint is {params[name]!r}: expected a number") from error


def restore_ema(weights: Mapping[str, torch.Tensor]) -> Weights:
    """The UNet's averaged weights; CompVis' `LitEma` stores them under names that have lost their dots."""
    flat = strip(weights, f"{EMA}diffusion_model")
    return {_dotted(key): value for key, value in flat.items()}


def _dotted(flat: str) -> str:
    blocks = re.sub(r"(put_blocks)(\d+)(\d)", r"\1.\2.\3.", flat)
    words = r"(input_blocks|output_blocks|middle_block|time_embed|label_emb|transformer_blocks|(?:in|out|emb)_layers|skip_connection"
    words += r"|proj_in|proj_out|proj|attn[12]|norm[123]|norm|to_[qkv]|to_out|ff|net|op|conv|qkv|out|weight|bias|\d+)"
    middle = re.sub(r"^middle_block(\d)", r"middle_block.\1.", blocks)
    return ".".join(part for chunk in middle.split(".") for part in re.split(words, chunk) if part)


def unet_levels(weights: Mapping[str, torch.Tensor]) -> tuple[list[int], list[bool], int]:
    """Channels of each level, whether it attends, and residual blocks of a level (the same for all)."""
    channels: list[int] = []
    attends: list[bool] = []
    blocks, starts = 0, True
    for index in range(1, count(weights, "input_blocks.")):
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in weights:
            starts = True
            continue
        if f"{block}0.in_layers.2.weight" not in weights:
            raise InputError(f"the UNet's {block}0 is neither CompVis' residual block nor its downsampling convolution: not supported")
        if starts:
            channels.append(len(weights[f"{block}0.in_layers.2.weight"]))
            attends.append(any(key.startswith(f"{block}1.") for key in weights))
        starts, blocks = False, blocks + 1
    if not channels:
        raise InputError(f"the UNet has no input_blocks of CompVis' kind: its keys are {first(weights)}")
    return channels, attends, blocks // len(channels)


def convert_unet(weights: Weights, settings: Mapping[str, Any], has_class_table: bool) -> UNet2DConditionModel | UNet2DModel:
    """The UNet; `weights` without their prefix. One without transformer blocks becomes a `UNet2DModel`."""
    channels, attends, layers = unet_levels(weights)
    config = {
        "sample_size": int(number(section(settings), "image_size", SD_LATENT_SIDE)),
        "in_channels": shape(weights, "input_blocks.0.0.weight")[1],
        "out_channels": shape(weights, "out.2.weight")[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "num_class_embeds": len(weights["label_emb.weight"]) if "label_emb.weight" in weights else None,
        "norm_num_groups": GROUPS,
    }
    named = convert_ldm_unet_checkpoint({f"{UNET}{key}": value for key, value in weights.items()}, config)
    _check_nothing_lost(weights, named)
    options = section(settings, "unet_config", "params")
    attending = [width for width, chosen in zip(channels, attends, strict=True) if chosen] + channels[-1:]
    if any(".transformer_blocks." in key for key in weights):
        config |= _transformer_config(weights) | _block_types("CrossAttn", attends)
        config["attention_head_dim"] = _heads(channels, attending, config["use_linear_projection"], has_class_table, options)
        return fill(lambda: UNet2DConditionModel(**config), named)
    config |= _block_types("Attn", attends) | {"attention_head_dim": _head_width(attending, options)}
    return fill(lambda: UNet2DModel(**config), _split_attention(named, config["attention_head_dim"], options))


def _check_nothing_lost(weights: Weights, named: Weights) -> None:
    taken = {value.data_ptr() for value in named.values()}
    if lost := [key for key, value in weights.items() if value.data_ptr() not in taken]:
        raise InputError(f"{first(lost)}: diffusers has no place for these weights. This variant cannot be converted")


def _block_types(kind: str, attends: Sequence[bool]) -> dict[str, tuple[str, ...]]:
    kinds = [kind if attending else "" for attending in attends]
    down = tuple(f"{name}DownBlock2D" for name in kinds)
    return {"down_block_types": down, "up_block_types": tuple(f"{name}UpBlock2D" for name in reversed(kinds))}


def _transformer_config(weights: Weights) -> dict[str, Any]:
    return {
        "cross_attention_dim": shape(weights, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1],
        "use_linear_projection": len(shape(weights, "middle_block.1.proj_in.weight")) == 2,
        "transformer_layers_per_block": count(weights, "middle_block.1.transformer_blocks."),
    }


def _given(options: Mapping[str, Any], name: str) -> int | None:
    """A whole number of the YAML, where CompVis writes -1 for "not given"."""
    value = options.get(name, -1)
    if not isinstance(value, int) or value == 0:
        raise InputError(f"{name} of the YAML beside the checkpoint is {value!r}: expected a whole number")
    return value if value > 0 else None


def _heads(
    channels: Sequence[int], attending: Sequence[int], linear: bool, has_class_table: bool, options: Mapping[str, Any]
) -> int | tuple[int, ...]:
    """Heads of all levels, or of each: the YAML's, else of 64 channels (SD 2.x), one (class-conditional) or eight (SD 1.x)."""
    heads, width = _given(options, "num_heads"), _given(options, "num_head_channels")
    if heads is None and width is None:
        heads, width = (None, TEXT_HEAD_WIDTH) if linear else (1 if has_class_table else 8, None)
    _check_divide(attending, width or heads)
    return heads if width is None else tuple(max(1, level // width) for level in channels)


def _head_width(attending: Sequence[int], options: Mapping[str, Any]) -> int | None:
    """Channels of a head of a `UNet2DModel`: the YAML's, else 32; None for a single head."""
    heads, width = _given(options, "num_heads"), _given(options, "num_head_channels")
    if heads == 1 and width is None:
        return None
    widths = {level // heads for level in attending} if heads and width is None else {width or 32}
    if len(widths) > 1:
        raise InputError(f"{heads} heads on levels of {sorted(set(attending))} channels: diffusers' UNet2DModel has one head width for all")
    _check_divide(attending, *widths)
    return widths.pop()


def _check_divide(channels: Sequence[int], by: int) -> None:
    if any(level % by for level in channels):
        raise InputError(
            f"levels of {sorted(set(channels))} channels do not divide by {by}, from which the attention heads follow: put CompVis' YAML "
            "with num_heads or num_head_channels beside the checkpoint, under its name with .yaml"
        )


def _split_attention(named: Weights, width: int | None, options: Mapping[str, Any]) -> Weights:
    """Rename plain attention blocks, whose queries, keys and values are one convolution `(3 C, C, 1)`."""
    result: Weights = {}
    for key, value in named.items():
        block, _, last = key.rpartition(".attentions.")
        value = value.squeeze(-1) if block and value.ndim == 3 else value
        if ".qkv." in last:
            for name, piece in zip("qkv", _split_heads(value, width, options), strict=True):
                result[key.replace(".qkv.", f".to_{name}.")] = piece
        elif block:
            result[key.replace(".norm.", ".group_norm.").replace(".proj_out.", ".to_out.0.")] = value
        else:
            result[key] = value
    return result


def _split_heads(value: torch.Tensor, width: int | None, options: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    """Queries, keys, values of `(3 C, ...)`: head by head, unless the YAML says `use_new_attention_order`."""
    total = len(value) // 3
    if options.get("use_new_attention_order", False):
        return value.chunk(3)
    heads = value.unflatten(0, (total // (width or total), 3, width or total))
    return [heads[:, index].flatten(0, 1) for index in range(3)]


def convert_ldm_vae(weights: Weights, settings: Mapping[str, Any], scale: torch.Tensor | None = None) -> AutoencoderKL | VQModel:
    """The first stage; `weights` without their prefix, `scale` the checkpoint's own factor of the latents.

    Without one the YAML's `scale_factor` counts, else Stable Diffusion's 0.18215, for a VQ model 1.
    """
    weights = {key: value for key, value in weights.items() if key.startswith(("encoder.", "decoder.", "quant_", "post_", "quantize."))}
    levels = count(weights, "encoder.down.")
    attends = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(levels)]
    kinds = ["Attn" if attending else "" for attending in attends]
    config = {
        "in_channels": shape(weights, "encoder.conv_in.weight")[1],
        "out_channels": shape(weights, "decoder.conv_out.weight")[0],
        "block_out_channels": tuple(shape(weights, f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)),
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "layers_per_block": count(weights, "encoder.down.0.block."),
        "latent_channels": shape(weights, "decoder.conv_in.weight")[1],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "norm_num_groups": GROUPS,
        "sample_size": int(number(section(settings), "image_size", SD_LATENT_SIDE)) * 2 ** (levels - 1),
    }
    named = {_level_attention(key, levels): value for key, value in convert_ldm_vae_checkpoint(weights, config).items()}
    named = {key: value[:, :, 0, 0] if ".attentions." in key and value.ndim == 4 else value for key, value in named.items()}
    if "quantize.embedding.weight" in weights:
        named["quantize.embedding.weight"] = weights["quantize.embedding.weight"]
        entries, width = shape(weights, "quantize.embedding.weight")
        config |= {"num_vq_embeddings": entries, "vq_embed_dim": width, "scaling_factor": _scale(settings, scale, 1.0)}
        return _filled_vae(VQModel, config, weights, named)
    default = 1.0 if section(settings, "first_stage_config") else KL_SCALE
    config |= {"scaling_factor": _scale(settings, scale, default), "use_quant_conv": "quant_conv.weight" in weights}
    return _filled_vae(AutoencoderKL, config | {"use_post_quant_conv": "post_quant_conv.weight" in weights}, weights, named)


def _filled_vae(model: type, config: dict[str, Any], weights: Weights, named: Weights) -> AutoencoderKL | VQModel:
    _check_nothing_lost(weights, named)
    return fill(lambda: model(**config), named)


def _level_attention(key: str, levels: int) -> str:
    """diffusers' name of a level's attention, which its own converter leaves alone; CompVis counts decoder levels backwards."""
    found = re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(\w+)\.(\w+)", key)
    if not found:
        return key
    side, level, index, layer, kind = found.groups()
    level = int(level) if side == "encoder.down" else levels - 1 - int(level)
    layer = {"norm": "group_norm", "proj_out": "to_out.0"}.get(layer, f"to_{layer}")
    return f"{side}_blocks.{level}.attentions.{index}.{layer}.{kind}"


def _scale(settings: Mapping[str, Any], scale: torch.Tensor | None, default: float) -> float:
    return number(section(settings), "scale_factor", default) if scale is None else scale.item()


def convert_text_encoder(weights: Weights) -> tuple[CLIPTextModel | None, str]:
    """The text encoder and the token that its prompts are padded with; None without one, or where a class table stands in its place."""
    keys = [key for key in weights if key.startswith(CONDITION)]
    if not keys or CLASS_TABLE in weights:
        return None, END
    if any(key.startswith(f"{OPEN_CLIP}transformer.resblocks.") for key in keys):
        return _convert_open_clip(strip(weights, OPEN_CLIP)), "!"
    if any(key.startswith((f"{CLIP}text_model.", f"{CLIP}encoder.layers.")) for key in keys):
        return _convert_clip(strip(convert_ldm_clip_checkpoint(weights), "text_model.") or convert_ldm_clip_checkpoint(weights)), END
    raise InputError(f"the text encoder is not CLIP (its keys are {first(keys)}): only CLIP and open_clip can be converted")


def _convert_clip(named: Weights) -> CLIPTextModel:
    return _fill_text_encoder({key: value for key, value in named.items() if not key.endswith("position_ids")}, "quick_gelu")


def _convert_open_clip(weights: Weights) -> CLIPTextModel:
    """Stable Diffusion 2.x reads the last layer but one, so the last is left away."""
    last = f"transformer.resblocks.{count(weights, 'transformer.resblocks.') - 1}."
    kept = {key: value for key, value in weights.items() if not key.startswith(last) and key != "text_projection"}
    config = SimpleNamespace(hidden_size=shape(weights, "token_embedding.weight")[1])
    named = convert_open_clip_checkpoint(SimpleNamespace(config=config), kept, prefix="")
    return _fill_text_encoder(strip(named, "text_model."), "gelu")


def _fill_text_encoder(named: Weights, activation: str) -> CLIPTextModel:
    """`named` without `text_model.`, which transformers' versions before 5.6 put before every key."""
    vocabulary, width = shape(named, "embeddings.token_embedding.weight")
    if vocabulary != VOCABULARY_SIZE or width % TEXT_HEAD_WIDTH:
        raise InputError(f"a text encoder of {vocabulary} words and {width} channels is not CLIP's, whose vocabulary is {VOCABULARY_SIZE}")
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shape(named, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=count(named, "encoder.layers."),
        num_attention_heads=width // TEXT_HEAD_WIDTH,
        max_position_embeddings=shape(named, "embeddings.position_embedding.weight")[0],
        hidden_act=activation,
        bos_token_id=VOCABULARY_SIZE - 2,
        eos_token_id=VOCABULARY_SIZE - 1,
    )
    with init_empty_weights():
        prefix = "text_model." if hasattr(CLIPTextModel(config), "text_model") else ""
    return fill(lambda: CLIPTextModel(config), {f"{prefix}{key}": value for key, value in named.items()})


def convert_schedule(weights: Weights, settings: Mapping[str, Any]) -> DDIMScheduler:
    """The noise schedule: from the checkpoint's own table, else from the YAML, else Stable Diffusion's."""
    params = section(settings)
    prediction = PREDICTIONS.get(params.get("parameterization", "eps"))
    if prediction is None:
        raise InputError(f"parameterization {params['parameterization']!r} of the YAML is not one of {', '.join(PREDICTIONS)}")
    if "parameterization" not in params and any(key.startswith(OPEN_CLIP) for key in weights):
        warnings.warn(
            "Stable Diffusion 2 in one file does not say what it predicts, and noise is assumed: for a 768 px model put its YAML beside it "
            "or give --prediction_type v_prediction",
            stacklevel=2,
        )
    curve = _table_curve(weights) or _yaml_curve(params) or SD_BETAS
    return DDIMScheduler(**curve, steps_offset=1, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction)


def _table_curve(weights: Weights) -> dict[str, Any] | None:
    """The curve of `betas` or `alphas_cumprod` `(steps,)`; None without such a table, or where half precision has spoilt it."""
    table = weights.get("betas", weights.get("alphas_cumprod"))
    if table is None or table.dtype not in (torch.float32, torch.float64):
        return None
    table = table.double()
    betas = table if "betas" in weights else 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    return name_curve(betas) | {"num_train_timesteps": len(betas)}


def name_curve(betas: torch.Tensor) -> dict[str, Any]:
    """diffusers' keywords for `betas` `(steps,)`: a named curve with its ends where one fits within 0.1 %, else the table itself."""
    start, end = (float(f"{betas[index].item():.4g}") for index in (0, -1))
    straight = torch.linspace(0, 1, len(betas), dtype=betas.dtype)
    curves = {"scaled_linear": (start**0.5 + (end**0.5 - start**0.5) * straight) ** 2, "linear": start + (end - start) * straight}
    for name, curve in curves.items():
        if torch.allclose(curve, betas, rtol=1e-3, atol=0):
            return {"beta_start": start, "beta_end": end, "beta_schedule": name}
    return {"trained_betas": betas.tolist()}


def _yaml_curve(params: Mapping[str, Any]) -> dict[str, Any] | None:
    if "linear_start" not in params and "timesteps" not in params:
        return None
    schedule = params.get("beta_schedule", "linear")
    if schedule not in YAML_CURVES:
        raise InputError(f"beta_schedule {schedule!r} of the YAML is not one of {', '.join(YAML_CURVES)}")
    return {
        "beta_start": number(params, "linear_start", 1e-4),
        "beta_end": number(params, "linear_end", 2e-2),
        "beta_schedule": YAML_CURVES[schedule],
        "num_train_timesteps": int(number(params, "timesteps", 1000)),
    }
