"""What fine-tuning changes about a `MedSDPipeline` before it trains: data, words, channels, autoencoder, noise schedule, base."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler
from transformers import CLIPTokenizer

from medsd.data.dataset import DataInfo
from medsd.data.intensity import label_channels
from medsd.data.prompts import class_words
from medsd.errors import InputError
from medsd.inference import folder as folders
from medsd.inference.folder import PipelineInfo
from medsd.inference.foreign import renewed_text_encoder
from medsd.models.channels import adapt_unet, adapt_vae
from medsd.models.codec import Codec, build_codec, codec_of
from medsd.models.conditioning import (
    add_class_tokens,
    adopt_words,
    build_tokenizer,
    longest,
    plain_words,
    replace_tokens,
    tokenize,
)
from medsd.models.presets import BETAS, SD_SCHEDULE
from medsd.models.unet import check_side


class FineTuningMixin:
    """What a pipeline can be made to fit; it brings its parts."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    info: PipelineInfo
    codec: Codec
    class_names: list[str]

    def adopt(self, data: DataInfo) -> None:
        """Take over a data set: its classes as tokens and prompts, its intensity map and its resolution.

        Raises InputError where channels, resolution or prompts do not fit the model.
        """
        codec = build_codec(self.info.codec | {"image_channels": data.channels}, self.vae)
        if codec.latent_channels != self.unet.config.in_channels:
            raise InputError(
                f"images of {data.channels} channels make latents of {codec.latent_channels}, this UNet takes "
                f"{self.unet.config.in_channels}: add --adapt_channels, start from a --preset, or prepare the channels it was trained on"
            )
        codec.check_side(data.resolution)
        check_side(data.resolution // codec.factor, len(self.unet.config.block_out_channels))
        add_class_tokens(self.tokenizer, self.text_encoder, {token: class_words(token) for token in data.class_tokens})
        tokenize(self.tokenizer, data.prompts or [""])
        self.unet.register_to_config(sample_size=data.resolution // codec.factor)
        self.info = replace(self.info, data=data, codec=codec.to_dict(), calibration=None)

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts mean something to it: not to a model that was trained without classes."""
        return bool(self.class_names) if self.info.data is not None else self.info.reads_prompts

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet also predicts the variance of each denoising step."""
        return self.unet.config.out_channels == 2 * self.unet.config.in_channels

    def learn_words(self, data: DataInfo, prompts: Sequence[str]) -> None:
        """Give a model that knows no prompts those of `data` and `prompts`, which change no prediction until training tells them apart.

        A foreign model does not hear its text encoder yet, which may therefore say anything; one of ours hears the empty prompt.
        """
        others, most = [prompt for prompt in prompts if prompt not in data.prompts], self.tokenizer.model_max_length
        tokenizer = preset_tokenizer(data, others, most)
        if self.info.data is None:
            self.register_modules(text_encoder=renewed_text_encoder(self.text_encoder, tokenizer))
        else:
            adopt_words(self.text_encoder, self.tokenizer, tokenizer)
        self.register_modules(tokenizer=tokenizer)
        add_class_tokens(tokenizer, self.text_encoder, {token: class_words(token) for token in data.class_tokens})
        self.info = replace(self.info, reads_prompts=False)

    def adapt_channels(self, data: DataInfo) -> None:
        """Make codec (and UNet, in pixels) fit the channels of `data`; see `medsd.models.channels`."""
        labels, codec = label_channels(data.intensity_map, data.image_channels), self.codec
        if self.vae is not None and self.vae.config.in_channels != data.channels:
            adapt_vae(self.vae, data.channels, labels)
            self.info = replace(self.info, own_vae=True)
        elif self.vae is None and codec.image_channels != data.channels:
            adapt_unet(self.unet, codec.image_channels, data.channels, labels)
        self.info = replace(self.info, codec=codec.to_dict() | {"image_channels": data.channels})

    def replace_vae(self, vae: Any) -> None:
        """Take another autoencoder; a LoRA folder then holds it, too."""
        if self.vae is None:
            latents = {name: SD_SCHEDULE[name] for name in ("clip_sample", "steps_offset", "set_alpha_to_one")}
            self.scheduler = type(self.scheduler).from_config(self.scheduler.config, **latents)
        self.register_modules(vae=vae)
        self.info = replace(self.info, own_vae=True, codec=codec_of(vae, vae.config.in_channels).to_dict())

    def change_schedule(self, **changes: Any) -> None:
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
            kind = DDPMScheduler if self.learns_variance else DDIMScheduler
            self.scheduler = kind.from_config(self.scheduler.config, **wanted)
        if self.scheduler.config.get("rescale_betas_zero_snr") and self.scheduler.config.prediction_type == "epsilon":
            raise InputError("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: pure noise tells nothing of eps")

    def record_base(self, base: str, revision: str | None) -> None:
        """Note the model that this pipeline's adapters belong to."""
        self.info = replace(self.info, base=folders.describe_base(base, revision))

    def merge_lora(self) -> None:
        """Add the adapters to the UNet's weights, which are whole and trainable then."""
        self.fuse_lora()
        self.unload_lora_weights()
        self.unet.requires_grad_(True)
        self.info = replace(self.info, base=None)


def preset_tokenizer(data: DataInfo, others: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """A tokenizer for the class prompts and `others`, of `max_tokens` or as many as the longest of them needs."""
    words = dict(zip(data.class_tokens, data.class_names, strict=True)) if data.class_tokens else {}
    known = plain_words([replace_tokens(prompt, words) for prompt in others])
    tokenizer = build_tokenizer([*data.with_words().prompts, *known], max_tokens)
    tokenizer.model_max_length = max(max_tokens, longest(tokenizer, [*data.prompts, *others], data.class_tokens))
    return tokenizer
