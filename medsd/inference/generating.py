"""Images drawn by class, batch by batch, and drawn again where the model's own classifier takes them for another class.

A *batch* is a fixed handful of images of one class, and the unit of work: an image's last bit depends on what is computed beside it,
so the same batches give the same bits whatever process of as many threads draws them, and after whatever interruption. An *attempt* is
one drawing of an image; the first is number 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from medsd.data.intensity import nominal_ranges
from medsd.errors import InputError
from medsd.inference.animation import Film
from medsd.inference.pipeline import MedSDPipeline

CHECK_PAIRS = 16
"""(timestep, noise) pairs of the classifier, an image and class at most: more would cost several times what drawing the image does."""
FIRST_SEEDS = 2**25
"""Further attempts are so many seeds apart. torch's generator on a CPU reads 32 bits of a seed, which makes room for 128 attempts."""


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    num_inference_steps: int = 30
    guidance_scale: float = 2.0
    """Classifier-free guidance (Ho & Salimans, 2022); 1 is none."""
    seed: int = 0
    batch_size: int = 16
    min_probability: float | None = None
    """An image whose own class gets less is drawn again; None keeps every image."""
    max_tries: int = 5
    """Attempts at most, up to 128; then the likeliest stays."""

    def told(self, scheduler: str, class_name: str | None) -> dict[str, Any]:
        """How images of a class are drawn, for a record."""
        guidance = self.guidance_of(class_name)
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": guidance, "scheduler": scheduler, "seed": self.seed}

    def guidance_of(self, class_name: str | None) -> float:
        """Without a class there is nothing to guide to."""
        return 1.0 if class_name is None else self.guidance_scale


@dataclass(frozen=True)
class Batch:
    """Some images of one class."""

    class_name: str | None
    """None for a pipeline without classes."""
    indices: range
    """Of the images among those of their class."""


@dataclass(frozen=True)
class Drawn:
    """Of B images."""

    images: torch.Tensor
    """`(B, C, H, W)` float32 in `[-1, 1]` on the CPU."""
    seeds: list[int]
    """That draw these images, by `torch.Generator().manual_seed`."""
    tries: list[int]
    """Attempts that were made."""
    probabilities: list[float] | None
    """Of each image's own class among all classes, by the pipeline's classifier; None where none was asked for."""
    accepted: list[bool]
    """False where no attempt reached the probability that was asked for."""
    frames: dict[int, torch.Tensor] = field(default_factory=dict)
    """Place in the batch -> `(F, C, H, W)` on the way from noise to the image, of the images that are filmed."""


def image_seed(seed: int, index: int, attempt: int = 0) -> int:
    """Seed of an attempt at image `index`: `seed` + index at first. No two attempts at images of one class share one."""
    return (seed + index + attempt * FIRST_SEEDS) % 2**32


def batches(class_names: Sequence[str | None], num_images: int, batch_size: int) -> list[Batch]:
    """Fixed batches of `num_images` images of each class."""
    parts = [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]
    return [Batch(name, indices) for name in class_names for indices in parts]


def use_scheduler(pipe: MedSDPipeline, name: str | None) -> None:
    """Draw with the diffusers scheduler class of that name, set up as the pipeline's own; None keeps that. Raises InputError."""
    import diffusers

    if name is None:
        return
    found = getattr(diffusers, name, None)
    usable = isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin) and hasattr(found, "scale_model_input")
    if not usable or found.__name__ not in {type(pipe.scheduler).__name__, *(kind.__name__ for kind in pipe.scheduler.compatibles)}:
        raise InputError(
            f"--scheduler {name}: no scheduler of diffusers that fits this pipeline; DDIMScheduler and DPMSolverMultistepScheduler are two"
        )
    pipe.scheduler = found.from_config(pipe.scheduler.config)


