"""The flags of the recipes that use a trained pipeline."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.base import RecipeConfig
from medsd.errors import InputError


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
