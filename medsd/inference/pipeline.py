"""`MedSDPipeline`: one diffusion model that generates images by class and scores class likelihoods.

Images are `(C, H, W)` in the source's own unit at the door and `[-1, 1]` inside; the codec decides what the UNet sees.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import CLIPTokenizer

from medsd.data.dataset import DataInfo, looks_like_hub_id
from medsd.data.intensity import Range
from medsd.data.prompts import class_words
from medsd.errors import InputError
from medsd.inference import folder as folders
from medsd.inference.bound import BoundMixin
from medsd.inference.calibrating import CalibratingMixin
from medsd.inference.explaining import ExplainingMixin
from medsd.inference.folder import PipelineInfo
from medsd.inference.foreign import ForeignModel, check_local, is_foreign, load_foreign
from medsd.inference.pictures import picture
from medsd.inference.scoring import ENCODE_BATCH
from medsd.models.autoencoders import load_vae
from medsd.models.codec import Codec, PixelCodec, build_codec, codec_of, is_sd_shaped
from medsd.models.conditioning import (
    add_class_tokens,
    build_text_encoder,
    build_tokenizer,
    encode,
    longest,
    plain_words,
    replace_tokens,
    set_embeddings,
    tokenize,
)
from medsd.models.lora import lora_layers
from medsd.models.presets import LEARNED_VARIANCE, PRESETS, SD_SCHEDULE
from medsd.models.unet import build_unet
from medsd.output import partial_folder

StepCallback = Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, Any]]
"""diffusers' own: called with the pipeline, the number of the step, its timestep and `{"latents": x_t}`, and returns the last."""
FOREIGN_DATA = {"intensity": Range(0.0, 255.0).to_dict(), "resize": "pad", "unit": "grey value", "fingerprint": ""}


