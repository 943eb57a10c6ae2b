"""How fast does the training loader read, and how long does training wait for it?

    python benchmarks/loader.py --folder /tmp/loader

Writes 2,000 made-up rows of 256 px int16 as a prepared folder once. Then, in turns, rows per second of
- a bare Parquet read: `pyarrow` iterates row batches of 16 over the `image` column of the same shards, in order, and
  `numpy.frombuffer` views each image's bytes: decompression and nothing else, no shuffling, no copy, no batch;
- the training loader with one worker and with none: shuffled batches of 16 as tensors, out of `datasets`' uncompressed Arrow
  cache, which is written once on first use.
The first pass of each warms the page cache; medians of the five passes after it are printed. Last, the
share of a training step of the small preset (pixels, 4 x 4 blocks) that is spent waiting for the next batch, with one worker.
"""

import argparse
import io
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from accelerate import Accelerator
from PIL import Image

from medsd import MedSDPipeline, load_dataset, load_info
from medsd.data.dataset import INFO_FILE, DataInfo, data_features, pack
from medsd.data.intensity import parse_windows
from medsd.data.transforms import TrainingOrder, TrainingRows, row_classes, to_unit, training_loader
from medsd.objectives.diffusion import denoising_error, draw_noise
from medsd.objectives.timesteps import UniformTimesteps
from medsd.training.fitting import adopt
from medsd.training.setup import batches
from medsd.training.stopwatch import Stopwatch

ROWS, SIDE, BATCH, ROWS_PER_SHARD, PASSES = 2000, 256, 16, 1000, 5


def write_data(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    schema = data_features(["even", "odd"], multi_label=False, with_mask=False, with_range=False).arrow_schema
    for shard in range(ROWS // ROWS_PER_SHARD):
        rows = [row(number) for number in range(shard * ROWS_PER_SHARD, (shard + 1) * ROWS_PER_SHARD)]
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(
            table, folder / "data" / f"train-{shard:05d}-of-{ROWS // ROWS_PER_SHARD:05d}.parquet", compression="zstd"
        )
    info = DataInfo(
        class_names=["even", "odd"],
        prompts=["a slice with <even>", "a slice with <odd>"],
        class_tokens=["<even>", "<odd>"],
        intensity=parse_windows(("brain", "subdural", "bone")).to_dict(),
        resolution=SIDE,
        resize="pad",
        image_channels=1,
        unit="HU",
        fingerprint="",
    )
    (folder / INFO_FILE).write_text(json.dumps(info.to_dict()))


def row(number: int) -> dict[str, Any]:
    """A noisy disc in air, about as compressible as a head CT."""
    rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    inside = rows**2 + columns**2 < (SIDE / 2.5) ** 2
    noise = np.random.default_rng(number).normal(0, 8, (SIDE, SIDE))
    image = np.where(inside, 40 + noise, -1000).astype(np.int16)[None]
    preview = io.BytesIO()
    Image.fromarray((inside * 128).astype(np.uint8)).resize((96, 96)).save(preview, format="PNG")
    label = number % 2
    return {
        "key": f"{number:016x}",
        "image": pack(image),
        "preview": {"bytes": preview.getvalue(), "path": None},
        "label": label,
        "prompt": ["a slice with <even>", "a slice with <odd>"][label],
        "patient_id": f"{number // 20:016x}",
    }


def bare_read(folder: Path) -> Callable[[], int]:
    def read() -> int:
        count = 0
        for shard in sorted((folder / "data").glob("*.parquet")):
            for batch in pyarrow.parquet.ParquetFile(shard).iter_batches(BATCH, columns=["image"]):
                images = batch.column("image")
                views = [np.frombuffer(content.as_buffer(), np.int16).reshape(1, SIDE, SIDE) for content in images.field("bytes")]
                count += len(views)
        return count

    return read


def loader_read(dataset: Any, workers: int) -> Callable[[], int]:
    stream = training_loader(TrainingRows(dataset), TrainingOrder(row_classes(dataset), BATCH), workers)
    return lambda: sum(len(batch["images"]) for batch in islice(stream, ROWS // BATCH))


def rates(readers: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median rows per second of each reader, which take turns."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(PASSES + 1):
        for name, read in readers.items():
            started = time.perf_counter()
            found[name].append(read() / (time.perf_counter() - started))
    return {name: float(np.median(values[1:])) for name, values in found.items()}


def steps(folder: Path, count: int) -> Iterator[tuple[float, float]]:
    """Seconds (waiting for the batch, whole step) of `count` training steps after one to warm up."""
    info, accelerator = load_info(folder), Accelerator()
    pipe = MedSDPipeline.from_preset("small", info).to(accelerator.device)
    adopt(pipe, info)
    condition = pipe.encode_prompts(info.prompts[:1]).detach().repeat(BATCH, 1, 1)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), fused=True)
    rows = load_dataset(folder, "train")
    stream = batches(accelerator, Stopwatch(accelerator.device), TrainingRows(rows), row_classes(rows), BATCH, "natural", 0, 0, 1)
    for number in range(count + 1):
        started = time.perf_counter()
        batch, draws = next(stream)
        waited = time.perf_counter() - started
        latents = pipe.codec.encode(to_unit(batch["images"], info.intensity_map), draws)
        noise = draw_noise(latents, draws)
        timesteps, _ = UniformTimesteps(1000).sample(len(latents), draws)
        denoising_error(pipe.unet, pipe.noise_schedule, latents, noise, timesteps, condition).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        if number:
            yield waited, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/medsd_loader"))
    parser.add_argument("--steps", type=int, default=5, help="training steps of the small preset; 0 for none")
    options = parser.parse_args()
    if not options.folder.is_dir():
        write_data(options.folder)
    dataset = load_dataset(options.folder, "train")
    found = rates(
        {
            "bare Parquet read": bare_read(options.folder),
            "loader, 1 worker": loader_read(dataset, 1),
            "loader, 0 workers": loader_read(dataset, 0),
        }
    )
    print(f"{ROWS} rows of {SIDE} px int16, batches of {BATCH}, median of {PASSES} passes in turns")
    for name, rate in found.items():
        print(f"{name:<20} {rate:8.0f} rows/s  {rate / found['bare Parquet read']:5.2f} x", flush=True)
    if options.steps:
        waited, total = (float(np.median(seconds)) for seconds in zip(*steps(options.folder, options.steps), strict=True))
        print(f"a step of the small preset: {total:.2f} s, of which {1000 * waited:.1f} ms ({waited / total:.2%}) wait for data")


if __name__ == "__main__":
    main()
