"""What fine-tuning changes about a `MedSDPipeline` before it trains: data, words, channels, autoencoder, noise schedule, base."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler

from medsd.data.dataset import DataInfo
from medsd.data.hypotheses import Hypotheses
from medsd.data.intensity import label_channels
from medsd.data.prompts import class_words
from medsd.errors import InputError
from medsd.inference import folder as folders
from medsd.inference.foreign import renewed_text_encoder
from medsd.inference.pipeline import MedSDPipeline, preset_tokenizer
from medsd.models.channels import adapt_unet, adapt_vae
from medsd.models.codec import build_codec, codec_of
from medsd.models.conditioning import add_class_tokens, adopt_words, tokenize
from medsd.models.presets import BETAS, SD_SCHEDULE
from medsd.models.unet import check_side


def adopt(pipe: MedSDPipeline, data: DataInfo, hypotheses: Hypotheses | None = None) -> None:
    """Take over a data set: its classes as tokens and prompts, what its training images show, its intensity map and its resolution.

    Raises InputError where channels, resolution or prompts do not fit the model.
    """
    codec = build_codec(pipe.info.codec | {"image_channels": data.channels}, pipe.vae)
    if codec.latent_channels != pipe.unet.config.in_channels and pipe.vae is not None:
        raise InputError(
            f"the autoencoder makes latents of {codec.latent_channels} channels, this UNet takes {pipe.unet.config.in_channels}: take "
            "another --vae, or start from a --preset"
        )
    if codec.latent_channels != pipe.unet.config.in_channels:
        raise InputError(
            f"images of {data.channels} channels make latents of {codec.latent_channels}, this UNet takes "
            f"{pipe.unet.config.in_channels}: add --adapt_channels, start from a --preset, or prepare the channels it was trained on"
        )
    codec.check_side(data.resolution)
    check_side(data.resolution // codec.factor, len(pipe.unet.config.block_out_channels))
    add_class_tokens(pipe.tokenizer, pipe.text_encoder, {token: class_words(token) for token in data.class_tokens})
    tokenize(pipe.tokenizer, data.prompts or [""])
    pipe.unet.register_to_config(sample_size=data.resolution // codec.factor)
    pipe.info = replace(pipe.info, data=data, codec=codec.to_dict(), hypotheses=hypotheses, calibration=None)


def learn_words(pipe: MedSDPipeline, data: DataInfo, prompts: Sequence[str]) -> None:
    """Give a model that knows no prompts those of `data` and `prompts`, which change no prediction until training tells them apart.

    A foreign model does not hear its text encoder yet, which may therefore say anything; one of ours hears the empty prompt.
    """
    others, most = [prompt for prompt in prompts if prompt not in data.prompts], pipe.tokenizer.model_max_length
    tokenizer = preset_tokenizer(data, others, most)
    if pipe.info.data is None:
        pipe.register_modules(text_encoder=renewed_text_encoder(pipe.text_encoder, tokenizer))
    else:
        adopt_words(pipe.text_encoder, pipe.tokenizer, tokenizer)
    pipe.register_modules(tokenizer=tokenizer)
    add_class_tokens(tokenizer, pipe.text_encoder, {token: class_words(token) for token in data.class_tokens})
    pipe.info = replace(pipe.info, reads_prompts=False)


def adapt_channels(pipe: MedSDPipeline, data: DataInfo) -> None:
    """Make codec (and UNet, in pixels) fit the channels of `data`; see `medsd.models.channels`."""
    labels, codec = label_channels(data.intensity_map, data.image_channels), pipe.codec
    old = codec.image_channels if pipe.vae is None else pipe.vae.config.in_channels
    if old == data.channels:
        return
    if pipe.info.data is not None and label_channels(pipe.info.data.intensity_map, pipe.info.data.image_channels):
        raise InputError("--adapt_channels: this model was trained on masks as channels, which are no images: start from another one")
    if pipe.vae is None:
        adapt_unet(pipe.unet, old, data.channels, labels)
    else:
        adapt_vae(pipe.vae, data.channels, labels)
        pipe.info = replace(pipe.info, own_vae=True)
    pipe.info = replace(pipe.info, codec=codec.to_dict() | {"image_channels": data.channels})


def replace_vae(pipe: MedSDPipeline, vae: Any) -> None:
    """Take another autoencoder; a LoRA folder then holds it, too."""
    if pipe.vae is None:
        latents = {name: SD_SCHEDULE[name] for name in ("clip_sample", "steps_offset", "set_alpha_to_one")}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **latents)
    pipe.register_modules(vae=vae)
    pipe.info = replace(pipe.info, own_vae=True, codec=codec_of(vae, vae.config.in_channels).to_dict())


def change_schedule(pipe: MedSDPipeline, **changes: Any) -> None:
    """Replace settings of the noise schedule (`prediction_type`, `beta_schedule`, `rescale_betas_zero_snr`); None keeps one.

    Raises InputError where the signal is to vanish at the last timestep and noise is predicted, which says nothing there.
    """
    wanted = {name: value for name, value in changes.items() if value is not None}
    wanted |= BETAS.get(wanted.get("beta_schedule"), {})
    if wanted.get("rescale_betas_zero_snr"):
        # Lin et al. (2024), section 3.3: sampling has to begin at the last timestep.
        wanted["timestep_spacing"] = "trailing"
    if "beta_schedule" in wanted:
        wanted["trained_betas"] = None
    if wanted:
        # Other schedulers, such as Stable Diffusion's own PNDM, would leave some of these out without a word.
        kind = DDPMScheduler if pipe.learns_variance else DDIMScheduler
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **wanted)
    if pipe.scheduler.config.get("rescale_betas_zero_snr") and pipe.scheduler.config.prediction_type == "epsilon":
        raise InputError("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: pure noise tells nothing of eps")


def record_base(pipe: MedSDPipeline, base: str, revision: str | None) -> None:
    """Note the model that this pipeline's adapters belong to."""
    pipe.info = replace(pipe.info, base=folders.describe_base(base, revision))