class MedSDPipeline(
    CalibratingMixin, ExplainingMixin, BoundMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
):
    """Text encoder, UNet, scheduler and codec, with what `medsd.json` records of classes and intensities.

    Args:
        vae: an `AutoencoderKL`, or None for a pixels codec.
        text_encoder, tokenizer: CLIP; prompts -> condition.
        unet: a `UNet2DConditionModel`.
        scheduler: any diffusers scheduler.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae"]

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.info = PipelineInfo(codec=None if vae is None else codec_of(vae, vae.config.in_channels).to_dict())

    @property
    def codec(self) -> Codec:
        """Images in `[-1, 1]` <-> latents."""
        if self.info.codec is None:
            raise InputError("this pipeline has neither a VAE nor a recorded codec")
        return build_codec(self.info.codec, self.vae)

    @property
    def data(self) -> DataInfo:
        """Classes, prompts, intensity map and geometry; for a foreign folder 8-bit colour without classes."""
        if self.info.data is not None:
            return self.info.data
        side = self.unet.config.sample_size * self.codec.factor
        channels = self.codec.image_channels
        return DataInfo(class_names=[], prompts=[], class_tokens=[], resolution=side, image_channels=channels, **FOREIGN_DATA)

    @property
    def class_names(self) -> list[str]:
        """Classes in the order of every `(N, K)` array."""
        return self.data.class_names

    @property
    def noise_schedule(self) -> DDPMScheduler:
        """The forward process that the model was trained on, whatever scheduler generates."""
        return DDPMScheduler.from_config(self.scheduler.config)

    @property
    def reads_prompts(self) -> bool:
        """Whether prompts mean something to it: not to a model that was trained without classes."""
        return bool(self.class_names) if self.info.data is not None else self.info.reads_prompts

    @property
    def learns_variance(self) -> bool:
        """Whether the UNet also predicts the variance of each denoising step."""
        return self.unet.config.out_channels == 2 * self.unet.config.in_channels

    # Generation

    @torch.no_grad()
    def __call__(
        self,
        class_name: str | None = None,
        prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 30,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput:
        """Generate images of a class, or of prompts.

        Args:
            guidance_scale: classifier-free guidance (Ho & Salimans, 2022); 1 is none.
            latents: start noise `(B, c, h, w)` instead of a draw from `generator`.
            output_type: `pil` 8-bit view; `np` `(B, H, W, C)` in [0, 1]; `pt` `(B, C, H, W)` in [0, 1]; `latent`;
                `source` `(B, C, H, W)` in the source's unit (HU for CT).
            callback_on_step_end: see `StepCallback`; the latents that it returns are denoised further.

        Raises InputError for an unknown class, or neither or both of class and prompt.
        """
        prompts = self._prompts(class_name, prompt)
        condition = self.encode_prompts(prompts).repeat_interleave(num_images_per_prompt, 0)
        shape = (len(condition), self.unet.config.in_channels, *(self.unet.config.sample_size,) * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=condition.dtype)
        latents = latents.to(self._execution_device, condition.dtype)
        latents = self._denoise(latents, condition, num_inference_steps, guidance_scale, generator, callback=callback_on_step_end)
        return ImagePipelineOutput(images=self._finish(latents, output_type))

    def _prompts(self, class_name: str | None, prompt: str | Sequence[str] | None) -> list[str]:
        if class_name is not None and prompt is not None:
            raise InputError("class_name and prompt exclude each other: give one")
        if class_name is not None:
            if class_name not in self.class_names:
                raise InputError(f'unknown class "{class_name}"; this pipeline knows {", ".join(self.class_names) or "none"}')
            return [self.data.prompts[self.class_names.index(class_name)]]
        if prompt is None and self.class_names:
            raise InputError(f"say what to generate: class_name (one of {', '.join(self.class_names)}) or prompt")
        return [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Condition `(B, tokens, dim)`; the empty prompt is the unconditional one."""
        prompts = [self.maybe_convert_prompt(prompt, self.tokenizer) for prompt in prompts]
        return encode(self.text_encoder, tokenize(self.tokenizer, prompts).to(self._execution_device))

    def _denoise(
        self,
        latents: torch.Tensor,
        condition: torch.Tensor,
        steps: int,
        guidance_scale: float,
        generator: Any,
        first: int | None = None,
        callback: StepCallback | None = None,
    ) -> torch.Tensor:
        """From pure noise, or from latents noised to the step numbered `first`."""
        guided = guidance_scale != 1
        if guided:
            empty = self.encode_prompts([""]).expand_as(condition)
            condition = torch.cat([empty, condition])
        if not isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.get("variance_type"):
            self.scheduler.register_to_config(variance_type=None)
        self.scheduler.set_timesteps(steps, device=latents.device)
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        latents = latents * self.scheduler.init_noise_sigma if first is None else latents
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps[first:])):
            doubled = torch.cat([latents, latents]) if guided else latents
            prediction = self.unet(self.scheduler.scale_model_input(doubled, timestep), timestep, condition).sample
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
                prediction[:, latents.shape[1] :] = conditional[:, latents.shape[1] :]  # A variance is not extrapolated.
            if self.learns_variance and not takes_variance(self.scheduler):
                prediction = prediction[:, : latents.shape[1]]
            latents = self.scheduler.step(prediction, timestep, latents, **extra).prev_sample
            if callback is not None:
                latents = callback(self, step, timestep, {"latents": latents}).get("latents", latents)
        return latents

    def _finish(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        unit = torch.cat([self.codec.decode(part) for part in latents.split(ENCODE_BATCH)]).float().clamp(-1, 1).cpu()
        views = {
            "source": lambda: self.data.intensity_map.from_unit(unit).numpy(),
            "pt": lambda: unit / 2 + 0.5,
            "np": lambda: (unit / 2 + 0.5).movedim(1, -1).numpy(),
            "pil": lambda: [picture(image) for image in unit],
        }
        if output_type not in views:
            raise InputError(f'output_type "{output_type}" is none of latent, {", ".join(views)}')
        return views[output_type]()

    # Folders

    @classmethod
    def from_preset(
        cls,
        name: str,
        data: DataInfo,
        vae: Any = None,
        pixel_factor: int = 4,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        prompts: Sequence[str] = (),
        learned_variance: bool = False,
    ) -> "MedSDPipeline":
        """A model with random weights for `data`, in the latents of `vae` or in pixels.

        `pixel_mean` and `pixel_std` are those of the images in `[-1, 1]`. The tokenizer knows the words of the class prompts and
        of `prompts`, and the text encoder reads the longest of them.
        """
        preset = PRESETS[name]
        codec = PixelCodec(data.channels, pixel_factor, pixel_mean, pixel_std) if vae is None else codec_of(vae, data.channels)
        codec.check_side(data.resolution)
        tokenizer = preset_tokenizer(data, [prompt for prompt in prompts if prompt not in data.prompts], preset.text_tokens)
        pipe = cls(
            vae=vae,
            text_encoder=build_text_encoder(preset, tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(preset, codec.latent_channels, data.resolution // codec.factor, learned_variance),
            scheduler=DDPMScheduler.from_config(SD_SCHEDULE | LEARNED_VARIANCE) if learned_variance else DDIMScheduler(**SD_SCHEDULE),
        )
        pipe.info = PipelineInfo(codec=codec.to_dict())
        return pipe

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "MedSDPipeline":
        """A pipeline folder of medsd (LoRA included), a Hub id, or any Stable Diffusion 1.x / 2.x folder or single file; safetensors only.

        Single files, MONAI bundles and unconditional folders (DDPM, DDIM, LDM) are converted: see `medsd.inference.foreign`.
        Raises InputError where the folder or one of its parts is missing.
        """
        name = str(pretrained_model_name_or_path)
        check_local(name)
        local = Path(name).exists() or not looks_like_hub_id(name)
        record = Path(name) if local else folders.download_record(name, options.get("revision"))
        if is_foreign(str(record)):
            return cls._from_foreign(load_foreign(name, options.get("revision")))
        info = folders.read_info(record)
        if info.base is not None:
            return cls._from_lora(record, info, options)
        if local:
            folders.check_folder(record)
            options = {"variant": folders.weights_variant(record)} | options
        pipe = super().from_pretrained(name, use_safetensors=True, **options)
        if options.keys().isdisjoint({"dtype", "torch_dtype"}):
            pipe.text_encoder.float()  # transformers keeps the precision of the files, where diffusers loads float32.
        if info.codec is not None:
            pipe.info = info
        return pipe

    @classmethod
    def _from_foreign(cls, model: ForeignModel) -> "MedSDPipeline":
        pipe = cls(**model.parts)
        pipe.info = PipelineInfo(codec=model.codec, reads_prompts=model.reads_prompts)
        return pipe

    @classmethod
    def _from_lora(cls, run: Path, info: PipelineInfo, options: dict[str, Any]) -> "MedSDPipeline":
        options = {key: value for key, value in options.items() if key != "revision"}
        info = replace(info, base=folders.locate_base(info.base, run))
        embeddings = folders.read_embeddings(run)
        missing = [token for token in info.data.class_tokens if token not in embeddings]
        if missing or not (run / folders.LORA_FILE).is_file():
            raise InputError(f"{run} misses {missing[0] if missing else folders.LORA_FILE}: copy the LoRA folder again")
        pipe = cls.from_pretrained(info.base.name, revision=info.base.revision, **options)
        add_class_tokens(pipe.tokenizer, pipe.text_encoder, {token: class_words(token) for token in embeddings})
        set_embeddings(pipe.tokenizer, pipe.text_encoder, embeddings)
        if (run / "vae").is_dir():
            pipe.register_modules(vae=load_vae(str(run)))
        pipe.load_lora_weights(run, weight_name=folders.LORA_FILE)
        pipe.unet.register_to_config(sample_size=info.data.resolution // build_codec(info.codec, pipe.vae).factor)
        pipe.info = info
        return pipe

    @property
    def is_sd_shaped(self) -> bool:
        """Whether plain diffusers' StableDiffusionPipeline loads what `save_pretrained` writes."""
        schedule = self.scheduler.config
        plain = schedule.get("steps_offset", 1) == 1 and not schedule.get("clip_sample", False)
        return is_sd_shaped(self.vae) and plain and not self.learns_variance

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the pipeline folder; it has an index only once all its parts are there."""
        target = Path(save_directory)
        made = partial_folder(target)
        if self.info.base is not None:
            self._save_lora(made)
        elif self.is_sd_shaped:
            parts = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
            plain = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            plain.save_pretrained(made, **options)
        else:
            super().save_pretrained(made, **options)
        base = self.info.base and folders.relative_base(self.info.base, target)
        folders.write_info(made, replace(self.info, base=base, reads_prompts=self.reads_prompts))
        folders.publish(made, target)

    def _save_lora(self, made: Path) -> None:
        if self.info.own_vae:
            self.vae.save_pretrained(made / "vae")
        weights, metadata = lora_layers(self.unet)
        self.save_lora_weights(made, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)
        folders.order_metadata(made / folders.LORA_FILE)
        table = self.text_encoder.get_input_embeddings().weight
        ids = self.tokenizer.convert_tokens_to_ids(self.data.class_tokens)
        folders.write_embeddings(made, {token: table[index] for token, index in zip(self.data.class_tokens, ids, strict=True)})

    def merge_lora(self) -> None:
        """Add the adapters to the UNet's weights, which are whole and trainable then."""
        self.fuse_lora()
        self.unload_lora_weights()
        self.unet.requires_grad_(True)
        self.info = replace(self.info, base=None)

    def push_to_hub(self, repo_id: str, private: bool = True, revision: str | None = None, **options: Any) -> str:
        """Save to a temporary folder and upload it; returns the repository's address.

        Raises InputError for LoRA adapters of a local base, which nobody else could load.
        """
        if self.info.base is not None and self.info.base.sha256 is not None:
            raise InputError(f"these LoRA adapters belong to the local folder {self.info.base.name}: call merge_lora() before pushing")
        return folders.push(self.save_pretrained, repo_id, private, revision, **options)


def takes_variance(scheduler: Any) -> bool:
    """Whether a scheduler's step wants the UNet's variance behind its prediction."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in {"learned", "learned_range"}


def preset_tokenizer(data: DataInfo, others: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """A tokenizer for the class prompts and `others`, of `max_tokens` or as many as the longest of them needs."""
    words = dict(zip(data.class_tokens, data.class_names, strict=True)) if data.class_tokens else {}
    known = plain_words([replace_tokens(prompt, words) for prompt in others])
    tokenizer = build_tokenizer([*data.with_words().prompts, *known], max_tokens)
    tokenizer.model_max_length = max(max_tokens, longest(tokenizer, [*data.prompts, *others], data.class_tokens))
    return tokenizer
