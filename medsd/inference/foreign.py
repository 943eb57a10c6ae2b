"""Models that others trained, as the parts of a `MedSDPipeline`: single files, MONAI bundles, and unconditional UNets.

What has no text encoder gets a small one with random weights. An unconditional UNet does not listen to it at first and predicts what it
did before, whatever the prompt; a UNet of ImageNet's classes hears what stands for no class. (A UNet of MONAI's that was trained with
another condition hears something new, and has to learn it.)
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from medsd.errors import InputError
from medsd.models.codec import PixelCodec, codec_of
from medsd.models.conditioning import build_text_encoder, build_tokenizer
from medsd.models.convert import SUFFIXES, is_monai_bundle, is_single_file, load_monai_bundle, load_single_file
from medsd.models.parts import Parts
from medsd.models.presets import BETAS, PRESETS, SD_SCHEDULE
from medsd.models.transplant import is_unconditional, load_unconditional, transplant

TEXT_WIDTH, TEXT_TOKENS = 256, 32
"""Of the text encoder that an unconditional UNet gets: its width, and the longest prompt."""
UNKNOWN_SIDE = 32
"""Of the latents of a model that does not say it; fine-tuning sets it."""


@dataclass(frozen=True)
class ForeignModel:
    """Parts of a pipeline, the record of its codec, and whether prompts mean something to it."""

    parts: dict[str, Any]
    codec: dict[str, Any]
    reads_prompts: bool


def is_foreign(name: str) -> bool:
    """Whether `name` is a local file or folder that `load_foreign` knows; plain Stable Diffusion folders are not foreign."""
    return is_single_file(name) or is_monai_bundle(name) or is_unconditional(name)


def load_foreign(name: str, revision: str | None = None) -> ForeignModel:
    """The model in a local file or folder, or an unconditional one on the Hub; raises InputError where there is no UNet that fits."""
    if is_single_file(name):
        return _assemble(name, load_single_file(name))
    if is_monai_bundle(name):
        return _assemble(name, load_monai_bundle(name))
    unet, vae, scheduler = load_unconditional(name, revision)
    return _assemble(name, Parts(unet=unet, vae=vae, scheduler=None if scheduler is None else _sampler(scheduler, unet, vae is not None)))


def _assemble(name: str, found: Parts) -> ForeignModel:
    if found.unet is None:
        raise InputError(f"{name} holds an autoencoder and no UNet: name it with --vae, or as the start of recipes/finetune_vae.py")
    unet = transplant(found.unet, TEXT_WIDTH) if isinstance(found.unet, UNet2DModel) else found.unet
    if unet.config.num_class_embeds is not None:
        raise InputError(f"{name}: this UNet takes class numbers beside a condition, which no prompt gives: start from another model")
    if unet.config.sample_size is None:
        unet.register_to_config(sample_size=UNKNOWN_SIDE)
    text_encoder, tokenizer = found.text_encoder, found.tokenizer
    if text_encoder is None:
        if found.class_embedding is not None:
            warnings.warn(
                f"{name}: the last of its {len(found.class_embedding)} classes is taken for no class, as in latent diffusion of ImageNet",
                stacklevel=2,
            )
        text_encoder, tokenizer = _first_text_encoder(unet.config.cross_attention_dim, found.class_embedding)
    parts = {"vae": found.vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet}
    parts["scheduler"] = found.scheduler or _assumed_schedule(name)
    codec = PixelCodec(unet.config.in_channels, 1, 0.0, 1.0) if found.vae is None else codec_of(found.vae, found.vae.config.in_channels)
    return ForeignModel(parts, codec.to_dict(), reads_prompts=found.text_encoder is not None)


def _first_text_encoder(width: int, class_embedding: torch.Tensor | None) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """A small text encoder; of a table `(classes, dim)`, it says the last row, which stands for no class, whatever the prompt."""
    if width % PRESETS["small"].text_heads:
        raise InputError(f"a condition of width {width} is too narrow for a text encoder: start from an unconditional model")
    tokenizer = build_tokenizer([], TEXT_TOKENS)
    encoder = build_text_encoder(replace(PRESETS["small"], text_width=width), tokenizer)
    if class_embedding is not None:
        with torch.no_grad():
            _last_norm(encoder).weight.zero_()
            _last_norm(encoder).bias.copy_(class_embedding[-1])
    return encoder, tokenizer


def renewed_text_encoder(before: CLIPTextModel, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small text encoder with random weights for the words of `tokenizer`, whose last layer is that of the one before."""
    encoder = build_text_encoder(replace(PRESETS["small"], text_width=before.config.hidden_size), tokenizer)
    _last_norm(encoder).load_state_dict(_last_norm(before).state_dict())
    return encoder


def _last_norm(encoder: CLIPTextModel) -> torch.nn.LayerNorm:
    """In transformers before 5.6 it lies one level deeper."""
    return getattr(encoder, "text_model", encoder).final_layer_norm


def _assumed_schedule(name: str) -> DDIMScheduler:
    """DDPM's noise schedule (Ho et al., 2020), for a model that does not say on which it was trained."""
    warnings.warn(
        f"{name} does not say its noise schedule: DDPM's linear one and the prediction of noise are assumed; "
        "--beta_schedule and --prediction_type change them",
        stacklevel=2,
    )
    return DDIMScheduler(**SD_SCHEDULE | BETAS["linear"] | {"beta_schedule": "linear", "prediction_type": "epsilon"})


def _sampler(scheduler: Any, unet: Any, latent: bool) -> DDIMScheduler | DDPMScheduler:
    """A scheduler with the noise schedule of another one; that of latents clips nothing, as Stable Diffusion's does not."""
    if unet.config.out_channels == 2 * unet.config.in_channels:
        return DDPMScheduler.from_config(scheduler.config, variance_type="learned_range")
    plain = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False} if latent else {}
    return DDIMScheduler.from_config(scheduler.config, **plain)


def check_local(name: str) -> None:
    """Raise InputError for the name of a checkpoint file that is not there."""
    if Path(name).suffix in SUFFIXES and not Path(name).is_file():
        raise InputError(f"{name}: no such file; name a checkpoint, a pipeline folder or a Hub id")