def describe_scheduler(pipe: MedSDPipeline) -> dict[str, str]:
    """Class and settings of the pipeline's scheduler, as text; without diffusers' notes, whose order differs from run to run."""
    settings = {name: str(value) for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {"class": type(pipe.scheduler).__name__} | settings


def check_sampling(pipe: MedSDPipeline, sampling: Sampling) -> None:
    """Raise InputError for what this pipeline cannot draw so."""
    most = pipe.noise_schedule.config.num_train_timesteps
    if sampling.num_inference_steps > most:
        raise InputError(f"--num_inference_steps {sampling.num_inference_steps}: the pipeline's schedule has {most}")
    if sampling.min_probability is not None and (len(pipe.class_names) < 2 or pipe.data.multi_label):
        known = "findings that can hold together" if pipe.data.multi_label else f"{len(pipe.class_names)} classes"
        raise InputError(f"--min_probability needs two or more classes that exclude each other; this pipeline knows {known}: leave it away")


def draw_batch(pipe: MedSDPipeline, class_name: str | None, indices: Sequence[int], sampling: Sampling, filmed: int = 0) -> Drawn:
    """Images `indices` of a class (None for a pipeline without classes), of which those below number `filmed` are filmed.

    With `min_probability`, those that the classifier gives less are drawn again, alone. Raises InputError as `check_sampling` does.
    """
    check_sampling(pipe, sampling)
    drawn = _attempt(pipe, class_name, indices, sampling, 0, filmed)
    for attempt in range(1, sampling.max_tries):
        places = [place for place, accepted in enumerate(drawn.accepted) if not accepted]
        if places:
            again = _attempt(pipe, class_name, [indices[place] for place in places], sampling, attempt, filmed)
            drawn = _better_of(drawn, again, places)
    return drawn


def _attempt(pipe: MedSDPipeline, class_name: str | None, indices: Sequence[int], sampling: Sampling, attempt: int, filmed: int) -> Drawn:
    seeds = [image_seed(sampling.seed, index, attempt) for index in indices]
    film = Film([place for place, index in enumerate(indices) if index < filmed])
    unit = pipe(
        class_name=class_name,
        num_images_per_prompt=len(seeds),
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_of(class_name),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        callback_on_step_end=film,
    ).images
    images, tries = unit * 2 - 1, [attempt + 1] * len(seeds)
    if sampling.min_probability is None:
        return Drawn(images, seeds, tries, None, [True] * len(seeds), film.frames(pipe))
    found = own_probabilities(pipe, class_name, images, sampling.seed)
    return Drawn(images, seeds, tries, found, [value >= sampling.min_probability for value in found], film.frames(pipe))


def own_probabilities(pipe: MedSDPipeline, class_name: str, images: torch.Tensor, seed: int = 0) -> list[float]:
    """What the pipeline's classifier gives `class_name` for images `(B, C, H, W)` in `[-1, 1]`."""
    data = pipe.data
    source = data.intensity_map.from_unit(images).numpy()
    # An image is looked at in the range that it was drawn for, not in one that is measured on it.
    ranges = np.tile(np.float32(nominal_ranges(data.intensity_map, data.image_channels)), (len(source), 1, 1))
    output = pipe.classify(list(source), mode="posterior", max_pairs=CHECK_PAIRS, seed=seed, ranges=ranges)
    return output.probabilities[:, data.class_names.index(class_name)].tolist()


def _better_of(drawn: Drawn, again: Drawn, places: Sequence[int]) -> Drawn:
    """`drawn` with those of `again`, which stand for `places`, that are likelier."""
    images, frames = drawn.images.clone(), dict(drawn.frames)
    seeds, tries = list(drawn.seeds), list(drawn.tries)
    probabilities, accepted = list(drawn.probabilities), list(drawn.accepted)
    for number, place in enumerate(places):
        tries[place] = again.tries[number]
        if again.probabilities[number] > probabilities[place]:
            images[place], seeds[place] = again.images[number], again.seeds[number]
            probabilities[place], accepted[place] = again.probabilities[number], again.accepted[number]
            frames |= {place: again.frames[number]} if number in again.frames else {}
    return replace(drawn, images=images, seeds=seeds, tries=tries, probabilities=probabilities, accepted=accepted, frames=frames)
