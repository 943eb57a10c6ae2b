"""Training images per second: medsd's recipe beside a plain loop in the manner of diffusers' `train_text_to_image.py`.

    python benchmarks/training_speed.py --work /tmp/speed
    python benchmarks/training_speed.py --work /tmp/speed --setting sd15

Settings: the small preset in latents of an autoencoder (128 px, float32, a CPU), and the shape of Stable Diffusion 1.5 (512 px, bf16,
all of the UNet, a GPU); random weights. The sides take turns, each in a fresh process with the same number of threads:

- plain: that script's steps and defaults. Each image becomes a tensor by itself, in a `DataLoader` without workers; autoencoder and
  text encoder run at every step, and every step reads, shows and logs its loss. Averaged weights (`--use_ema` there) are on, and it
  trains what medsd trains, which with the small preset includes the text encoder.
- medsd: `recipes/finetune_unet.py`, moments cached before the clock runs; the others are this with one change.

A rate is over the updates after a few that warm up, without validation and checkpoints; a ratio is within a turn, to the side in
`BESIDE`. The share of the peak counts what UNet and text encoder need, whatever else a side computes. Results: `benchmarks/results`.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import distributions
from itertools import chain, repeat
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.sd15_shape import REPOSITORY, write_folder
from medsd import MedSDPipeline, load_dataset, load_info
from medsd.config import FinetuneUNetConfig
from medsd.data.dataset import unpack
from medsd.data.intensity import parse_windows
from medsd.data.phantom import write_phantom
from medsd.data.prepare import PrepareOptions, prepare_phantom
from medsd.data.transforms import to_unit
from medsd.models.autoencoders import build_vae
from medsd.models.presets import PRESETS
from medsd.training.prompts import row_prompts
from medsd.training.record import PACKAGES
from medsd.training.stopwatch import PEAKS
from recipes import finetune_unet

CHANGES: dict[str, dict[str, bool]] = {
    "plain": {},
    "medsd": {},
    "medsd_encoding": {"cache_latents": False},
    "medsd_xformers": {"enable_xformers_memory_efficient_attention": True},
    "medsd_8bit_adam": {"use_8bit_adam": True},
}
"""Each side's changes to the config that all of them share."""
BESIDE = {"medsd": "plain", "medsd_encoding": "plain", "medsd_xformers": "medsd", "medsd_8bit_adam": "medsd"}
SETTINGS: dict[str, dict[str, Any]] = {
    "cpu": {"resolution": 128, "mixed_precision": "no", "batch_size": 16, "updates": 12, "sides": list(CHANGES)[:3]},
    "sd15": {"resolution": 512, "mixed_precision": "bf16", "batch_size": 8, "updates": 40, "sides": list(CHANGES)},
}
"""Side of the phantom in pixels, precision, and defaults of flags."""


def parse_flags() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--work", type=Path, required=True)
    flags.add_argument("--setting", choices=SETTINGS, default="cpu")
    flags.add_argument("--dataset_name", help="prepared data; a phantom by default")
    flags.add_argument("--sides", nargs="+", choices=CHANGES)
    flags.add_argument("--turns", type=int, default=3)
    flags.add_argument("--updates", type=int, help="timed ones of each run")
    flags.add_argument("--warm", type=int, default=4, help="updates before them, and between two lines of medsd's log")
    flags.add_argument("--batch_size", type=int)
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flags.add_argument("--side", choices=["facts", *CHANGES], help=argparse.SUPPRESS)
    given = {name: value for name, value in vars(flags.parse_args()).items() if value is not None}
    phantom = given["work"] / f"phantom_{given['setting']}" / "data"
    return argparse.Namespace(**{"dataset_name": str(phantom), "side": None} | SETTINGS[given["setting"]] | given)


def write_inputs(chosen: argparse.Namespace) -> None:
    """Data and random weights, where they are not there yet."""
    data = chosen.work / f"phantom_{chosen.setting}" / "data"
    if chosen.dataset_name == str(data) and not data.is_dir():
        write_phantom(data.with_name("phantom_dicom_0"), patients=60, size=chosen.resolution)
        windows = parse_windows(("brain", "subdural", "bone")) if chosen.setting == "sd15" else None
        prepare_phantom(data, PrepareOptions(chosen.resolution, intensity=windows))
    if chosen.setting == "cpu":
        torch.manual_seed(0)
        build_vae(PRESETS["small"], load_info(chosen.dataset_name).channels).save_pretrained(chosen.work / "vae")
    elif not (chosen.work / "base" / "model_index.json").is_file():
        write_folder(chosen.work / "base")


