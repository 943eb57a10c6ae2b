"""`MedSDPipeline`: one diffusion model that generates images by class and scores class likelihoods.

Images are `(C, H, W)` in the source's own unit at the door and `[-1, 1]` inside; the codec decides what the UNet sees.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from medsd.data.dataset import DataInfo
from medsd.data.files import pixels_of
from medsd.data.geometry import fit_square
from medsd.data.intensity import Range, label_channels
from medsd.data.prompts import class_words
from medsd.data.transforms import to_unit
from medsd.errors import InputError
from medsd.inference import folder as folders
from medsd.inference.folder import PipelineInfo
from medsd.inference.foreign import ForeignModel, check_local, is_foreign, load_foreign, unheard_text_encoder
from medsd.inference.likelihood import Calibration, fit_calibration, make_plan, posterior, score_classes
from medsd.inference.pictures import picture
from medsd.models.autoencoders import load_vae
from medsd.models.channels import adapt_unet, adapt_vae
from medsd.models.codec import Codec, PixelCodec, build_codec, codec_of, is_sd_shaped
from medsd.models.conditioning import (
    add_class_tokens,
    adopt_words,
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
from medsd.models.presets import BETAS, LEARNED_VARIANCE, PRESETS, SD_SCHEDULE
from medsd.models.unet import build_unet, check_side
from medsd.runtime import partial_folder

ENCODE_BATCH = 32
FOREIGN_DATA = {"intensity": Range(0.0, 255.0).to_dict(), "resize": "pad", "unit": "grey value", "fingerprint": ""}


@dataclass(frozen=True)
class ClassifyOutput:
    """Of N images and K classes."""

    predictions: list[str]
    """Class names (prompts, where the folder has no classes)."""
    probabilities: np.ndarray
    """`(N, K)`, rows sum to 1."""
    calibrated: bool
    """Whether a temperature and class bias stand behind the probabilities; without, they are far too sure."""
    log_likelihoods: np.ndarray
    """`(N, K)` nats, up to a constant per image."""
    standard_errors: np.ndarray
    """`(N, K)` nats, of the difference to the leading class."""
    pairs: np.ndarray
    """`(N, K)` (timestep, noise) pairs spent."""
    rows: np.ndarray
    """`(N,)` UNet rows spent."""


class MedSDPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
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

        A foreign model does not listen to its text encoder yet, which may therefore say anything; one of ours hears the empty prompt.
        """
        others, most = [prompt for prompt in prompts if prompt not in data.prompts], self.tokenizer.model_max_length
        tokenizer = _preset_tokenizer(data, others, most)
        if self.info.data is None:
            self.register_modules(text_encoder=unheard_text_encoder(tokenizer, self.text_encoder))
        else:
            adopt_words(self.text_encoder, self.tokenizer, tokenizer)
        self.register_modules(tokenizer=tokenizer)
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
    ) -> ImagePipelineOutput:
        """Generate images of a class, or of prompts.

        Args:
            guidance_scale: classifier-free guidance (Ho & Salimans, 2022); 1 is none.
            latents: start noise `(B, c, h, w)` instead of a draw from `generator`.
            output_type: `pil` 8-bit view; `np` `(B, H, W, C)` in [0, 1]; `pt` `(B, C, H, W)` in [0, 1]; `latent`;
                `source` `(B, C, H, W)` in the source's unit (HU for CT).

        Raises InputError for an unknown class, or neither or both of class and prompt.
        """
        prompts = self._prompts(class_name, prompt)
        condition = self.encode_prompts(prompts).repeat_interleave(num_images_per_prompt, 0)
        shape = (len(condition), self.unet.config.in_channels, *(self.unet.config.sample_size,) * 2)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=condition.dtype)
        latents = latents.to(self._execution_device, condition.dtype)
        latents = self._denoise(latents, condition, num_inference_steps, guidance_scale, generator)
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

    def _denoise(self, latents: torch.Tensor, condition: torch.Tensor, steps: int, guidance_scale: float, generator: Any) -> torch.Tensor:
        guided = guidance_scale != 1
        if guided:
            empty = self.encode_prompts([""]).expand_as(condition)
            condition = torch.cat([empty, condition])
        if not isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.get("variance_type"):
            self.scheduler.register_to_config(variance_type=None)
        self.scheduler.set_timesteps(steps, device=latents.device)
        extra = {"generator": generator} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        latents = latents * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            doubled = torch.cat([latents, latents]) if guided else latents
            prediction = self.unet(self.scheduler.scale_model_input(doubled, timestep), timestep, condition).sample
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
                prediction[:, latents.shape[1] :] = conditional[:, latents.shape[1] :]  # A variance is not extrapolated.
            if self.learns_variance and not takes_variance(self.scheduler):
                prediction = prediction[:, : latents.shape[1]]
            latents = self.scheduler.step(prediction, timestep, latents, **extra).prev_sample
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

    # Classification

    @torch.no_grad()
    def classify(
        self,
        images: Sequence[np.ndarray | Image.Image],
        prompts: Sequence[str] | None = None,
        mode: str = "posterior",
        weighting: str = "uniform",
        max_pairs: int = 64,
        delta: float = 0.05,
        prior: np.ndarray | None = None,
        batch_size: int = 64,
        seed: int = 0,
        progress: Callable[[int], None] = lambda rows: None,
        ranges: np.ndarray | None = None,
    ) -> ClassifyOutput:
        """Class probabilities of images by the Diffusion Classifier (Li et al., ICCV 2023).

        Args:
            images: arrays `(C, H, W)` in the source's unit (see `medsd.read_image`), or PIL images.
            prompts: one per class, instead of the pipeline's own classes.
            mode, weighting, max_pairs, delta, batch_size, seed, progress: see `medsd.inference.likelihood`.
            prior: class prior `(K,)`; default uniform.
            ranges: see `encode_images`.

        Raises InputError for fewer than two classes, for findings that can hold together, or images that do not fit.
        """
        if prompts is None and self.data.multi_label:
            raise InputError(
                "several findings can hold in one image, and such sets are not scored yet: give prompts=[...] that exclude "
                "each other, or generate images by finding"
            )
        names, prompts = (self.class_names, self.data.prompts) if prompts is None else (list(prompts), list(prompts))
        if len(prompts) < 2:
            raise InputError(f"{len(prompts)} classes: classification needs two or more; give prompts=[...]")
        calibration = self.info.calibration if names == self.class_names and weighting == "uniform" else None
        latents = self.encode_images(images, ranges)
        plan = make_plan(self.noise_schedule, max_pairs, tuple(latents.shape[1:]), weighting, seed)
        conditions = self.encode_prompts(prompts)
        scores = score_classes(
            self._predict, self.noise_schedule, latents, conditions, plan, mode, delta, calibration, prior, batch_size, progress
        )
        probabilities = posterior(scores.log_likelihoods, calibration, prior)
        predictions = [names[index] for index in probabilities.argmax(1)]
        return ClassifyOutput(predictions, probabilities, calibration is not None, **vars(scores), rows=scores.rows)

    def _predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The UNet in its own precision, without a variance that it may have learned."""
        return self.unet(x_t.to(self.unet.dtype), timesteps, condition.to(self.unet.dtype)).sample[:, : x_t.shape[1]]

    def calibrate(
        self,
        images: Sequence[np.ndarray | Image.Image],
        labels: Sequence[str | int],
        max_pairs: int = 64,
        batch_size: int = 64,
        seed: int = 0,
        progress: Callable[[int], None] = lambda rows: None,
        ranges: np.ndarray | None = None,
    ) -> Calibration:
        """Fit temperature and class bias on labelled held-out images, with all pairs and uniform weights.

        They are kept in `medsd.json` and used by `classify`. `labels` are class names or indices, `ranges` as in
        `encode_images`. Raises InputError for an unknown class and for a class without an image.
        """
        indices = np.array([self._class_index(label) for label in labels])
        missing = sorted(set(range(len(self.class_names))) - set(indices.tolist()))
        if missing:
            raise InputError(f"no image of {self.class_names[missing[0]]} to calibrate on: add some, or do without calibration")
        output = self.classify(images, mode="full", max_pairs=max_pairs, batch_size=batch_size, seed=seed, progress=progress, ranges=ranges)
        calibration = fit_calibration(output.log_likelihoods, indices)
        self.info = replace(self.info, calibration=calibration)
        return calibration

    def _class_index(self, label: str | int) -> int:
        if label in self.class_names:
            return self.class_names.index(label)
        if isinstance(label, int | np.integer) and 0 <= label < len(self.class_names):
            return int(label)
        raise InputError(f'unknown class "{label}"; this pipeline knows {", ".join(self.class_names) or "none"}')

    @torch.no_grad()
    def encode_images(self, images: Sequence[np.ndarray | Image.Image], ranges: np.ndarray | None = None) -> torch.Tensor:
        """Latents `(N, c, h, w)` of images in the source's unit, brought to the model's resolution.

        `ranges` `(N, C, 2)`, low and high of each channel, are for an intensity map that is recorded per image; without them
        each image is measured.
        """
        if not len(images):
            raise InputError("no image to encode")
        if ranges is not None and len(ranges) != len(images):
            raise InputError(f"{len(ranges)} ranges for {len(images)} images: one per image is expected")
        fitted, device = [self._fit(image) for image in images], self._execution_device
        latents = []
        for start in range(0, len(fitted), ENCODE_BATCH):
            part = slice(start, start + ENCODE_BATCH)
            batch = torch.from_numpy(np.stack(fitted[part]).astype(np.float32)).to(device)
            own = None if ranges is None else torch.as_tensor(ranges[part], dtype=torch.float32, device=device)
            latents.append(self.codec.encode(to_unit(batch, self.data.intensity_map, own)))
        return torch.cat(latents)

    def _fit(self, image: np.ndarray | Image.Image) -> np.ndarray:
        pixels = pixels_of(image) if isinstance(image, Image.Image) else np.asarray(image)
        expected, data = self.data.image_channels, self.data
        if pixels.ndim != 3:
            raise InputError(f"an image of shape {pixels.shape}; (channels, height, width) is expected, as medsd.read_image gives")
        if len(pixels) == 1 and expected == 3:
            pixels = pixels.repeat(3, 0)
        if len(pixels) != expected:
            raise InputError(f"an image of {len(pixels)} channels; this pipeline was trained on images of {expected}")
        grey = expected - label_channels(data.intensity_map, expected)
        parts = [(pixels[:grey], False), (pixels[grey:], True)]
        return np.concatenate([fit_square(part, data.resolution, data.resize, nearest)[0] for part, nearest in parts if len(part)])

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
        tokenizer = _preset_tokenizer(data, [prompt for prompt in prompts if prompt not in data.prompts], preset.text_tokens)
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
        local = Path(name).exists() or not folders.looks_like_hub_id(name)
        record = Path(name) if local else folders.download_record(name, options.get("revision"))
        if is_foreign(str(record)):
            return cls._from_foreign(load_foreign(name, options.get("revision")))
        info = folders.read_info(record)
        if info.base is not None:
            return cls._from_lora(record, info, options)
        if local:
            folders.check_folder(record)
        pipe = super().from_pretrained(name, use_safetensors=True, **options)
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
        table = self.text_encoder.get_input_embeddings().weight
        ids = self.tokenizer.convert_tokens_to_ids(self.data.class_tokens)
        folders.write_embeddings(made, {token: table[index] for token, index in zip(self.data.class_tokens, ids, strict=True)})

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


def _preset_tokenizer(data: DataInfo, others: Sequence[str], max_tokens: int) -> Any:
    """A tokenizer for the class prompts and `others`, of `max_tokens` or as many as the longest of them needs."""
    words = dict(zip(data.class_tokens, data.class_names, strict=True)) if data.class_tokens else {}
    known = plain_words([replace_tokens(prompt, words) for prompt in others])
    tokenizer = build_tokenizer([*data.with_words().prompts, *known], max_tokens)
    tokenizer.model_max_length = max(max_tokens, longest(tokenizer, [*data.prompts, *others], data.class_tokens))
    return tokenizer
