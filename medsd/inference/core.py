"""The pipeline itself: one diffusion model that generates images by class and scores class likelihoods.

Images are `(C, H, W)` in the source's own unit at the door and `[-1, 1]` inside; the codec decides what the UNet sees. With all that it
needs it also travels as one file (`medsd.hub.standalone`), so nothing here knows folders.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from medsd.data.dataset import DataInfo
from medsd.data.intensity import Range
from medsd.errors import InputError
from medsd.inference.info import PipelineInfo
from medsd.inference.pictures import picture
from medsd.inference.scoring import ENCODE_BATCH, ScoringMixin
from medsd.models.codec import Codec, build_codec, codec_of
from medsd.models.conditioning import encode, tokenize

StepCallback = Callable[[Any, int, Any, dict[str, torch.Tensor]], dict[str, Any]]
"""diffusers' own: called with the pipeline, the number of the step, its timestep and `{"latents": x_t}`, and returns the last."""
FOREIGN_DATA = {"intensity": Range(0.0, 255.0).to_dict(), "resize": "pad", "unit": "grey value", "fingerprint": ""}


class DiffusionClassifierPipeline(ScoringMixin, DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """Text encoder, UNet, scheduler and codec, with what is recorded of classes and intensities.

    Args:
        vae: an `AutoencoderKL` or `VQModel`, or None for a pixels codec.
        text_encoder, tokenizer: CLIP; prompts -> condition.
        unet: a `UNet2DConditionModel`.
        scheduler: any diffusers scheduler.
        record: `medsd.json`, where the pipeline's index holds it.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["vae"]

    def __init__(
        self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, record: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        if record is not None:
            self.register_to_config(record=record)
        known = record or {"codec": None if vae is None else codec_of(vae, vae.config.in_channels).to_dict()}
        self.info = PipelineInfo.from_dict(known)

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


def takes_variance(scheduler: Any) -> bool:
    """Whether a scheduler's step wants the UNet's variance behind its prediction."""
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type in {"learned", "learned_range"}
