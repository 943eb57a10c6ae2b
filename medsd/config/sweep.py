"""The flags of `sweep_data_size.py`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from medsd.config.base import RecipeConfig
from medsd.config.training import Preset
from medsd.errors import InputError

PRESETS: tuple[str, ...] = get_args(Preset)


@dataclass
class SweepConfig(RecipeConfig):
    """Train on nested shares of the patients, with several seeds and models, and see what more patients bring."""

    section: ClassVar[str] = "sweep_data_size"

    config: str | None = None
    """YAML file, whose sections of the other recipes say how each cell is trained, classified and evaluated."""
    dataset_name: str = "runs/{name}/data"
    """Prepared data folder or Hub id."""
    output_dir: str = "runs/{name}/sweep"
    """Folder of results.csv, data_size.png and a folder per cell, MODEL-FRACTION-SEED."""
    fractions: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Shares of the training patients; with one seed, those of a smaller share are among those of a larger."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own patients, weights and order of images."""
    models: tuple[str, ...] = ("tiny",)
    """Presets to train from random weights, or pipelines (folder, Hub id) to fine-tune; called by the last part of their name."""
    features: str | None = None
    """What images are compared by, as for evaluate.py. Default: a ResNet trained on dataset_name, since a model's own features do not
    compare models."""
    metrics: tuple[str, ...] = ("auroc", "fid")
    """Numbers of metrics.json that are drawn and printed; results.csv has all."""
    parallel: int | None = None
    """Cells at once. Default: one on each GPU, without any one on each core."""
    overwrite: bool = False
    """Replace what is already in output_dir. Without it, a sweep goes on with what is missing."""

    def check(self) -> None:
        """And the rules of this recipe."""
        super().check()
        for field in ("fractions", "seeds", "models", "metrics"):
            values = [model_name(value) if field == "models" else value for value in getattr(self, field)]
            if not values:
                raise InputError(f"--{field}: one or more are expected")
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise InputError(f"--{field}: {twice[0]} is there twice, and a cell's folder is named by it: name each once")
        if wrong := [fraction for fraction in self.fractions if not 0 < fraction <= 1]:
            raise InputError(f"--fractions {wrong[0]:g}: shares of the patients, above 0 and at most 1, are expected")
        if wrong := [seed for seed in self.seeds if seed < 0]:
            raise InputError(f"--seeds {wrong[0]}: 0 or more is expected")


def model_name(model: str) -> str:
    """A preset's name, or the last part of a pipeline's folder or Hub id."""
    return model if model in PRESETS else Path(model).resolve().name
