"""Codecs: images in `[-1, 1]` <-> latents of unit scale, which the UNet sees.

`PixelCodec` folds blocks of pixels into channels and learns nothing; `KLCodec` is an `AutoencoderKL`, `VQCodec` a `VQModel`. All
have the same interface, so nothing else asks which one it is. *Moments* are what an encoder says of an image, computed once;
latents are drawn from them as often as wanted.
"""

from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, VQModel
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle

from medsd.errors import InputError
from medsd.models.channels import adapt_input
from medsd.randomness import Randomness, normal

ENCODE_BATCH = 16
HIGHEST_LOG_VARIANCE, LOWEST_LOG_VARIANCE = 20.0, -30.0
"""Bounds of a posterior's log-variance, as in diffusers' `DiagonalGaussianDistribution`."""


SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Of an autoencoder's config: what brings its latents to unit scale."""


class Codec(Protocol):
    """Images `(B, image_channels, H, W)` in `[-1, 1]` <-> latents `(B, latent_channels, H / factor, W / factor)`."""

    kind: str
    image_channels: int
    latent_channels: int
    factor: int

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """What latents are drawn from, `(B, m, h, w)` float32; no randomness."""

    def draw(self, moments: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Latents: a sample of the posterior drawn with `draws`, or its mean without one."""

    def encode(self, images: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """`draw(moments(images), draws)`."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images, not clipped."""

    def spread(self, elements: torch.Tensor) -> torch.Tensor:
        """A number for each element of a latent, `(c, h, w)` -> for each pixel, `(H, W)`, with the same sum."""

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

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """The latents themselves: there is one for each image."""
        return pixel_unshuffle((images - self.mean) / self.std, self.factor)

    def draw(self, moments: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Exact, so `draws` is not used."""
        return moments

    def encode(self, images: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Exact, so `draws` is not used."""
        return self.moments(images)

    def check_side(self, resolution: int) -> None:
        """Raise InputError where images of this side cannot be folded."""
        if resolution % self.factor:
            raise InputError(
                f"images of {resolution} px do not divide by {self.factor}: change --pixel_factor or prepare another --resolution"
            )

    def spread(self, elements: torch.Tensor) -> torch.Tensor:
        """A number for each element of a latent, `(c, h, w)` -> for each pixel, `(H, W)`, with the same sum."""
        return pixel_shuffle(elements, self.factor).sum(0)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `encode`."""
        return pixel_shuffle(latents, self.factor) * self.std + self.mean

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "pixels", ...}`."""
        return {"kind": self.kind, "image_channels": self.image_channels, "factor": self.factor, "mean": self.mean, "std": self.std}


class LearnedCodec:
    """What codecs with an autoencoder share.

    Images of one channel are repeated for an autoencoder of three, and averaged on the way back. Latents are brought to unit
    scale by the `latents_mean` and `latents_std` of the autoencoder's config, a number per channel, or by its one `scaling_factor`.
    """

    kind: str
    latent_channels: int

    def __init__(self, vae: Any, image_channels: int) -> None:
        self.vae, self.image_channels = vae, image_channels
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.repeats = vae.config.in_channels // image_channels
        if (vae.config.in_channels, image_channels) != (3, 1) and vae.config.in_channels != image_channels:
            raise InputError(
                f"images of {image_channels} channels do not fit an autoencoder of {vae.config.in_channels}: make it fit with "
                "finetune_vae.py --pretrained_model_name_or_path ... --adapt_channels (or finetune_unet.py, with a pretrained UNet), or "
                f"prepare {'1 or 3' if vae.config.in_channels == 3 else vae.config.in_channels} channels (--windows, --channels)"
            )

    def spread(self, elements: torch.Tensor) -> torch.Tensor:
        """A number for each element of a latent, `(c, h, w)` -> for each pixel, `(H, W)`, bilinearly, with the same sum."""
        return interpolate(elements.sum(0)[None, None], scale_factor=self.factor, mode="bilinear")[0, 0] / self.factor**2

    def encode(self, images: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Latents of unit scale."""
        return self.draw(self.moments(images), draws)

    def draw(self, moments: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Latents of unit scale."""
        raise NotImplementedError

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """What the encoder says."""
        raise NotImplementedError

    def repeated(self, images: torch.Tensor) -> torch.Tensor:
        """As many channels as the autoencoder takes, in its precision."""
        return images.repeat(1, self.repeats, 1, 1).to(self.vae.dtype)

    def averaged(self, decoded: torch.Tensor) -> torch.Tensor:
        """Inverse of `repeated`."""
        return decoded.unflatten(1, (self.repeats, self.image_channels)).mean(1)

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents -> unit scale, float32."""
        mean, std = self._statistics(latents)
        return ((latents - mean) / std).float()

    def restored(self, latents: torch.Tensor) -> torch.Tensor:
        """Inverse of `normalised`, in the autoencoder's precision."""
        mean, std = self._statistics(latents)
        return (latents * std + mean).to(self.vae.dtype)

    def _statistics(self, like: torch.Tensor) -> tuple[Any, Any]:
        """Mean and standard deviation of the autoencoder's latents: numbers, or `(c, 1, 1)`."""
        config = self.vae.config
        if config.get("latents_mean") is None:
            return config.get("shift_factor") or 0.0, 1 / config.scaling_factor
        return like.new_tensor(config.latents_mean)[:, None, None], like.new_tensor(config.latents_std)[:, None, None]

    def check_side(self, resolution: int) -> None:
        """Raise InputError where images of this side cannot be encoded."""
        if resolution % self.factor:
            raise InputError(f"images of {resolution} px do not divide by the codec's factor {self.factor}: prepare another --resolution")

    def to_dict(self) -> dict[str, Any]:
        """`{"kind": "kl", ...}`; the autoencoder itself is a part of the pipeline folder."""
        return {"kind": self.kind, "image_channels": self.image_channels}


class KLCodec(LearnedCodec):
    """An `AutoencoderKL`: a latent is a sample of a Gaussian posterior. Its moments are mean and log-variance, `(B, 2c, h, w)`."""

    kind = "kl"

    def __init__(self, vae: AutoencoderKL, image_channels: int) -> None:
        super().__init__(vae, image_channels)
        self.latent_channels = vae.config.latent_channels

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and log-variance of the autoencoder's own latents, one behind the other."""
        return self.vae.encode(self.repeated(images)).latent_dist.parameters.float()

    def draw(self, moments: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Latents of unit scale; the noise is drawn on the device of `draws`."""
        mean, log_variance = moments.chunk(2, dim=1)
        if draws is None:
            return self.normalised(mean)
        noise = normal(mean.shape, draws).to(mean.device)
        return self.normalised(mean + log_variance.clamp(LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE).mul(0.5).exp() * noise)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, image_channels, H, W)`."""
        return self.averaged(self.vae.decode(self.restored(latents)).sample)


class VQCodec(LearnedCodec):
    """A `VQModel`: latents are what the encoder says, moved to the nearest codebook entries only when they are decoded.

    So diffusion sees a continuous space, as in Rombach et al. (2022), section 3.2.
    """

    kind = "vq"

    def __init__(self, vae: VQModel, image_channels: int) -> None:
        super().__init__(vae, image_channels)
        self.latent_channels = vae.config.vq_embed_dim or vae.config.latent_channels

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """The autoencoder's latents before quantisation `(B, c, h, w)`."""
        return self.vae.encode(self.repeated(images)).latents.float()

    def draw(self, moments: torch.Tensor, draws: Randomness | None = None) -> torch.Tensor:
        """Latents of unit scale; there is nothing to draw."""
        return self.normalised(moments)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, image_channels, H, W)` of the nearest codebook entries."""
        return self.averaged(self.vae.decode(self.restored(latents)).sample)


def codec_of(vae: Any, image_channels: int) -> LearnedCodec:
    """The codec around an autoencoder; raises InputError where the channels do not fit."""
    return VQCodec(vae, image_channels) if isinstance(vae, VQModel) else KLCodec(vae, image_channels)


def build_codec(record: dict[str, Any], vae: Any | None) -> Codec:
    """The codec that `to_dict` recorded."""
    if record["kind"] == PixelCodec.kind:
        return PixelCodec(record["image_channels"], record["factor"], record["mean"], record["std"])
    if vae is None:
        raise InputError(f"the pipeline folder has no vae/ although its medsd.json says codec {record['kind']}: copy the folder again")
    return codec_of(vae, record["image_channels"])


@torch.no_grad()
def reconstruct(codec: Codec, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Images `(B, C, H, W)` in `[-1, 1]` through the codec on `device` and back, on the CPU, clipped to the range."""
    parts = [codec.decode(codec.encode(part.to(device))).clamp(-1, 1).float().cpu() for part in images.split(ENCODE_BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def latent_statistics(codec: LearnedCodec, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel `(c,)` of the latents that are drawn from images `(B, C, H, W)` in `[-1, 1]`.

    They are exact over the posteriors: the variance of the means plus the mean of the variances.
    """
    device = next(codec.vae.parameters()).device
    moments = torch.cat([codec.moments(part.to(device)).cpu().double() for part in images.split(ENCODE_BATCH)])
    channels = codec.latent_channels
    mean = moments[:, :channels].mean((0, 2, 3))
    variance = moments[:, :channels].var((0, 2, 3), correction=0)
    if moments.shape[1] > channels:
        variance = variance + moments[:, channels:].clamp(LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE).exp().mean((0, 2, 3))
    return mean, variance.sqrt()


def record_statistics(codec: LearnedCodec, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Write the latents' statistics `(c,)` to the autoencoder's config, where `encode` and `decode` read them.

    One `scaling_factor`, the only number that Stable Diffusion's pipeline reads, for an `AutoencoderKL` of one or three channels and
    for a `VQModel`, which knows no other; a mean and a standard deviation per channel for any other.
    """
    overall = ((std**2 + mean**2).mean() - mean.mean() ** 2).sqrt()
    codec.vae.register_to_config(scaling_factor=1 / overall.item())
    if isinstance(codec, KLCodec) and not is_sd_shaped(codec.vae):
        codec.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def is_sd_shaped(vae: Any) -> bool:
    """Whether Stable Diffusion's pipeline in plain diffusers decodes with this autoencoder as we do."""
    own_scale = vae is None or vae.config.get("latents_mean") is not None or vae.config.get("shift_factor")
    return isinstance(vae, AutoencoderKL) and not own_scale and vae.config.in_channels in {1, 3}


def same_latents(one: Any, other: Any) -> bool:
    """Whether two autoencoders have the same encoder, up to channel surgery, so that latents of one mean the same to the other."""
    own, theirs = encoder_weights(one), encoder_weights(other)
    if one.config.in_channels != other.config.in_channels:
        own["encoder.conv_in.weight"] = adapt_input(one.encoder.conv_in, one.config.in_channels, other.config.in_channels, 0).weight.float()
    alike = own.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in own.items())
    return alike and all(one.config.get(name) == other.config.get(name) for name in SCALES)


def encoder_weights(vae: Any) -> dict[str, torch.Tensor]:
    """Weights that make latents, in float32 on the CPU."""
    return {name: value.float().cpu() for name, value in vae.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
