"""What the training recipes' flags share, and which of them may change when a run is resumed."""

from dataclasses import dataclass, fields
from typing import Literal

from medsd.config.base import RecipeConfig
from medsd.errors import InputError

WITHOUT_EFFECT = frozenset(
    {
        "dataset_name",
        "resolution",
        "train_batch_size",
        "gradient_accumulation_steps",
        "output_dir",
        "validation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "logging_steps",
        "early_stopping",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "enable_xformers_memory_efficient_attention",
        "enable_vae_slicing",
        "compile",
        "auto_batch_size",
        "resume_from_checkpoint",
        "allow_config_change",
        "overwrite",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "push_checkpoints",
        "audit_samples",
    }
)
"""Fields that may differ when a run is resumed: but for rounding they do not change what is computed, or it is known by another name
(the data's fingerprint, the effective batch)."""


Preset = Literal["tiny", "small", "sd15"]


@dataclass
class TrainingConfig(RecipeConfig):
    """The flags of every training recipe; names follow diffusers' scripts."""

    dataset_name: str = "runs/{name}/data"
    """Prepared data folder or Hub id."""
    train_batch_size: int = 16
    """Images per device and micro-batch."""
    max_train_steps: int = 3500
    """Optimizer updates."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-3 from a preset, 1e-4 for LoRA and for a model that has yet to learn what prompts mean, 1e-5 when
    another pretrained model is trained in full."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""
    lr_warmup_steps: int = 100
    """Optimizer updates over which the learning rate rises; in a shorter run it never comes to its peak."""
    use_ema: bool = True
    """Keep an exponential moving average of the trained weights, and save that."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass; trained weights stay float32."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer update."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    use_8bit_adam: bool = False
    """AdamW with 8-bit states, from bitsandbytes."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention by xformers instead of torch's own; needs a GPU."""
    auto_batch_size: bool = False
    """Where memory does not suffice, go on with smaller micro-batches and more of them, so that an update sees as many images."""
    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps on a GPU."""
    allow_tf32: bool = False
    """Let a GPU multiply float32 numbers with 10 bits of mantissa (TF32): faster where mixed_precision is no."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    dataloader_num_workers: int = 0
    """Threads that read images while the model trains."""
    train_fraction: float | None = None
    """Train on this share of the training patients, drawn by the seed: with one seed, those of a smaller share are among those of a
    larger. Default: all."""
    max_train_samples: int | None = None
    """Train on at most this many images."""
    resolution: int | None = None
    """Side of the images in training, in pixels: that of the data or a half, a third ... of it. Default: that of the data."""
    random_shift: int = 0
    """Augmentation: move training images by up to this many pixels."""
    random_rotation: float = 0.0
    """Augmentation: turn training images by up to this many degrees each way."""
    random_scale: float = 0.0
    """Augmentation: enlarge or shrink training images by up to this share; 0.1 is up to 10 %."""
    random_intensity: float = 0.0
    """Augmentation: change contrast and brightness by up to this share of the intensity range."""
    random_flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Augmentation: mirror half of the training images; only where anatomy allows, since left and right are not the same in a body."""
    seed: int = 0
    """Seed of weights, order, noise and timesteps."""
    validation_steps: int = 1000
    """Updates between two looks at held-out loss, quick AUROC and previews (and one at the end); 0 for none."""
    checkpointing_steps: int = 1000
    """Updates between two checkpoints (and one at the end); 0 for none."""
    checkpoints_total_limit: int | None = 2
    """Checkpoints kept; the oldest go first."""
    best_metric: Literal["loss", "auroc"] = "loss"
    """What says that the averaged weights are the best so far, which output_dir/best then holds: held-out loss or validation AUROC."""
    early_stopping: int | None = None
    """Stop after so many looks without a better one."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder, or latest: the newest that is whole (starts anew where there is none)."""
    allow_config_change: bool = False
    """Resume although settings or data that determine the result have changed."""
    overwrite: bool = False
    """Replace what is already in output_dir."""
    logging_steps: int = 50
    """Updates between two lines of metrics.jsonl."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves and previews go, beside metrics.jsonl."""
    push_to_hub: bool = False
    """Audit the finished folder for copies of training images, and push it to the Hub."""
    hub_model_id: str | None = None
    """Hub repository, user/name."""
    hub_private_repo: bool = True
    """Make the Hub repository private."""
    push_checkpoints: bool = False
    """Push the model of each checkpoint that was kept, too, each to a branch; they are not audited, so only to a private repository."""
    audit_samples: int = 256
    """Images that the audit before a push generates (of an autoencoder: held-out images that it reconstructs)."""

    @property
    def subset(self) -> tuple[float | None, int | None, int]:
        """Which rows are learned from: arguments of `medsd.data.transforms.training_rows`."""
        return self.train_fraction, self.max_train_samples, self.seed

    def destination(self) -> dict[str, object]:
        """Keyword arguments of `medsd.training.pushing.Destination`."""
        where = {"hub_model_id": self.hub_model_id, "private": self.hub_private_repo}
        return where | {"audit_samples": self.audit_samples, "with_checkpoints": self.push_checkpoints, "seed": self.seed}

    def augmentation(self) -> dict[str, object]:
        """Keyword arguments of `medsd.data.transforms.Augmentation`."""
        return {name: getattr(self, f"random_{name}") for name in ("shift", "rotation", "scale", "intensity", "flip")}

    def cadence(self) -> dict[str, int | None]:
        """Keyword arguments of `medsd.training.loop.Cadence`."""
        return {
            "last": self.max_train_steps,
            "images": self.train_batch_size * self.gradient_accumulation_steps,
            "logging": self.logging_steps,
            "validation": self.validation_steps,
            "checkpointing": self.checkpointing_steps,
            "checkpoints_kept": self.checkpoints_total_limit,
        }

    def optimisation(self, learning_rate: float) -> dict[str, object]:
        """Keyword arguments of `medsd.training.setup.Optimisation`; the learning rate is the flag's or its default."""
        names = ("use_8bit_adam", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "use_ema", "compile")
        return {"learning_rate": learning_rate} | {name: getattr(self, name) for name in names}

    def settings(self, processes: int) -> dict[str, object]:
        """What determines the result: the fields that have an effect, and the number of images in an update."""
        steps = {"max_train_steps"} if self.lr_scheduler == "constant" else set()
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in WITHOUT_EFFECT | steps}
        chosen["train_fraction"] = None if self.train_fraction == 1 else self.train_fraction
        return chosen | {"effective_batch_size": self.train_batch_size * self.gradient_accumulation_steps * processes}

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.push_to_hub and self.hub_model_id is None:
            raise InputError("--push_to_hub needs --hub_model_id user/name")
        if self.push_checkpoints and not (self.push_to_hub and self.hub_private_repo):
            raise InputError("--push_checkpoints sends models that nobody audited: it belongs to --push_to_hub and a private repository")
        if self.early_stopping is not None and self.validation_steps == 0:
            raise InputError("--early_stopping goes by looks at held-out images, and --validation_steps 0 has none: drop one")
        if self.best_metric != "loss" and self.validation_steps == 0:
            raise InputError("--best_metric goes by looks at held-out images, and --validation_steps 0 has none: drop one")
        if self.allow_config_change and not self.resume_from_checkpoint:
            raise InputError("--allow_config_change belongs to --resume_from_checkpoint: give both")
        if self.overwrite and self.resume_from_checkpoint:
            raise InputError("--overwrite and --resume_from_checkpoint exclude each other: drop one")
        if self.train_fraction is not None and not 0 < self.train_fraction <= 1:
            raise InputError(f"--train_fraction {self.train_fraction}: a share of the patients, above 0 and at most 1, is expected")
        for field, most in {"random_rotation": 180, "random_scale": 0.9, "random_intensity": 1}.items():
            if not 0 <= getattr(self, field) <= most:
                raise InputError(f"--{field} {getattr(self, field)} is not within 0 and {most}")
        for field in ("learning_rate", "max_grad_norm"):
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise InputError(f"--{field} {value}: a number above 0 is expected")


