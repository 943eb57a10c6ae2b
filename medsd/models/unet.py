"""The UNet: built from a preset, and checked against what it is fed."""

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextModel

from medsd.errors import InputError
from medsd.models.conditioning import WHOLE_TABLE, encode, encode_chosen
from medsd.models.presets import Preset

MOST_CONDITIONS = 1024
"""Prompts whose conditions are kept; of more, those of a batch are computed when they are needed."""


class PromptedUNet(torch.nn.Module):
    """A UNet that is told the numbers of prompts: one module with all that learns.

    A text encoder that does not learn is asked once for all prompts, and what it said is kept.

    Args:
        unet, text_encoder: on their device.
        prompts: token ids `(P, tokens)` on that device.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, prompts: torch.Tensor) -> None:
        super().__init__()
        # Neither is a buffer, which would be sent to every process at every step.
        self.prompts, self.conditions = prompts, None
        self.unet = unet
        if len(prompts) > MOST_CONDITIONS or any(parameter.requires_grad for parameter in text_encoder.parameters()):
            self.text_encoder = text_encoder
        else:
            with torch.no_grad():
                self.conditions = torch.cat([encode(text_encoder, part) for part in prompts.split(WHOLE_TABLE)])

    def forward(self, x_t: torch.Tensor, timesteps: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Prediction `(B, c, h, w)` for x_t `(B, c, h, w)`, timesteps `(B,)` and prompts `chosen` `(B,)`."""
        return self.unet(x_t, timesteps, self.condition(chosen)).sample

    def condition(self, chosen: torch.Tensor) -> torch.Tensor:
        """`(B, tokens, dim)`."""
        if self.conditions is not None:
            return self.conditions[chosen]
        return encode_chosen(self.text_encoder, self.prompts, chosen)


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