def recipe_config(chosen: argparse.Namespace) -> FinetuneUNetConfig:
    """Plain words in place of class tokens keep the text encoder of a pretrained model frozen, as it is in diffusers' script."""
    start = {"pretrained_model_name_or_path": str(chosen.work / "base"), "class_tokens": "words"}
    if chosen.setting == "cpu":
        start = {"preset": "small", "vae": str(chosen.work / "vae")}
    return FinetuneUNetConfig(
        dataset_name=chosen.dataset_name,
        output_dir=str(chosen.work / chosen.side),
        mixed_precision=chosen.mixed_precision,
        train_batch_size=chosen.batch_size,
        max_train_steps=chosen.warm + chosen.updates,
        logging_steps=chosen.warm,
        validation_steps=0,
        checkpointing_steps=0,
        overwrite=True,
        **{"cache_latents": True} | start | CHANGES.get(chosen.side, {}),
    )


def plain_rows(config: FinetuneUNetConfig, pipe: MedSDPipeline) -> Any:
    """The training split with that script's transform: `pixel_values` `(C, H, W)` in `[-1, 1]` and `input_ids` of each row."""
    rows, intensity, tokenizer = load_dataset(config.dataset_name, "train"), pipe.data.intensity_map, pipe.tokenizer
    table = row_prompts(rows, pipe.data)
    kept = rows.select_columns([name for name in ("image", "intensity_range") if name in rows.column_names])
    length = {"max_length": tokenizer.model_max_length, "padding": "max_length", "truncation": True}

    def preprocess(examples: dict[str, list[Any]]) -> dict[str, Any]:
        images = [torch.from_numpy(unpack(stored).astype("float32"))[None] for stored in examples["image"]]
        ranges = [torch.tensor([limits]) for limits in examples.get("intensity_range", [])] or [None] * len(images)
        pixels = [to_unit(image, intensity, limits)[0] for image, limits in zip(images, ranges, strict=True)]
        return {"pixel_values": pixels, "input_ids": tokenizer(examples["text"], **length, return_tensors="pt").input_ids}

    return kept.add_column("text", [table.prompts[number] for number in table.numbers]).with_transform(preprocess)