@dataclass
class FinetuneConfig(TrainingConfig):
    """What fine-tuning a UNet and fine-tuning an autoencoder share: where the model comes from, and how much of it learns."""

    pretrained_model_name_or_path: str | None = None
    """Folder, Hub id or single file to start from: a medsd run, Stable Diffusion 1.x / 2.x, or an unconditional model; for an autoencoder
    also a bare one."""
    revision: str | None = None
    """Revision of a Hub id."""
    preset: Preset | None = None
    """Size of a model that starts from random weights. Default without a pretrained one: tiny."""
    adapt_channels: bool = False
    """Make a pretrained model of another number of image channels fit the data; exact for one channel."""
    rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights (an autoencoder's are merged into it at the end)."""
    lora_alpha: int | None = None
    """Scale of the LoRA adapters. Default: the rank."""
    enable_vae_slicing: bool = False
    """Encode and decode image by image: less memory."""
    enable_vae_tiling: bool = False
    """Encode and decode large images tile by tile: less memory, with faint seams. Large is above the autoencoder's sample_size (512)."""

    def settings(self, processes: int) -> dict[str, object]:
        """With the defaults of what was left away."""
        preset = None if self.pretrained_model_name_or_path else self.preset or "tiny"
        return super().settings(processes) | {"preset": preset, "lora_alpha": self.lora_alpha or self.rank}

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.pretrained_model_name_or_path and self.preset:
            raise InputError("--pretrained_model_name_or_path and --preset exclude each other: drop one")
        for field in ("rank", "adapt_channels", "revision"):
            if getattr(self, field) and self.pretrained_model_name_or_path is None:
                raise InputError(f"--{field} is for a pretrained model: give --pretrained_model_name_or_path")
        if self.lora_alpha is not None and self.rank is None:
            raise InputError("--lora_alpha belongs to --rank: give both")
