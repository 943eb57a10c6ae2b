"""The flags of the recipes that use a trained pipeline."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.base import RecipeConfig
from medsd.errors import InputError

MOST_TRIES = 128
"""Of one image, each with seeds of its own."""
SEEDS = 2**32
"""torch's generator on a CPU tells so many seeds apart."""


@dataclass
class GenerateConfig(RecipeConfig):
    """Generate images of each class."""

    section: ClassVar[str] = "generate"

    pipeline: str = "runs/{name}/unet"
    """Pipeline folder or Hub id."""
    output_dir: str = "runs/{name}/images"
    """Folder of the images: CLASS/NNNNN.png, .nii.gz or .dcm, and manifest.jsonl."""
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
    format: Literal["png", "nifti", "dicom"] = "png"
    """png: a view, or with --bits 16 one channel's values; nifti: all channels in the source's unit; dicom: secondary capture of one
    channel, in HU for CT."""
    bits: Literal[8, 16] = 8
    """Of a PNG. 16: the source's own unit, from the low to the high that the manifest names."""
    gif: bool = False
    """Write how images come out of noise, as an animation."""
    gif_samples: int = 1
    """Images of each class that get an animation."""
    gif_format: Literal["gif", "webp"] = "gif"
    """Kind of the animation."""
    min_probability: float | None = None
    """Draw an image again while the pipeline's own classifier gives its class less than this. Default: keep every image."""
    max_tries: int = 5
    """Times that an image is drawn at most; then the likeliest stays, marked as not accepted."""
    overwrite: bool = False
    """Replace what is already in output_dir."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if self.bits == 16 and self.format != "png":
            raise InputError(f"--bits 16 is for PNG, and --format {self.format} keeps values without it: leave one away")
        if not self.gif and (self.gif_samples, self.gif_format) != (1, "gif"):
            raise InputError("--gif_samples and --gif_format say how animations are made: add --gif")
        if self.min_probability is None and self.max_tries != 5:
            raise InputError(f"--max_tries {self.max_tries} is for images that are drawn again: add --min_probability")
        if self.min_probability is not None and not 0 < self.min_probability < 1:
            raise InputError(f"--min_probability {self.min_probability} is not between 0 and 1")
        if self.max_tries > MOST_TRIES:
            raise InputError(f"--max_tries {self.max_tries}: at most {MOST_TRIES}")
        if self.seed + self.num_images > SEEDS:
            raise InputError(f"--seed {self.seed}: seeds from {SEEDS} on repeat smaller ones, so choose one below that by --num_images")


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
    max_calibration: int = 2000
    """Calibrate on at most this many images."""
    prior: str = "uniform"
    """Class prior: uniform, train (the training split's frequencies), or a YAML file of CLASS: PROBABILITY. Sets of findings have that of
    their frequency in training."""
    group_by: Literal["patient", "series"] | None = None
    """Join the images of each patient or series: groups.parquet, patient_auroc and patient_accuracy."""
    max_samples: int | None = None
    """Score at most this many images, the classes in proportion, and calibrate on at most this many."""
    keys: tuple[str, ...] = ()
    """Score only the images with these keys."""
    label_map: tuple[str, ...] = ()
    """Classes of the data that the pipeline knows by another name: THEIRS=OURS ..."""
    evidence: bool = False
    """Write where an image speaks for its class, for the images of --keys, else for the first ones."""
    compile: bool = False
    """Compile the UNet with torch.compile, on a GPU with CUDA graphs: minutes at the start, faster calls."""
    batch_size: int | None = None
    """Rows (image x class x pair) per UNet call, rounded up to a multiple of 16. Default: 64 on a CPU, what fits a GPU's memory."""
    seed: int = 0
    """Seed of timesteps and noise."""
    overwrite: bool = False
    """Replace what is already in output_dir."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if not 0 < self.delta < 1:
            raise InputError(f"--delta {self.delta} is not between 0 and 1")


@dataclass
class AppConfig(RecipeConfig):
    """Serve a page that generates and classifies with a pipeline; needs Gradio, the extra `app`."""

    section: ClassVar[str] = "app"

    pipeline: str = "runs/{name}/unet"
    """Pipeline folder or Hub id. The environment variable MEDSD_PIPELINE, where it is set, stands in for this default."""
    server_name: str | None = None
    """Address to listen at; 0.0.0.0 lets other machines in. Default: Gradio's own, GRADIO_SERVER_NAME, else 127.0.0.1, this machine."""
    server_port: int | None = None
    """Port to listen at. Default: Gradio's own, GRADIO_SERVER_PORT, else the first free one from 7860 on."""
    share: bool = False
    """Let others in through a tunnel of Gradio's: what is dropped on the page then leaves this machine."""
    num_inference_steps: int = 30
    """Denoising steps that the page begins with."""
    guidance_scale: float = 2.0
    """Classifier-free guidance (Ho and Salimans, 2022) that the page begins with; 1 is none."""
    max_pairs: int = 64
    """(timestep, noise) pairs per image and class, at most; a calibration is for as many."""
    push_space: str | None = None
    """Push this page to the Hub as a Space, user/name, instead of serving it; the pipeline is a Hub id then."""
    hub_private_repo: bool = True
    """Make the Space private."""
