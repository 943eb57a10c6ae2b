"""Codecs: images in `[-1, 1]` <-> latents of unit scale, which the UNet sees.

`PixelCodec` folds blocks of pixels into channels and learns nothing; `KLCodec` is an `AutoencoderKL`. Both have the same
interface, so nothing else asks which one it is.
"""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from medsd.errors import InputError
from medsd.models.presets import Preset


class Codec(Protocol):
    """Images `(B, image_channels, H, W)` in `[-1, 1]` <-> latents `(B, latent_channels, H / factor, W / factor)`."""

    kind: str
    image_channels: int
    latent_channels: int
    factor: int

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents: a sample of the posterior drawn with `generator`, or its mean without one."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, not clipped."""

    def check_side(self, resolution: int) -> None:
        """Raise InputError where images of this side do not fit."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form for `medsd.json`."""


class PixelCodec:
    """Space-to-depth by `factor`, after subtracting `mean` and dividing by `std` (both of the training images in `[-1, 1]`)."""

    kind = "pixels"

    def __init__(self, image_channels: int, factor: int, mean: float, std: float) -> None:
        self.image_channels, self.factor, self.mean, self.std = image_channels, factor, mean, std
        self.latent_channels = image_channels * factor**2

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Exact, so `generator` is not used."""
        return pixel_unshuffle((images - self.mean) / self.std, self.factor)

    def check_side(self, resolution: int) -> None:
        """Raise InputError where images of this side cannot be folded."""
        if resolution % self.factor:
            raise InputError(
                f"images of {resolution} px do not divide by {self.factor}: change --pixel_factor or prepare another --resolution"
            )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode`."""
        return pixel_shuffle(latents, self.factor) * self.std + self.mean

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "pixels", ...}`."""
        return {"kind": self.kind, "image_channels": self.image_channels, "factor": self.factor, "mean": self.mean, "std": self.std}


class KLCodec:
    """An `AutoencoderKL` and its one scaling factor.

    Images of one channel are repeated for an autoencoder of three, and averaged on the way back.
    """

    kind = "kl"

    def __init__(self, vae: Any, image_channels: int) -> None:
        self.vae, self.image_channels = vae, image_channels
        self.latent_channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.repeats = vae.config.in_channels // image_channels
        if self.repeats * image_channels != vae.config.in_channels or (self.repeats > 1 and image_channels != 1):
            raise InputError(
                f"images of {image_channels} channels do not fit an autoencoder of {vae.config.in_channels}: prepare one or "
                f"{vae.config.in_channels} channels (--windows), or train in pixels (--preset tiny --codec pixels)"
            )

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents times `scaling_factor`."""
        posterior = self.vae.encode(images.repeat(1, self.repeats, 1, 1).to(self.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return ((latents - self._shift()) * self.vae.config.scaling_factor).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, image_channels, H, W)`."""
        decoded = self.vae.decode((latents / self.vae.config.scaling_factor + self._shift()).to(self.vae.dtype)).sample
        return decoded.unflatten(1, (self.repeats, self.image_channels)).mean(1)

    def check_side(self, resolution: int) -> None:
        """Raise InputError where images of this side cannot be encoded."""
        if resolution % self.factor:
            raise InputError(f"images of {resolution} px do not divide by the codec's factor {self.factor}: prepare another --resolution")

    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "kl", ...}`; the autoencoder itself is a part of the pipeline folder."""
        return {"kind": self.kind, "image_channels": self.image_channels}


class Autoencoding(torch.nn.Module):
    """One pass through a `KLCodec`'s autoencoder, as training needs it (a module, so that it can be distributed)."""

    def __init__(self, codec: KLCodec) -> None:
        super().__init__()
        self.vae, self.repeats, self.image_channels = codec.vae, codec.repeats, codec.image_channels

    def forward(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images `(B, C, H, W)` in `[-1, 1]` -> reconstruction `(B, C, H, W)`, posterior mean and log-variance `(B, c, h, w)`."""
        posterior = self.vae.encode(images.repeat(1, self.repeats, 1, 1)).latent_dist
        decoded = self.vae.decode(posterior.sample(generator)).sample
        return decoded.unflatten(1, (self.repeats, self.image_channels)).mean(1), posterior.mean, posterior.logvar


def build_vae(preset: Preset, channels: int) -> AutoencoderKL:
    """An `AutoencoderKL` with random weights for images of `channels`."""
    levels = len(preset.vae_channels)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=preset.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=preset.layers_per_block,
        latent_channels=4,
    )


def load_vae(name: str) -> AutoencoderKL:
    """An `AutoencoderKL` from its own folder or Hub id, or from a pipeline folder's `vae/`; safetensors only."""
    problem = ""
    for subfolder in ("vae", None):
        try:
            return AutoencoderKL.from_pretrained(name, subfolder=subfolder, use_safetensors=True)
        except OSError as error:
            problem = str(error).splitlines()[0]
    raise InputError(f"{name}: no AutoencoderKL with safetensors weights there ({problem})")


@torch.no_grad()
def reconstruct(codec: KLCodec, images: torch.Tensor) -> torch.Tensor:
    """Images `(B, C, H, W)` in `[-1, 1]` through the codec and back, on the CPU, clipped to the range."""
    return codec.decode(codec.encode(images.to(codec.vae.device))).clamp(-1, 1).float().cpu()


@torch.no_grad()
def measure_scaling_factor(codec: KLCodec, images: torch.Tensor) -> float:
    """1 / standard deviation of the unscaled latents of images `(B, C, H, W)` in `[-1, 1]`."""
    latents = torch.cat([codec.encode(part.to(codec.vae.device)) for part in images.split(16)])
    return codec.vae.config.scaling_factor / latents.std().item()


def build_codec(record: dict[str, Any], vae: Any | None) -> Codec:
    """The codec that `to_dict` recorded."""
    if record["kind"] == PixelCodec.kind:
        return PixelCodec(record["image_channels"], record["factor"], record["mean"], record["std"])
    if vae is None:
        raise InputError("the pipeline folder has no vae/ although its medsd.json says codec kl: copy the folder again")
    return KLCodec(vae, record["image_channels"])
