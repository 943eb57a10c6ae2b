"""FLOPs of one forward pass for one image: the UNets of the presets, and Stable Diffusion's encoder. No weight is made (meta tensors).

python benchmarks/flops.py
"""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medsd.models.autoencoders import build_vae
from medsd.models.presets import PRESETS
from medsd.models.unet import build_unet

UNETS = {"tiny": 16, "small": 32, "sd15, 256 px": 32, "sd15, 512 px": 64}
"""Preset -> side of its latents."""


@torch.no_grad()
def flops(forward: Callable[[], object]) -> int:
    """The counter knows the products within plain attention, but not every kernel that stands for them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def unet_flops(name: str, side: int) -> tuple[int, int]:
    """FLOPs and parameters."""
    preset = PRESETS[name.split(",")[0]]
    unet = build_unet(preset, preset.latent_channels, side)
    latents, condition = torch.randn(1, preset.latent_channels, side, side), torch.randn(1, preset.text_tokens, preset.text_width)
    count = flops(lambda: unet(latents, torch.zeros(1, dtype=torch.long), condition))
    return count, sum(value.numel() for value in unet.parameters())


def encoder_flops(vae: AutoencoderKL, side: int) -> tuple[int, int]:
    """FLOPs and parameters."""
    count = flops(lambda: vae.encode(torch.randn(1, vae.config.in_channels, side, side)))
    return count, sum(value.numel() for value in vae.encoder.parameters())


def main() -> None:
    with torch.device("meta"):
        found = {name: unet_flops(name, side) for name, side in UNETS.items()}
        found |= {f"SD's encoder, {side} px": encoder_flops(build_vae(PRESETS["sd15"], 3), side) for side in (256, 512)}
    for name, (count, parameters) in found.items():
        print(f"{name:<24} {count / 1e12:9.5f} TFLOP  {parameters / 1e6:8.1f} M parameters")


if __name__ == "__main__":
    main()
