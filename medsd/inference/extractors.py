"""Extractors: images -> features in which generated and real ones are compared.

Images are `(B, C, H, W)` in `[-1, 1]`, features `(B, D)` float32. An extractor bears a hash of its weights and of whatever else determines
its numbers, so that nobody compares features of different ones (see `medsd.evaluation.features`). The pipeline's own need no download.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d

from medsd.data.dataset import looks_like_hub_id
from medsd.errors import InputError
from medsd.evaluation.features import Features
from medsd.inference.folder import INDEX_FILE
from medsd.inference.pipeline import MedSDPipeline
from medsd.inference.plan import pair_noise
from medsd.models.codec import Codec
from medsd.models.resnet import ResNet
from medsd.models.vision import SUFFIXES, load_network, load_vision_model

LOW_NOISE = 0.1
"""Share of the noise schedule at which the UNet looks at images: high enough to denoise, low enough to see them."""
PLACES, THUMBNAIL = 4, 8
"""Side of a latent, and of an image where the codec is pixels, as `CodecFeatures` sees it."""

Progress = Callable[[int], None]


class Extractor(Protocol):
    """Images `(B, C, H, W)` in `[-1, 1]`, float32 on any device -> features `(B, D)` float32; an image's depend on no other one's."""

    name: str
    sha256: str
    """16 hexadecimal digits."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a batch, on the extractor's device."""


class UNetFeatures:
    """The pipeline's own UNet: its middle block, averaged over places, under the empty prompt at one low noise level.

    Features of a denoiser at little noise tell classes apart about as well as those of networks that were trained to do so (Baranchuk et
    al., ICLR 2022; Xiang et al., ICCV 2023). Every image gets the same noise, which only `seed` determines.
    """

    name = "unet"

    def __init__(self, pipe: MedSDPipeline, seed: int = 0) -> None:
        if pipe.unet.mid_block is None:
            raise InputError("the UNet of this pipeline has no middle block to take features from: give --features codec")
        self.pipe, self.seed = pipe, seed
        self.timestep = int(LOW_NOISE * pipe.noise_schedule.config.num_train_timesteps)
        signal = pipe.noise_schedule.alphas_cumprod[self.timestep].item()
        settings = {"timestep": self.timestep, "signal": signal, "seed": seed, "adapters": _adapters(pipe.unet)}
        empty = {"empty": pipe.tokenizer("", padding="max_length", truncation=True).input_ids}
        parts = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
        self.sha256 = fingerprint(settings | empty | _codec_settings(pipe.codec) | {"unet": _public(pipe.unet.config)}, parts)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, D)`, D the width of the middle block."""
        latents = self.pipe.codec.encode(images.to(self.pipe._execution_device))
        noise = pair_noise(self.seed, 0, tuple(latents.shape[1:])).to(latents)
        timesteps = torch.full((len(latents),), self.timestep, device=latents.device)
        noisy = self.pipe.noise_schedule.add_noise(latents, noise.expand_as(latents), timesteps)
        condition = self.pipe.encode_prompts([""]).expand(len(latents), -1, -1)
        return self._middle(noisy, timesteps, condition).float().mean((2, 3))

    def _middle(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        unet, seen = self.pipe.unet, []
        hook = unet.mid_block.register_forward_hook(lambda block, inputs, output: seen.append(output))
        try:
            unet(noisy.to(unet.dtype), timesteps, condition.to(unet.dtype))
        finally:
            hook.remove()
        return seen[0]


class CodecFeatures:
    """Latents of an autoencoder, averaged to 4 x 4 places; where the codec is pixels, 8 x 8 thumbnails of the images."""

    name = "codec"

    def __init__(self, codec: Codec) -> None:
        self.codec, self.vae = codec, getattr(codec, "vae", None)
        settings = _codec_settings(codec) | {"places": PLACES if self.vae else THUMBNAIL}
        self.sha256 = fingerprint(settings, {"vae": self.vae})

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 16 c)`, c channels of a latent, or `(B, 64 C)`."""
        maps = self.codec.encode(images.to(self.vae.device)) if self.vae else images
        return adaptive_avg_pool2d(maps.float(), PLACES if self.vae else THUMBNAIL).flatten(1)


class ResNetFeatures:
    """A ResNet that was trained on images like these (`medsd.training.discriminative`), averaged over places."""

    def __init__(self, model: ResNet, name: str) -> None:
        self.model, self.name = model.eval(), name
        self.sha256 = fingerprint({"stride": model.stem[0].stride}, {"resnet": model})

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, D)`; channels behind those that it was trained on, which hold masks, are not looked at."""
        seen = images[:, : self.model.stem[0].in_channels]
        return self.model.maps(seen.to(self.model.head.weight)).mean((2, 3))


