"""What a visitor of a page that runs asks of a pipeline, answered in HTML.

Slices count from 1 here, as on the page. `Progress` is told (done, total) or None, and a description.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medsd.data.export import Origin
from medsd.data.intensity import label_channels
from medsd.data.upload import Upload, take_upload
from medsd.errors import InputError
from medsd.inference.animation import Film
from medsd.inference.generating import Sampling, check_sampling
from medsd.inference.pipeline import MedSDPipeline
from medsd.report.fragments import alert, answer, generated, rivals, seen

Progress = Callable[..., Any]
MINUTES = 30
"""After which a page forgets a dropped image."""
MOST_PROMPTS = 10


def takes_prompts(pipe: MedSDPipeline) -> bool:
    """Whether visitors write prompts, since there are no classes."""
    return pipe.reads_prompts and not pipe.class_names


def cannot_classify(pipe: MedSDPipeline) -> str | None:
    """Why not, of a pipeline that cannot."""
    if len(pipe.class_names) < 2 and not pipe.data.multi_label and not takes_prompts(pipe):
        return f"This model knows {len(pipe.class_names)} classes and no prompts: classification needs two or more."
    if label_channels(pipe.data.intensity_map, pipe.data.image_channels):
        return "This model was trained on images with their masks, which tell the class: it does not classify."
    return None


def generate(
    pipe: MedSDPipeline, class_name: str | None, prompt: str | None, seed: int, steps: int, guidance: float, progress: Progress
) -> str:
    """An image and moments of its way from noise: of a class the first one of `generate.py --seed SEED`.

    Raises InputError for what the pipeline cannot draw.
    """
    check_sampling(pipe, Sampling(num_inference_steps=steps))
    film, guidance = Film([0]), guidance if class_name or prompt else 1.0

    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress((step + 1, steps), desc="denoising")
        return film(pipe, step, timestep, tensors)

    unit = pipe(
        **({"class_name": class_name} if class_name else {"prompt": prompt or ""}),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed)],
        output_type="pt",
        callback_on_step_end=after_step,
    ).images
    sampling = f"{steps} steps of {type(pipe.scheduler).__name__}, guidance {guidance:g}"
    return generated(unit[0] * 2 - 1, film.frames(pipe)[0], Origin(class_name or prompt or None, seed, pipe.fingerprint(), sampling))


def or_alert(make: Callable[..., str], *arguments: Any) -> str:
    """What `make` makes, or the mistake that the visitor can mend."""
    try:
        return make(*arguments)
    except InputError as error:
        return alert(" ".join(str(error).split()))


def receive(pipe: MedSDPipeline, path: Path) -> tuple[Upload | None, str]:
    """A dropped file, which is gone then; or nothing, and why."""
    try:
        upload = take_upload(path, pipe.data)
        pipe.fit_image(upload.images[0])
    except InputError as error:
        return None, " ".join(str(error).split())
    return upload, ""


def look(pipe: MedSDPipeline, upload: Upload | None, number: int) -> str:
    """A slice as the model sees it; nothing without one."""
    if upload is None:
        return ""
    caption = f"{upload.modality or 'Image'}, {slice_in_words(upload, number)}, as the model sees it. The file itself is deleted."
    return seen(pipe, upload.images[number - 1], upload.range_of(number - 1), caption)


def slice_in_words(upload: Upload, number: int) -> str:
    """Which of a file's slices."""
    return f"slice {number} of {len(upload)}" if len(upload) > 1 else "the only slice"


def classify(pipe: MedSDPipeline, upload: Upload | None, number: int, text: str | None, max_pairs: int, progress: Progress) -> str:
    """The answer to a slice; `text` holds prompts, one a line, for a pipeline without classes.

    Raises InputError without an image or prompts.
    """
    if upload is None:
        raise InputError(f"no image: drop one first (after {MINUTES} minutes it is forgotten)")
    image, ranges = upload.images[number - 1], upload.range_of(number - 1)
    prompts = prompts_of(text or "") if takes_prompts(pipe) else None
    most = max_pairs * len(prompts or pipe.hypotheses.sets)
    counted = Counted(most, progress)
    output = pipe.classify([image], prompts=prompts, max_pairs=max_pairs, ranges=ranges, progress=counted)
    progress(None, desc="looking for evidence")
    evidence = pipe.evidence(image, *rivals(output), max_pairs=max_pairs, ranges=ranges)
    before = f"{slice_in_words(upload, number).capitalize()}, most probably:"
    return answer(output, prompts or pipe.class_names, evidence, before, upload.remarks(pipe.data), most)


def prompts_of(text: str) -> list[str]:
    """Different prompts, one a line. Raises InputError for too few or too many."""
    prompts = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not 2 <= len(prompts) <= MOST_PROMPTS:
        raise InputError(f"{len(prompts)} prompts; 2 to {MOST_PROMPTS} different ones, one a line, are expected")
    return prompts


class Counted:
    """A `progress` of `classify` that adds up rows."""

    def __init__(self, most: int, progress: Progress) -> None:
        self.done, self.most, self.progress = 0, most, progress

    def __call__(self, rows: int) -> None:
        """Tell the share of the rows that there are at most."""
        self.done = min(self.done + rows, self.most)
        self.progress((self.done, self.most), desc="scoring", unit="rows")
