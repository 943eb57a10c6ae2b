"""The flags of `finetune_unet.py`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.training import FinetuneConfig
from medsd.errors import InputError


@dataclass
class FinetuneUNetConfig(FinetuneConfig):
    """Fine-tune (or train from a preset) a class-conditional diffusion UNet."""

    section: ClassVar[str] = "finetune_unet"

    output_dir: str = "runs/{name}/unet"
    """Folder of the pipeline that comes out."""
    vae: str | None = None
    """Folder, Hub id or single file of an autoencoder, for a preset or in place of the pretrained model's own."""
    codec: Literal["kl", "vq", "pixels"] | None = None
    """kl, vq: latents of an AutoencoderKL or VQModel; pixels: space-to-depth. Default: the VAE's where there is one, else pixels."""
    pixel_factor: int | None = None
    """Side of the pixel block that becomes channels (codec pixels); 1 for plain pixel diffusion. Default: 4."""
    cache_latents: bool = False
    """Encode each image once and keep the moments of its latents on disk (in HF_HOME/medsd); each step still draws latents anew."""
    cached_augmentations: int | None = None
    """With cache_latents and augmentation: in how many augmented versions each image is kept."""
    train_text_encoder: bool = False
    """Train a pretrained text encoder in full; otherwise only its class tokens learn. A preset's always trains."""
    class_tokens: Literal["auto", "words"] = "auto"
    """auto: each class is a new word such as <epidural>; words: the class's name as plain words."""
    unconditional: bool = False
    """Ignore the classes: every prompt is the empty one."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the UNet predicts. Default: the pretrained scheduler's, else v_prediction, which small models learn to draw with soonest."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    """Noise schedule. Default: the pretrained scheduler's, else scaled_linear."""
    rescale_betas_zero_snr: bool = False
    """Let the signal vanish at the last timestep (Lin et al., 2024); for v_prediction and sample."""
    learned_variance: bool = False
    """Let a preset's UNet in pixels also predict the variance of each step, by the hybrid loss (Nichol and Dhariwal, 2021)."""
    loss_type: Literal["l2", "l1", "smooth_l1", "huber"] = "l2"
    """Element-wise loss of the prediction; smooth_l1 is quadratic below an error of 1, huber below a threshold for each timestep."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How the threshold of loss_type huber falls with the timestep."""
    huber_c: float = 0.1
    """Threshold of loss_type huber where the signal is gone."""
    noise_offset: float = 0.0
    """Share of noise that is the same over a whole channel (Guttenberg, 2023), so that brightness varies more; 0.1 is usual."""
    input_perturbation: float = 0.0
    """Noise added to the noise that the UNet sees, not to what it predicts (Ning et al., 2023); 0.1 is usual."""
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = "uniform"
    """Timesteps of training: equally often, more often in the middle, or more often where the loss is large, at the same expected loss."""
    lesion_weight: float = 1.0
    """How often a place within a lesion's mask counts, against one outside."""
    snr_gamma: float | None = None
    """Min-SNR-gamma loss weights (Hang et al., 2023); 0 for none. Default: 20 from a preset, none for a pretrained model, with
    learned_variance and with rescale_betas_zero_snr (where the signal is gone, the weight is 0, and nothing is learnt)."""
    discriminative_weight: float = 0.0
    """Weight of a term that an image's own class explains it better than another on the same noise; it doubles the cost of a step."""
    proportion_empty_prompts: float = 0.1
    """Share of training images whose prompt is dropped, so that guidance works."""
    class_sampling: Literal["natural", "balanced", "sqrt"] = "natural"
    """How often each class (with several findings: an image's rarest) is drawn: as it comes, equally often, or between the two."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.codec == "kl" and self.pretrained_model_name_or_path is None and self.vae is None:
            raise InputError("--codec kl from a preset needs --vae FOLDER, which recipes/finetune_vae.py trains")
        if self.pixel_factor is not None and (self.vae or self.pretrained_model_name_or_path):
            raise InputError("--pixel_factor is for a --preset without --vae; a pretrained model keeps its own codec")
        if self.codec == "pixels" and (self.vae or self.pretrained_model_name_or_path):
            raise InputError("--codec pixels is for a --preset without --vae; a pretrained model keeps its own codec")
        lost = ["train_text_encoder", "prediction_type", "beta_schedule", "rescale_betas_zero_snr", "adapt_channels"]
        for field in lost if self.rank else []:
            if getattr(self, field):
                raise InputError(f"--{field} cannot go with --rank: a LoRA run keeps its base's own")
        if not 0 <= self.proportion_empty_prompts <= 1:
            raise InputError(f"--proportion_empty_prompts {self.proportion_empty_prompts} is not within 0 and 1")
        self._check_options()

    def _check_options(self) -> None:
        """Rules of codec, noise and loss."""
        if self.codec == "vq" and self.pretrained_model_name_or_path is None and self.vae is None:
            raise InputError("--codec vq from a preset needs --vae FOLDER, which recipes/finetune_vae.py --codec vq trains")
        if self.snr_gamma is not None and (self.snr_gamma < 0 or (self.snr_gamma and self.learned_variance)):
            raise InputError(f"--snr_gamma {self.snr_gamma}: 0 or more is expected, and 0 with --learned_variance, whose bound has weights")
        if self.learned_variance and (self.vae or self.pretrained_model_name_or_path):
            raise InputError("--learned_variance is for a --preset in pixels: leave it away (a pretrained model keeps its own output)")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise InputError("--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: pure noise tells nothing of eps")
        for field in ("cache_latents", "enable_vae_slicing", "enable_vae_tiling"):
            if getattr(self, field) and self.vae is None and self.pretrained_model_name_or_path is None:
                raise InputError(f"--{field} is for an autoencoder, and pixels have none: give --vae, or leave it away")
        if self.discriminative_weight and (self.unconditional or self.learned_variance):
            other = "--unconditional, which knows no classes" if self.unconditional else "--learned_variance, whose bound is another error"
            raise InputError(f"--discriminative_weight does not go with {other}: leave one of them away")
        if self.loss_type != "huber" and (self.huber_schedule, self.huber_c) != ("snr", 0.1):
            raise InputError("--huber_schedule and --huber_c belong to --loss_type huber: give that, too")
        augmented = any(value not in {0, "none"} for value in self.augmentation().values())
        if self.cache_latents and augmented and self.cached_augmentations is None:
            raise InputError("--cache_latents keeps images as they are: drop the --random_* flags, or give --cached_augmentations 8")
        if self.cached_augmentations is not None and not (self.cache_latents and augmented):
            raise InputError("--cached_augmentations belongs to --cache_latents with --random_* flags: give these, too")
        for field in ("noise_offset", "input_perturbation", "discriminative_weight"):
            if getattr(self, field) < 0:
                raise InputError(f"--{field} {getattr(self, field)}: 0 or more is expected")
        for field in ("huber_c", "lesion_weight"):
            if getattr(self, field) <= 0:
                raise InputError(f"--{field} {getattr(self, field)}: a number above 0 is expected")