class ColourFeatures:
    """A network of colour images with a name and settings (`medsd.models.vision`).

    Three channels are red, green and blue. Of any other number each is looked at as a grey image, and their features stand side by side.
    """

    def __init__(self, network: Any, device: torch.device) -> None:
        self.network, self.device, self.name = network.to(device).eval(), device, network.name
        self.sha256 = fingerprint(network.settings, {"network": network})

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, D)`, or `(B, C D)` for C channels, not 3."""
        images = images.to(self.device)
        planes = [images] if images.shape[1] == 3 else [plane.expand(-1, 3, -1, -1) for plane in images.split(1, dim=1)]
        return torch.cat([self.network(plane) for plane in planes], 1).float()


def load_extractor(wanted: str, pipe: MedSDPipeline, device: torch.device) -> Extractor:
    """The extractor that `--features` names.

    Args:
        wanted: `unet` or `codec` of the pipeline; a file with weights of FID's Inception or of a ResNet-50 (RadImageNet, ImageNet); a
            vision model of transformers, as a folder or a Hub id.
        device: where a network of the last two kinds computes; the pipeline's own stay where it is.

    Raises InputError where there is no such network, or its file could run code.
    """
    if wanted in {"unet", "codec"}:
        return UNetFeatures(pipe) if wanted == "unet" else CodecFeatures(pipe.codec)
    path = Path(wanted)
    if (path / INDEX_FILE).is_file():
        raise InputError(f"--features {wanted} is a pipeline folder: `unet` and `codec` are features of --pipeline itself")
    if path.suffix.lower() in SUFFIXES and not path.exists():
        raise InputError(f"--features {wanted}: no such file")
    if not path.exists() and not looks_like_hub_id(wanted):
        raise InputError(f"--features {wanted} is neither unet, codec, a file of weights, the folder of a vision model, nor a Hub id")
    try:
        return ColourFeatures(load_network(path) if path.is_file() else load_vision_model(wanted), device)
    except InputError as error:
        raise InputError(f"--features {error}") from error


def extract(
    extractor: Extractor, images: torch.Tensor | Iterable[torch.Tensor], batch_size: int = 32, progress: Progress = lambda images: None
) -> Features:
    """Features of images `(N, C, H, W)` in `[-1, 1]`, all at once or in batches.

    Args:
        batch_size: images that the extractor sees at once: always so many, the last ones with copies, so that the number and the order of
            the other images change a row by rounding at most.
        progress: called with the number of images of each batch.

    Raises InputError where there is no image, or where features are not finite.
    """
    rows = []
    with _plain_arithmetic():
        for batch in _regrouped([images] if isinstance(images, torch.Tensor) else images, batch_size):
            full = torch.cat([batch, batch[-1:].expand(batch_size - len(batch), -1, -1, -1)])
            rows.append(extractor(full.float())[: len(batch)].float().cpu().numpy())
            progress(len(batch))
    if not rows:
        raise InputError("no image to take features of")
    values = np.concatenate(rows)
    if not np.isfinite(values).all():
        raise InputError(f"features of {extractor.name} are not finite: its weights, or the images, are damaged")
    return Features(values, f"{extractor.name} sha256:{extractor.sha256}")


def _regrouped(batches: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """The same images in batches of `size`, the last one perhaps smaller."""
    kept: torch.Tensor | None = None
    for batch in batches:
        kept = batch if kept is None else torch.cat([kept, batch])
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    if kept is not None and len(kept):
        yield kept


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    """Float32 throughout, whatever surrounds it, and on a GPU the same kernel for the same shape."""
    kernels = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    with kernels, torch.autocast("cpu", enabled=False), torch.autocast(gpu, enabled=False):
        yield


def fingerprint(settings: Mapping[str, Any], parts: Mapping[str, nn.Module | None]) -> str:
    """16 hexadecimal digits of the sha256 over settings (JSON) and every weight."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for part, module in sorted(parts.items()):
        for name, value in sorted(module.state_dict().items()) if module is not None else ():
            if not name.endswith("num_batches_tracked"):
                digest.update(f"{part}.{name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _codec_settings(codec: Codec) -> dict[str, Any]:
    vae = getattr(codec, "vae", None)
    return {"codec": codec.to_dict(), "vae": None if vae is None else _public(vae.config)}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a diffusers config what does not depend on where it was loaded from."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _adapters(unet: Any) -> dict[str, list[Any]]:
    """Rank and alpha of LoRA adapters, which no weight tells."""
    return {name: [config.r, config.lora_alpha] for name, config in getattr(unet, "peft_config", {}).items()}
