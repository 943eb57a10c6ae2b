"""Training with the moments cache against training without it: updates per second, losses, and the spread of what is drawn.

python benchmarks/moments_cache.py --dataset_name runs/brain_mri_ldm/data --work /tmp/cache

Both train the same small UNet in latents of the same small autoencoder (random weights: the cost is the same), in turns.
"""

import argparse
import json
from pathlib import Path
from statistics import median

import numpy as np
import torch

from medsd.config import FinetuneUNetConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import Augmentation, TrainingRows
from medsd.models.autoencoders import build_vae, load_vae
from medsd.models.codec import KLCodec
from medsd.models.presets import PRESETS
from medsd.runtime import cache_folder
from medsd.training.latents import CachedLatents, Images, cache_moments
from recipes import finetune_unet

WARM = 2
"""Updates that are not timed."""


def train(dataset: str, vae: Path, folder: Path, steps: int, cached: bool) -> tuple[float, list[float]]:
    """Updates per second, and the loss of every update."""
    config = FinetuneUNetConfig(
        dataset_name=dataset,
        output_dir=str(folder),
        vae=str(vae),
        preset="small",
        cache_latents=cached,
        max_train_steps=steps,
        logging_steps=1,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
        overwrite=True,
    )
    finetune_unet.main(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines]
    return (len(times) - 1 - WARM) / (times[-1] - times[WARM]), [line["loss"] for line in lines]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--dataset_name", required=True)
    flags.add_argument("--work", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=12)
    flags.add_argument("--turns", type=int, default=3)
    chosen = flags.parse_args()
    data, vae = load_info(chosen.dataset_name), chosen.work / "vae"
    torch.manual_seed(0)
    build_vae(PRESETS["small"], data.channels).save_pretrained(vae)
    rows = load_dataset(chosen.dataset_name, "train")
    codec, images = KLCodec(load_vae(str(vae)), data.channels), Images(data, Augmentation())
    folder = cache_moments(cache_folder("moments"), rows, images, codec, torch.device("cpu"), 1, 0, masks=False)
    ratios = []
    for _ in range(chosen.turns):
        without, losses = train(chosen.dataset_name, vae, chosen.work / "without", chosen.steps, cached=False)
        with_cache, cached_losses = train(chosen.dataset_name, vae, chosen.work / "with", chosen.steps, cached=True)
        ratios.append(with_cache / without)
        print(f"updates/s: {without:.3f} without, {with_cache:.3f} with the cache: {ratios[-1]:.2f} x", flush=True)
    difference = np.abs(np.array(losses) / np.array(cached_losses) - 1).max()
    batch, source = TrainingRows(rows)[list(range(16))], CachedLatents(folder, codec, torch.device("cpu"))
    unit, _ = images(batch, torch.Generator())
    with torch.no_grad():
        encoded = torch.stack([codec.encode(unit, torch.Generator().manual_seed(seed)) for seed in range(8)])
    drawn = torch.stack([source(batch, torch.Generator().manual_seed(100 + seed))[0] for seed in range(8)])
    spread = drawn.var(0).mean() / encoded.var(0).mean()
    print(f"RESULT median {median(ratios):.2f} x; losses differ by at most {difference:.1e} of themselves")
    print(f"RESULT variance of draws {spread:.3f} x the encoder's")


if __name__ == "__main__":
    main()
