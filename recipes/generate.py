"""Generate images of each class.

python recipes/generate.py
python recipes/generate.py --pipeline runs/phantom/unet --class_name epidural --num_images 8 --guidance_scale 2
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import GenerateConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    from medsd.inference.pipeline import MedSDPipeline


def main(config: GenerateConfig) -> None:
    """Write CLASS/NNNNN.png, manifest.jsonl and an overview."""
    import torch
    from accelerate import Accelerator
    from tqdm import tqdm

    from medsd.inference.pictures import grid, picture
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.output import check_output, partial_folder, replace_folder
    from medsd.runtime import quiet_libraries, use_all_cores

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, [config.pipeline])
    accelerator = Accelerator()
    use_all_cores(accelerator)
    pipe = MedSDPipeline.from_pretrained(config.pipeline).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    names = check_classes(config.class_name, pipe)
    if config.scheduler:
        pipe.scheduler = find_scheduler(config.scheduler).from_config(pipe.scheduler.config)
    made = partial_folder(output_dir)
    manifest, overview = [], []
    with tqdm(total=len(names) * config.num_images, desc="generating", unit="image") as bar:
        for name in names:
            folder = folder_name(name)
            (made / folder).mkdir()
            images = []
            for seeds in batches(config):
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                images.extend(
                    pipe(
                        class_name=name,
                        num_images_per_prompt=len(seeds),
                        num_inference_steps=config.num_inference_steps,
                        guidance_scale=config.guidance_scale,
                        generator=generators,
                        output_type="pt",
                    ).images
                    * 2
                    - 1
                )
                bar.update(len(seeds))
            for index, image in enumerate(images):
                file = f"{folder}/{index:05d}.png"
                picture(image).save(made / file)
                manifest.append({"file": file, "class": name, "seed": config.seed + index})
            overview.append(torch.stack(images[:8]))
    grid(torch.stack(overview)).save(made / "overview.png")
    (made / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    replace_folder(made, output_dir)
    print(f"{len(manifest)} images in {output_dir}, look at {output_dir / 'overview.png'}")


def check_classes(wanted: tuple[str, ...] | None, pipe: "MedSDPipeline") -> list[str | None]:
    """The classes to generate; [None] for a pipeline without classes."""
    unknown = [name for name in wanted or () if name not in pipe.class_names]
    if unknown:
        raise InputError(f"--class_name {unknown[0]}: unknown; this pipeline knows {', '.join(pipe.class_names) or 'none'}")
    return list(wanted or pipe.class_names) or [None]


def folder_name(class_name: str | None) -> str:
    """A class's name as a folder, whatever characters are in it."""
    return re.sub(r"[^\w .+-]", "-", class_name or "unconditional").strip(". ") or "class"


def find_scheduler(name: str) -> Any:
    """A diffusers scheduler class."""
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)):
        raise InputError(f"--scheduler {name}: no such scheduler in diffusers; DDIMScheduler and DPMSolverMultistepScheduler are two")
    return found


def batches(config: GenerateConfig) -> list[list[int]]:
    """Seeds of the images, in batches."""
    seeds = range(config.seed, config.seed + config.num_images)
    return [list(seeds[start : start + config.batch_size]) for start in range(0, len(seeds), config.batch_size)]


if __name__ == "__main__":
    run(main, GenerateConfig)
