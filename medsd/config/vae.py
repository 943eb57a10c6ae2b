"""The flags of `finetune_vae.py`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.training import FinetuneConfig
from medsd.errors import InputError

GAN_WEIGHT = 0.1


@dataclass
class FinetuneVAEConfig(FinetuneConfig):
    """Fine-tune an AutoencoderKL or VQModel, or train one from a preset."""

    section: ClassVar[str] = "finetune_vae"

    output_dir: str = "runs/{name}/vae"
    """Folder of the autoencoder that comes out."""
    codec: Literal["kl", "vq"] | None = None
    """kl: AutoencoderKL; vq: VQModel, with a codebook. Default: the pretrained one's kind, else kl."""
    loss_type: Literal["l1", "l2", "huber"] = "l1"
    """Element-wise loss of the reconstruction; huber is quadratic below an error of 1."""
    kl_weight: float = 1e-6
    """Weight of the posterior's KL divergence, nats per latent element (codec kl)."""
    commitment_weight: float = 0.25
    """Weight with which latents are drawn to their codebook entries (codec vq)."""
    perceptual_weight: float = 0.1
    """Weight of the distance in the features of a fixed network; 0 for none."""
    perceptual_model: str | None = None
    """Folder or Hub id of a vision model of transformers to compare features of. Default: fixed random filters, nothing to download."""
    gan_weight: float | None = None
    """Weight of a patch discriminator's loss, times the adaptive weight; 0 for none. Default: none, and 0.1 with gan_start."""
    gan_start: int | None = None
    """Update at which the discriminator joins. Default: half of max_train_steps, where there is a gan_weight."""
    decoder_only: bool = False
    """Train the decoder alone, so that latents keep their meaning for a pretrained UNet."""

    @property
    def discriminator(self) -> tuple[float, int] | None:
        """Weight and first update of the discriminator; None for none."""
        if self.gan_weight == 0 or (self.gan_weight is None and self.gan_start is None):
            return None
        weight = GAN_WEIGHT if self.gan_weight is None else self.gan_weight
        return weight, self.max_train_steps // 2 if self.gan_start is None else self.gan_start

    def settings(self, processes: int) -> dict[str, object]:
        """With the defaults of what was left away."""
        weight, _ = self.discriminator or (0, None)
        return super().settings(processes) | {"gan_weight": weight}

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.decoder_only and self.pretrained_model_name_or_path is None:
            raise InputError("--decoder_only keeps a pretrained encoder: give --pretrained_model_name_or_path")
        if self.auto_batch_size and self.discriminator is not None:
            raise InputError("--auto_batch_size cannot go with a discriminator, whose weight is that of a micro-batch: drop one")
        if self.best_metric != "loss":
            raise InputError(f"--best_metric {self.best_metric} is for a UNet; an autoencoder's is its held-out loss")
        if self.mixed_precision == "fp16" and self.discriminator is not None:
            raise InputError("--mixed_precision fp16 cannot scale the losses of a discriminator and of what it judges: use bf16 or no")
        if self.perceptual_model is not None and self.perceptual_weight == 0:
            raise InputError("--perceptual_model belongs to a --perceptual_weight above 0: give both")
        if self.gan_weight == 0 and self.gan_start is not None:
            raise InputError("--gan_start lets a discriminator join whose --gan_weight 0 says that there is none: drop one")
        if self.gan_start is not None and self.gan_start > self.max_train_steps:
            raise InputError(f"--gan_start {self.gan_start} lies beyond --max_train_steps: the discriminator never joins")
        for field in ("kl_weight", "commitment_weight", "perceptual_weight", "gan_weight"):
            if (getattr(self, field) or 0) < 0:
                raise InputError(f"--{field} {getattr(self, field)}: 0 or more is expected")
