"""The UNet: built from a preset, and checked against what it is fed."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from medsd.errors import InputError
from medsd.models.presets import Preset


def build_unet(preset: Preset, latent_channels: int, latent_side: int, learned_variance: bool = False) -> UNet2DConditionModel:
    """A UNet with random weights for latents `(B, latent_channels, latent_side, latent_side)`.

    With a learned variance its output has twice as many channels: the prediction, then the variance.
    """
    check_side(latent_side, len(preset.block_out_channels))
    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels * (2 if learned_variance else 1),
        block_out_channels=preset.block_out_channels,
        layers_per_block=preset.layers_per_block,
        down_block_types=tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in preset.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(preset.attention)),
        cross_attention_dim=preset.text_width,
        attention_head_dim=preset.attention_head_dim,
    )


def check_side(latent_side: int, levels: int) -> None:
    """Raise InputError where a latent of this side cannot be halved `levels - 1` times."""
    step = 2 ** (levels - 1)
    if latent_side % step or latent_side < step:
        raise InputError(
            f"latents of {latent_side} x {latent_side} do not fit a UNet of {levels} levels, which needs a multiple of {step}: "
            "prepare the data at another --resolution, or change --pixel_factor"
        )


def enable_xformers(model: torch.nn.Module) -> None:
    """Select xformers' attention kernel in a UNet or an autoencoder; raises InputError where there is none that runs."""
    hint = "leave --enable_xformers_memory_efficient_attention away (torch's own SDPA is used then)"
    if not torch.cuda.is_available():
        raise InputError(f"xformers has no attention kernel for a CPU: {hint}")
    try:
        model.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise InputError(f"xformers does not run here ({error}): install medsd[gpu], or {hint}") from error


def attention_kernel(model: torch.nn.Module) -> str:
    """Name of the attention kernel that a UNet or an autoencoder really uses."""
    names = {type(module.processor).__name__ for module in model.modules() if isinstance(module, Attention)}
    return "xformers" if any("XFormers" in name for name in names) else "torch SDPA"
