"""Codecs: images in `[-1, 1]` <-> latents of unit scale, which the UNet sees.

`PixelCodec` folds blocks of pixels into channels and learns nothing; `KLCodec` is an `AutoencoderKL`. Both have the same
interface, so nothing else asks which one it is.
"""

from typing import Any, Protocol

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from medsd.errors import InputError


class Codec(Protocol):
    """Images `(B, image_channels, H, W)` in `[-1, 1]` <-> latents `(B, latent_channels, H / factor, W / factor)`."""

    image_channels: int
    latent_channels: int
    factor: int

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Latents: a sample of the posterior drawn with `generator`, or its mean without one."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, not clipped."""

    def to_dict(self) -> dict[str, Any]:
        """JSON form for `medsd.json`."""


class PixelCodec:
    """Space-to-depth by `factor`, after subtracting `mean` and dividing by `std` (both of the training images in `[-1, 1]`)."""

    def __init__(self, image_channels: int, factor: int, mean: float, std: float) -> None:
        self.image_channels, self.factor, self.mean, self.std = image_channels, factor, mean, std
        self.latent_channels = image_channels * factor**2

    def encode(self, images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Exact, so `generator` is not used."""
        return pixel_unshuffle((images - self.mean) / self.std, self.factor)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode`."""
        return pixel_shuffle(latents, self.factor) * self.std + self.mean

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "pixels", ...}`."""
        return {"kind": "pixels", "image_channels": self.image_channels, "factor": self.factor, "mean": self.mean, "std": self.std}


class KLCodec:
    """An `AutoencoderKL` and its one scaling factor.

    Images of one channel are repeated for an autoencoder of three, and averaged on the way back.
    """

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

    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "kl", ...}`; the autoencoder itself is a part of the pipeline folder."""
        return {"kind": "kl", "image_channels": self.image_channels}


def build_codec(record: dict[str, Any], vae: Any | None) -> Codec:
    """The codec that `to_dict` recorded."""
    if record["kind"] == "pixels":
        return PixelCodec(record["image_channels"], record["factor"], record["mean"], record["std"])
    if vae is None:
        raise InputError("the pipeline folder has no vae/ although its medsd.json says codec kl: copy the folder again")
    return KLCodec(vae, record["image_channels"])
