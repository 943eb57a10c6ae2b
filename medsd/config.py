"""One flat dataclass per recipe; its flags and its YAML section are two spellings of the same fields.

`{name}` in a default folder stands for the YAML's stem, or `phantom` without one: this is how recipes find each
other's folders. `commandline` fills the fields.
"""

from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from medsd.errors import InputError

PHANTOM = "phantom"
GAN_WEIGHT = 0.1
MAY_BE_ZERO = frozenset(
    {
        "seed",
        "num_workers",
        "dataloader_num_workers",
        "lr_warmup_steps",
        "gan_start",
        "random_shift",
        "validation_steps",
        "checkpointing_steps",
    }
)

WITHOUT_EFFECT = frozenset(
    {
        "dataset_name",
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
        "compile",
        "auto_batch_size",
        "resume_from_checkpoint",
        "allow_config_change",
        "overwrite",
        "report_to",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
    }
)
"""Fields that may differ when a run is resumed: they do not change what is computed, or it is known by another name (the data's
fingerprint, the effective batch)."""

RULES_WAIT: ContextVar[bool] = ContextVar("RULES_WAIT", default=False)
"""While the parser builds a config, whose `check` is called after it."""


@dataclass
class RecipeConfig:
    """What every recipe config shares: its section's name and the run name in its folders."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default and isinstance(value, str):
                setattr(self, field.name, value.replace("{name}", PHANTOM))
        if not RULES_WAIT.get():
            self.check()

    def check(self) -> None:
        """Raise InputError for a number out of range and for fields that contradict each other."""
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < smallest:
                raise InputError(f"--{field.name} {value}: {smallest} or more is expected")


@dataclass
class PrepareDataConfig(RecipeConfig):
    """Turn medical images into a Parquet data set with class-token prompts and a patient-level split."""

    section: ClassVar[str] = "prepare_data"

    source: Literal["phantom", "images", "csv", "dicom", "nifti", "npz", "rsna2019", "adni", "oasis", "brats"] = "phantom"
    """What lies in data_dir: the phantom; one folder per class; a CSV beside images; DICOM, NIfTI; a MedMNIST npz; a collection."""
    data_dir: str | None = None
    """Folder of the images; for npz also the file itself. The phantom is written here (default: beside output_dir)."""
    output_dir: str = "runs/{name}/data"
    """Folder of the prepared data set."""
    labels: str | None = None
    """CSV with a row per image. A path relative to data_dir or to here."""
    image_column: str | None = None
    """CSV column of the image's path, name or stem. Default: the first of file, path, image, image_id, filename, dicom_name."""
    label_column: tuple[str, ...] = ("label",)
    """CSV column of the label; with multi_label several columns of 0 and 1, or one of names joined by |."""
    multi_label: bool = False
    """Several findings, or none, can hold in one image."""
    uncertain: Literal["drop", "positive", "negative"] = "drop"
    """What a -1 or an empty cell of a finding's column means: leave the image out, or read it as 1 or 0."""
    patient_column: str | None = None
    """CSV column of the patient. Default: the DICOM header's PatientID, else study, series, the folder in CLASS/p01/, file."""
    split_column: str | None = None
    """CSV column that already says train, validation or test."""
    mask_column: str | None = None
    """CSV column of a mask's path, relative to data_dir, beside each PNG or DICOM; kept in the column mask."""
    split_fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, validation and test patients where the source gives no split."""
    class_names: tuple[str, ...] | None = None
    """Names for the labels 0, 1, 2, ... of an npz, or the order of the classes. Default: sorted labels."""
    resolution: int | None = None
    """Side of the square images in pixels; larger images shrink to it, smaller ones are padded. Default: 256 (phantom 64)."""
    resize: Literal["pad", "crop", "stretch"] = "pad"
    """How an image that is not square becomes square."""
    windows: tuple[str, ...] | None = None
    """CT windows, a channel each: brain, subdural, bone, lung, abdomen, CENTRE/WIDTH. Default for CT: the first three (phantom 50/130)."""
    axis: Literal["axial", "coronal", "sagittal"] = "axial"
    """Plane of the slices that a NIfTI volume is cut into."""
    slices: Literal["content", "mask", "all"] = "content"
    """Which slices of a volume: those that show something, those with something in the mask, or all."""
    channels: tuple[str, ...] | None = None
    """Volumes stacked as channels, named by a word of their file names (t1ce; mask, or mask=seg for files called seg); image mask
    stacks the mask of a phantom, or of --mask_column, behind its image."""
    prompt_template: str | None = None
    """Sentence around the class, with {label} in it. Default: "a medical image of {label}" (a collection's own, if it has one)."""
    prompt_metadata: tuple[Literal["age_band", "sex", "view", "slice_position"], ...] | None = None
    """What else the prompt says where it is known; the bare flag means all four."""
    duplicates: Literal["refuse", "drop", "keep"] = "refuse"
    """What to do with identical, near-identical or mirrored images in two splits; drop takes them from train first, never from test."""
    max_quarantine: float = 0.05
    """Largest share of unreadable files before the run is refused."""
    num_workers: int = 2
    """Processes that decode files, each killed and replaced when a file hangs or breaks it."""
    seed: int = 0
    """Seed of the split (and of the phantom)."""
    salt_file: str | None = None
    """File with the secret that patients' ids are hashed with. Default: one per person, in the user's config folder."""
    overwrite: bool = False
    """Replace a data set that is already in output_dir."""
    dry_run: bool = False
    """Read headers only, and say what would come out: images, classes, patients, hours and GB."""
    push_to_hub: bool = False
    """Push the finished data set to the Hub."""
    hub_dataset_id: str | None = None
    """Hub data set repository, user/name."""
    hub_private_repo: bool = True
    """Make the Hub repository private."""
    confirm_public_data: bool = False
    """Say that this data set may be public; needed where the Hub repository is."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.prompt_template is not None and "{label}" not in self.prompt_template:
            raise InputError(f'--prompt_template "{self.prompt_template}" has no {{label}} in it')
        if self.source != "phantom" and self.data_dir is None:
            raise InputError(f"--source {self.source} needs --data_dir")
        if self.dry_run and self.source == "phantom":
            raise InputError("--dry_run looks at files that are there: name a --source and --data_dir")
        if self.source == "csv" and self.labels is None:
            raise InputError("--source csv needs --labels FILE.csv")
        if len(self.label_column) != 1 and not self.multi_label:
            raise InputError("--label_column names several columns: add --multi_label, or name one")
        self._check_flags_of_sources()
        if abs(sum(self.split_fractions) - 1) > 1e-6 or min(self.split_fractions) < 0:
            raise InputError(f"--split_fractions {' '.join(map(str, self.split_fractions))}: three shares that add up to 1 are expected")
        if not 0 <= self.max_quarantine <= 1:
            raise InputError(f"--max_quarantine {self.max_quarantine} is not within 0 and 1")
        if self.push_to_hub and self.hub_dataset_id is None:
            raise InputError("--push_to_hub needs --hub_dataset_id user/name")
        if self.push_to_hub and not self.hub_private_repo and not self.confirm_public_data:
            raise InputError("a public data set needs --confirm_public_data: look at contact_sheet.png and summary.json first")

    def _check_flags_of_sources(self) -> None:
        """Refuse flags that this source would not look at."""
        with_table = self.labels is not None and self.source in {"csv", "dicom", "nifti", "images"}
        for flag in ("image_column", "patient_column", "split_column", "mask_column"):
            if getattr(self, flag) is not None and not with_table:
                raise InputError(f"--{flag} names a column of --labels FILE.csv, which --source csv, dicom and nifti read: add that")
        if self.multi_label and not with_table and self.source != "rsna2019":
            raise InputError("--multi_label needs --labels FILE.csv with the findings, and --source csv, dicom or nifti")
        if self.mask_column is not None and self.source == "nifti":
            raise InputError("--mask_column is for images; the mask of NIfTI volumes is a channel: --channels t1 mask")
        if self.channels is not None and (self.source not in {"nifti", "brats"} or self.multi_label) and not self.stacks_mask:
            raise InputError(
                "--channels stacks volumes of --source nifti or brats with one class an image, and image mask what --mask_column names "
                "(or the phantom has): leave it away"
            )

    @property
    def stacks_mask(self) -> bool:
        """Whether the masks of single images become their last channel."""
        return self.channels == ("image", "mask") and (self.source == "phantom" or self.mask_column is not None)


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
    """Optimizer updates over which the learning rate rises."""
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
    """Push the finished folder to the Hub."""
    hub_model_id: str | None = None
    """Hub repository, user/name."""
    hub_private_repo: bool = True
    """Make the Hub repository private."""

    def augmentation(self) -> dict[str, object]:
        """Keyword arguments of `medsd.data.transforms.Augmentation`."""
        return {name: getattr(self, f"random_{name}") for name in ("shift", "rotation", "scale", "intensity", "flip")}

    def cadence(self) -> dict[str, int | None]:
        """Keyword arguments of `medsd.training.loop.Cadence`."""
        steps = {"last": self.max_train_steps, "logging": self.logging_steps, "validation": self.validation_steps}
        return steps | {"checkpointing": self.checkpointing_steps, "checkpoints_kept": self.checkpoints_total_limit}

    def optimisation(self, default_rate: float) -> dict[str, object]:
        """Keyword arguments of `medsd.training.setup.Optimisation`."""
        names = ("use_8bit_adam", "lr_scheduler", "lr_warmup_steps", "max_train_steps", "use_ema", "compile")
        return {"learning_rate": self.learning_rate or default_rate} | {name: getattr(self, name) for name in names}

    def settings(self, processes: int) -> dict[str, object]:
        """What determines the result: the fields that have an effect, and the number of images in an update."""
        steps = {"max_train_steps"} if self.lr_scheduler == "constant" else set()
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in WITHOUT_EFFECT | steps}
        return chosen | {"effective_batch_size": self.train_batch_size * self.gradient_accumulation_steps * processes}

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.push_to_hub and self.hub_model_id is None:
            raise InputError("--push_to_hub needs --hub_model_id user/name")
        if self.early_stopping is not None and self.validation_steps == 0:
            raise InputError("--early_stopping goes by looks at held-out images, and --validation_steps 0 has none: drop one")
        if self.allow_config_change and not self.resume_from_checkpoint:
            raise InputError("--allow_config_change belongs to --resume_from_checkpoint: give both")
        if self.overwrite and self.resume_from_checkpoint:
            raise InputError("--overwrite and --resume_from_checkpoint exclude each other: drop one")
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
    preset: Literal["tiny", "small", "sd15"] | None = None
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
        if self.loss_type != "huber" and (self.huber_schedule, self.huber_c) != ("snr", 0.1):
            raise InputError("--huber_schedule and --huber_c belong to --loss_type huber: give that, too")
        augmented = any(value not in {0, "none"} for value in self.augmentation().values())
        if self.cache_latents and augmented and self.cached_augmentations is None:
            raise InputError("--cache_latents keeps images as they are: drop the --random_* flags, or give --cached_augmentations 8")
        if self.cached_augmentations is not None and not (self.cache_latents and augmented):
            raise InputError("--cached_augmentations belongs to --cache_latents with --random_* flags: give these, too")
        for field in ("noise_offset", "input_perturbation"):
            if getattr(self, field) < 0:
                raise InputError(f"--{field} {getattr(self, field)}: 0 or more is expected")
        for field in ("huber_c", "lesion_weight"):
            if getattr(self, field) <= 0:
                raise InputError(f"--{field} {getattr(self, field)}: a number above 0 is expected")


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

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.decoder_only and self.pretrained_model_name_or_path is None:
            raise InputError("--decoder_only keeps a pretrained encoder: give --pretrained_model_name_or_path")
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


@dataclass
class GenerateConfig(RecipeConfig):
    """Generate images of each class."""

    section: ClassVar[str] = "generate"

    pipeline: str = "runs/{name}/unet"
    """Pipeline folder or Hub id."""
    output_dir: str = "runs/{name}/images"
    """Folder of the images: CLASS/NNNNN.png and manifest.jsonl."""
    class_name: tuple[str, ...] | None = None
    """Classes to generate. Default: every class."""
    num_images: int = 16
    """Images per class."""
    num_inference_steps: int = 30
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Classifier-free guidance (Ho and Salimans, 2022); 1 is none."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class. Default: the pipeline's own."""
    seed: int = 0
    """Seed of the first image; image i of a class uses seed + i."""
    batch_size: int = 16
    """Images per batch."""
    overwrite: bool = False
    """Replace what is already in output_dir."""


@dataclass
class ClassifyConfig(RecipeConfig):
    """Score class likelihoods of a data set with a diffusion model, and measure them."""

    section: ClassVar[str] = "classify"

    pipeline: str = "runs/{name}/unet"
    """Pipeline folder or Hub id."""
    dataset_name: str = "runs/{name}/data"
    """Prepared data folder or Hub id."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to score."""
    output_dir: str = "runs/{name}/scores"
    """Folder of likelihoods.parquet and metrics.json."""
    mode: Literal["posterior", "decide", "full"] = "posterior"
    """posterior: stop when the probabilities are known well; decide: stop when one class is left; full: all pairs."""
    weighting: Literal["uniform", "elbo"] = "uniform"
    """Weights over timesteps: uniform ranks best, elbo is the bound itself."""
    max_pairs: int = 64
    """(timestep, noise) pairs per image and class, at most."""
    delta: float = 0.05
    """Probability that a decision may differ from the one of all pairs."""
    calibrate: Literal["validation", "none"] = "validation"
    """Split that temperature and class bias are fitted on; none uses what the pipeline holds."""
    prior: Literal["uniform", "train"] = "uniform"
    """Class prior: equal, or the training split's frequencies."""
    max_samples: int | None = None
    """Score at most this many images, and calibrate on at most this many."""
    batch_size: int = 64
    """Rows (image x class x pair) per UNet call."""
    seed: int = 0
    """Seed of timesteps and noise."""
    overwrite: bool = False
    """Replace what is already in output_dir."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if not 0 < self.delta < 1:
            raise InputError(f"--delta {self.delta} is not between 0 and 1")


RECIPES: tuple[type[RecipeConfig], ...] = (PrepareDataConfig, FinetuneVAEConfig, FinetuneUNetConfig, GenerateConfig, ClassifyConfig)
