"""Sizes of models that start from random weights."""

from dataclasses import dataclass

SAMPLE_SIZE = 512
"""Side of the images above which tiling cuts them, in pixels, for an autoencoder that does not say another."""


@dataclass(frozen=True)
class Preset:
    """Shape of a UNet, of its text encoder, and of an autoencoder."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention: tuple[bool, ...]
    """Whether each level, from fine to coarse, attends to the prompt."""
    attention_head_dim: int
    """As in diffusers' config of Stable Diffusion 1.x, where it is the number of heads."""
    text_width: int
    text_layers: int
    text_heads: int
    text_tokens: int
    """Longest prompt in tokens."""
    vae_channels: tuple[int, ...]
    """Channels of each level of an autoencoder, which halves the image between two levels."""
    latent_channels: int = 4
    """Of an autoencoder."""
    codebook: int = 1024
    """Entries of a VQ autoencoder's codebook."""


PRESETS: dict[str, Preset] = {
    "tiny": Preset((32, 64), 1, (False, True), 4, text_width=64, text_layers=1, text_heads=2, text_tokens=24, vae_channels=(32, 64, 64)),
    "small": Preset(
        (64, 128, 256), 2, (False, True, True), 8, text_width=256, text_layers=2, text_heads=4, text_tokens=32, vae_channels=(64, 128, 128)
    ),
    "sd15": Preset(
        (320, 640, 1280, 1280),
        2,
        (True, True, True, False),
        8,
        text_width=768,
        text_layers=12,
        text_heads=12,
        text_tokens=77,
        vae_channels=(128, 256, 512, 512),
    ),
}

SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "v_prediction",
}
"""Stable Diffusion's noise schedule (2.x predicts v); with another offset plain diffusers would change it on loading."""
BETAS = {"linear": {"beta_start": 1e-4, "beta_end": 0.02}, "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012}}
"""Ends of a noise schedule that is chosen by name: those of Ho et al. (2020) and of Stable Diffusion."""
LEARNED_VARIANCE = {"variance_type": "learned_range"}
"""And the setting of a DDPM scheduler for a UNet that learns its variance."""