class PlainModel:
    """medsd's model as that script would hold it: what learns in float32, the rest frozen and in the precision of the forward pass."""

    def __init__(self, config: FinetuneUNetConfig, accelerator: Accelerator) -> None:
        torch.manual_seed(config.seed)
        self.pipe = finetune_unet.build_pipeline(config, finetune_unet.data_info(config))
        finetune_unet.choose_trained(config, self.pipe)
        precision = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        self.networks = []
        for module in (self.pipe.unet, self.pipe.text_encoder, self.pipe.vae):
            if any(parameter.requires_grad for parameter in module.parameters()):
                self.networks.append(accelerator.prepare(module).train())
            else:
                module.to(accelerator.device, precision)
        self.unet, self.text_encoder = (*self.networks, self.pipe.text_encoder)[:2]
        self.codec, self.schedule = self.pipe.codec, self.pipe.noise_schedule

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """A sample of the posterior of images `(B, C, H, W)` in `[-1, 1]`."""
        vae = self.pipe.vae
        return vae.encode(self.codec.repeated(images)).latent_dist.sample() * vae.config.scaling_factor

    def loss(self, latents: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean squared error of the prediction for latents `(B, c, h, w)` at random timesteps."""
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, self.schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        condition = self.text_encoder(input_ids, return_dict=False)[0]
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        prediction = self.unet(noisy, timesteps, condition, return_dict=False)[0]
        return mse_loss(prediction.float(), target.float(), reduction="mean")


def plain(config: FinetuneUNetConfig) -> dict[str, Any]:
    """The plain loop's rate, and how many parameters it trains."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with="tensorboard", project_dir=config.output_dir)
    model = PlainModel(config, accelerator)
    parameters = [value for network in model.networks for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    loader = DataLoader(plain_rows(config, model.pipe), shuffle=True, batch_size=config.train_batch_size, num_workers=0)
    optimizer, loader, lr_scheduler = accelerator.prepare(optimizer, loader, get_scheduler("constant", optimizer))
    ema = EMAModel(parameters)
    accelerator.init_trackers("plain")
    images, marks = 0, []
    bar = tqdm(range(1, config.max_train_steps + 1))
    for step, batch in zip(bar, chain.from_iterable(repeat(loader)), strict=False):
        with accelerator.accumulate(*model.networks):
            loss = model.loss(model.encode(batch["pixel_values"]), batch["input_ids"])
            train_loss = accelerator.gather(loss.repeat(config.train_batch_size)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(parameters)
            accelerator.log({"train_loss": train_loss}, step=step)
        bar.set_postfix(step_loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
        images += len(batch["pixel_values"])
        if step in (config.logging_steps, config.max_train_steps):
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            marks.append((images, time.perf_counter()))
    accelerator.end_training()
    (first, started), (last, ended) = marks
    return {"images_per_second": (last - first) / (ended - started), "trained_parameters": sum(value.numel() for value in parameters)}


def medsd(config: FinetuneUNetConfig) -> dict[str, Any]:
    """The same of the recipe. A line of its log is written once the GPU has said the loss, after all that the line counts."""
    finetune_unet.main(config)
    folder = Path(config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates, seconds = (lines[-1][name] - lines[0][name] for name in ("step", "time"))
    written = json.loads((folder / "environment.json").read_text())
    rate = updates * config.train_batch_size / seconds
    return {"images_per_second": rate} | {name: written[name] for name in ("trained_parameters", "attention")}


def facts(config: FinetuneUNetConfig) -> dict[str, Any]:
    """Device, and FLOPs of forward and backward pass for one image. Leaves the moments on disk, so that no timed run computes them."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    pipe = finetune_unet.build_pipeline(config, finetune_unet.data_info(config))
    finetune_unet.build_source(config, accelerator, pipe, load_dataset(config.dataset_name, "train"))
    model = PlainModel(config, accelerator)
    side = pipe.data.resolution // model.codec.factor
    latents = torch.randn(1, model.codec.latent_channels, side, side, device=accelerator.device)
    ids = torch.zeros(1, pipe.tokenizer.model_max_length, dtype=torch.long, device=accelerator.device)
    # The counter knows the products within plain attention, but not every kernel that stands for them.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        accelerator.backward(model.loss(latents, ids))
    gpu = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else None
    return {"gpu": gpu, "flops_per_image": counter.get_total_flops()}


def run(chosen: argparse.Namespace, side: str) -> dict[str, Any]:
    """One side, in a fresh process."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if chosen.setting == "cpu" else {}
    environment = os.environ | hidden | {"OMP_NUM_THREADS": str(chosen.threads)}
    log = chosen.work / f"{side}.log"
    with log.open("w") as stream:
        words = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        status = subprocess.run(words, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        sys.exit(f"{side} failed, see {log}:\n{log.read_text()[-2000:]}")
    return json.loads((chosen.work / f"{side}.json").read_text())


def summary(side: str, turns: list[dict[str, dict[str, Any]]], flops: float, peak: float | None) -> dict[str, Any]:
    """Medians over the turns, and the ratio to the side that it stands beside."""
    rates, beside = [turn[side]["images_per_second"] for turn in turns], BESIDE.get(side)
    share = peak and median(rates) * flops / peak
    found = {"images_per_second": median(rates), "peak_gpu_gib": turns[-1][side]["peak_gpu_gib"], "share_of_peak": share}
    if beside not in turns[0]:
        return found
    ratios = [rate / turn[beside]["images_per_second"] for rate, turn in zip(rates, turns, strict=True)]
    return found | {"beside": beside, "ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def described(side: str, found: dict[str, Any]) -> str:
    memory = f"{found['peak_gpu_gib']:.1f} GiB" if found["peak_gpu_gib"] else "-"
    share = f"{found['share_of_peak']:.1%}" if found["share_of_peak"] else "-"
    ratio = "{ratio:.2f} x {beside} [{ratio_min:.2f}, {ratio_max:.2f}]".format_map(found) if "ratio" in found else ""
    return f"{side:<16} {found['images_per_second']:10.2f} {memory:>10} {share:>8}  {ratio}"


def machine() -> dict[str, Any]:
    """Date, processor, commit (with `-dirty` where tracked files are changed) and versions."""
    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    words = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor[1] if processor else platform.machine(),
        "cores": os.cpu_count(),
        "commit": subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip() or None,
        "versions": {package.name: package.version for package in distributions() if package.name in PACKAGES},
    }


def compare(chosen: argparse.Namespace) -> None:
    """All turns; prints the table and writes the JSON."""
    chosen.work.mkdir(parents=True, exist_ok=True)
    write_inputs(chosen)
    known, turns = machine() | run(chosen, "facts"), []
    for number in range(chosen.turns):
        turns.append({side: run(chosen, side) for side in chosen.sides})
        print(f"turn {number + 1}:", ", ".join(f"{side} {found['images_per_second']:.2f}" for side, found in turns[-1].items()), flush=True)
    if len(trained := {found["trained_parameters"] for turn in turns for found in turn.values()}) > 1:
        sys.exit(f"the sides do not train the same parameters: {trained}")
    peak = next((value for (name, kind), value in PEAKS.items() if kind == "bf16" and name in (known["gpu"] or "")), None)
    sides = {side: summary(side, turns, known["flops_per_image"], peak) for side in chosen.sides}
    print(f"{'':<16} {'images/s':>10} {'GPU memory':>10} {'of peak':>8}  median ratio [min, max]")
    print(*[described(side, found) for side, found in sides.items()], sep="\n")
    device = known["gpu"] or known["cpu"]
    slug = "-".join(re.findall("[a-z0-9]+", device.lower()))
    file = REPOSITORY / "benchmarks" / "results" / f"training_speed_{chosen.setting}_{slug}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(known | {"settings": vars(chosen), "sides": sides, "turns": turns}, indent=2, default=str) + "\n")
    print(f"{chosen.turns} turns on {device}: {file}")


def main() -> None:
    chosen = parse_flags()
    if not chosen.side:
        return compare(chosen)
    measure = {"facts": facts, "plain": plain}.get(chosen.side, medsd)
    result = measure(recipe_config(chosen))
    if measure is not facts:
        result["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30 or None
    (chosen.work / f"{chosen.side}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
