"""Generate images of each class, as PNG, NIfTI or DICOM that say they are synthetic.

    python recipes/generate.py
    python recipes/generate.py --pipeline runs/phantom/unet --class_name epidural --num_images 8 --gif --output_dir runs/phantom/epidural
    accelerate launch --config_file recipes/configs/accelerate/ddp.yaml recipes/generate.py --format dicom --min_probability 0.5

Started again after it was stopped, it goes on: no batch is drawn twice, and the images are those of a run that was not stopped.
"""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import medsd
from medsd.commandline import run
from medsd.config import GenerateConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from medsd.inference.gallery import Gallery
    from medsd.inference.generating import Batch, Drawn, Sampling
    from medsd.inference.pipeline import MedSDPipeline

OVERVIEW_COLUMNS = 8


def main(config: GenerateConfig) -> None:
    """Into a folder that no other run writes."""
    from medsd.output import alone_in, check_output
    from medsd.runtime import quiet_libraries, start_processes

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline])
    accelerator = start_processes()
    with alone_in(output_dir) if accelerator.is_main_process else nullcontext():
        try:
            write_images(config, accelerator)
        except KeyboardInterrupt:
            if accelerator.is_main_process:
                print("the same command goes on from what is drawn")
            raise


def write_images(config: GenerateConfig, accelerator: "Accelerator") -> None:
    """Draw, export, put in place."""
    from medsd.inference.exporting import check_format
    from medsd.inference.gallery import Gallery
    from medsd.inference.generating import batches, check_sampling, use_scheduler
    from medsd.inference.pipeline import MedSDPipeline

    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    use_scheduler(pipe, config.scheduler)
    names, sampling = chosen_classes(config.class_name, pipe), sampling_of(config)
    check_sampling(pipe, sampling)
    check_format(pipe.data, config.format, config.bits)
    todo = batches(names, config.num_images, config.batch_size)
    gallery = Gallery(Path(config.output_dir), settings(config, pipe, names))
    with accelerator.main_process_first():
        if accelerator.is_main_process and (done := gallery.begin()):
            print(f"{done} images are drawn already: going on")
    draw(config, pipe, accelerator, todo, sampling, gallery)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(config, names, gallery)


def chosen_classes(wanted: tuple[str, ...] | None, pipe: "MedSDPipeline") -> list[str | None]:
    """The classes to generate, each once; [None] for a pipeline without classes."""
    unknown = [name for name in wanted or () if name not in pipe.class_names]
    if unknown:
        raise InputError(f"--class_name {unknown[0]}: unknown; this pipeline knows {', '.join(pipe.class_names) or 'none'}")
    return list(dict.fromkeys(wanted or pipe.class_names)) or [None]


def sampling_of(config: GenerateConfig) -> "Sampling":
    """What of the flags says how images are drawn."""
    from dataclasses import fields

    from medsd.inference.generating import Sampling

    return Sampling(**{field.name: getattr(config, field.name) for field in fields(Sampling)})


def settings(config: GenerateConfig, pipe: "MedSDPipeline", names: list[str | None]) -> dict[str, Any]:
    """All that determines the files."""
    from medsd.inference.generating import describe_scheduler

    fixed = asdict(config) | {"class_name": names, "medsd": medsd.__version__, "device": pipe.device.type}
    fixed |= {"pipeline": pipe.fingerprint(), "precision": str(pipe.unet.dtype), "scheduler": describe_scheduler(pipe)}
    fixed |= {"data": pipe.data.to_dict(), "calibration": asdict(pipe.info.calibration) if pipe.info.calibration else None}
    return {name: value for name, value in fixed.items() if name not in {"output_dir", "overwrite"}}


def draw(
    config: GenerateConfig, pipe: "MedSDPipeline", accelerator: "Accelerator", todo: "list[Batch]", sampling: "Sampling", gallery: "Gallery"
) -> None:
    """This process's share of the batches that are not drawn yet."""
    from tqdm import tqdm

    from medsd.inference.gallery import folder_names
    from medsd.inference.generating import draw_batch

    folders, done, model = folder_names(pipe.class_names), gallery.done(), pipe.fingerprint()
    accelerator.wait_for_everyone()
    own = [number for number in range(len(todo)) if number not in done][accelerator.process_index :: accelerator.num_processes]
    total = sum(len(todo[number].indices) for number in own)
    with tqdm(total=total, desc="generating", unit="image", disable=not accelerator.is_main_process) as bar:
        for number in own:
            batch = todo[number]
            drawn = draw_batch(pipe, batch.class_name, batch.indices, sampling, config.gif_samples if config.gif else 0)
            lines = write_batch(config, pipe, batch, drawn, gallery.files, folders[batch.class_name], model)
            shown = [place for place, index in enumerate(batch.indices) if index < OVERVIEW_COLUMNS]
            gallery.add(number, lines, drawn.images[shown])
            bar.update(len(batch.indices))


def write_batch(
    config: GenerateConfig, pipe: "MedSDPipeline", batch: "Batch", drawn: "Drawn", files: Path, folder: str, model: str
) -> list[dict[str, Any]]:
    """The files of a batch, in `folder` of `files`; returns the manifest's lines."""
    from medsd.data.export import Origin
    from medsd.inference.exporting import WRITERS, write_film

    suffix, write = WRITERS[config.format, config.bits]
    guidance = sampling_of(config).guidance_of(batch.class_name)
    sampling = f"{config.num_inference_steps} steps of {type(pipe.scheduler).__name__}, guidance {guidance:g}"
    (files / folder).mkdir(parents=True, exist_ok=True)
    lines = []
    for place, index in enumerate(batch.indices):
        origin, stem = Origin(batch.class_name, drawn.seeds[place], model, sampling), f"{folder}/{index:05d}"
        told = {"file": f"{stem}{suffix}", "class": batch.class_name, "seed": origin.seed, "tries": drawn.tries[place]}
        told |= {"probability": drawn.probabilities and drawn.probabilities[place], "accepted": drawn.accepted[place], "model": model}
        told |= write(pipe.data, drawn.images[place], files / f"{stem}{suffix}", origin, index)
        lines.append(told | write_film(drawn.frames.get(place), files, f"{stem}.{config.gif_format}", origin))
    return lines


def finish(config: GenerateConfig, names: list[str | None], gallery: "Gallery") -> None:
    """Write the overview and the manifest, put the folder in its place, and say what is in it."""
    from medsd.data.export import SYNTHETIC, png_texts
    from medsd.inference.gallery import OVERVIEW
    from medsd.inference.pictures import grid

    lines, texts = gallery.lines(), {"Software": f"medsd {medsd.__version__}", "Description": SYNTHETIC}
    sheet = grid(gallery.views().unflatten(0, (len(names), -1)), [name for name in names if name is not None])
    sheet.save(gallery.files / OVERVIEW, pnginfo=png_texts(texts))
    gallery.publish()
    if config.min_probability is not None:
        again, below = sum(line["tries"] > 1 for line in lines), sum(not line["accepted"] for line in lines)
        print(f"{again} images were drawn again; {below} of them stayed below {config.min_probability} (accepted: false)")
    print(f"{len(lines)} images in {config.output_dir}, look at {Path(config.output_dir) / OVERVIEW}")


if __name__ == "__main__":
    run(main, GenerateConfig)
