"""The flags of `evaluate.py`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from medsd.config.base import RecipeConfig
from medsd.errors import InputError


@dataclass
class EvaluateConfig(RecipeConfig):
    """Judge what a pipeline generates, audit it for copies of training images, and write the report."""

    section: ClassVar[str] = "evaluate"

    pipeline: str = "runs/{name}/unet"
    """Pipeline folder or Hub id."""
    dataset_name: str = "runs/{name}/data"
    """Prepared data folder or Hub id: the one that the pipeline was trained on, or the audit is left out."""
    label_map: tuple[str, ...] = ()
    """Classes of the data that the pipeline knows by another name: THEIRS=OURS ..."""
    split: Literal["validation", "test"] = "test"
    """Split whose images are the real ones."""
    output_dir: str = "runs/{name}/report"
    """Folder of metrics.json, report.html, audit.json and figures."""
    scores: str = "runs/{name}/scores"
    """Folder that classify.py wrote, for the classifier's part; left out where it is not there."""
    sweep: str = "runs/{name}/sweep"
    """Folder that sweep_data_size.py wrote, for its figure; left out where it is not there."""
    features: str = "unet"
    """What images are compared by: unet or codec (the pipeline's own), a prepared data folder (a ResNet trained on its classes), a
    vision model of transformers (folder or Hub id), or a file of Inception's or RadImageNet's weights."""
    num_samples: int = 256
    """Images to generate, the classes as often as among the real ones."""
    max_samples: int | None = None
    """Compare with at most this many real images, the classes in proportion."""
    num_inference_steps: int = 30
    """Denoising steps."""
    guidance_scale: float = 2.0
    """Classifier-free guidance (Ho and Salimans, 2022); 1 is none."""
    scheduler: str | None = None
    """Name of a diffusers scheduler class. Default: the pipeline's own."""
    batch_size: int = 16
    """Generated images per batch."""
    false_positive_rate: float = 0.01
    """Share of images that are no copies which the audit may flag."""
    utility: bool = False
    """Also train classifiers on generated and on real images (and a segmentation where masks are generated), and test them on real ones."""
    seed: int = 0
    """Seed of the generated images and of what is trained on them."""
    overwrite: bool = False
    """Replace what is already in output_dir."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        if not 0 < self.false_positive_rate < 1:
            raise InputError(f"--false_positive_rate {self.false_positive_rate} is not between 0 and 1")
