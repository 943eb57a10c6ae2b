"""Where a training step's latents come from: images through the codec, or moments that were computed once and kept on disk.

Moments (mean and log-variance of the posterior) are kept, never samples: a sample kept is noise that a model learns by heart. Each
step draws its latents anew from them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_max_pool2d
from tqdm import tqdm

from medsd.data.dataset import DataInfo
from medsd.data.transforms import Augmentation, TrainingRows, column, shrink, to_unit
from medsd.models.channels import BACKGROUND
from medsd.models.codec import Codec
from medsd.objectives.diffusion import lesion_emphasis
from medsd.runtime import partial_folder

Batch = dict[str, torch.Tensor]
LatentSource = Callable[[Batch, torch.Generator], tuple[torch.Tensor, torch.Tensor | None]]
"""A batch of `TrainingRows` and the step's generator -> latents `(B, c, h, w)`, and the emphasis `(B, 1, h, w)` of their places or None."""
MOMENTS_FILE, MASKS_FILE, RECORD_FILE = "moments.npy", "masks.npy", "record.json"
ENCODE_BATCH = 32


@dataclass(frozen=True)
class Images:
    """Source images and masks of a batch -> augmented images in `[-1, 1]` and masks, on the batch's device."""

    data: DataInfo
    augment: Augmentation

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images `(B, C, H, W)` and masks `(B, 1, H, W)`, not 0 in a lesion: the batch's own, or the images' last channel of labels."""
        images = to_unit(batch["images"], self.data.intensity_map, batch.get("ranges"), self.data.resolution)
        if "masks" not in batch:
            images = self.augment(images, generator)
            return images, images[:, -1:] > BACKGROUND if self.augment.label_channels else None
        masks = shrink(batch["masks"], self.data.resolution, 1)
        moved = replace(self.augment, label_channels=self.augment.label_channels + 1)(torch.cat([images, masks], 1), generator)
        return moved[:, :-1], moved[:, -1:]


@dataclass(frozen=True)
class EncodedLatents:
    """The `LatentSource` that encodes images at every step. A lesion's places count `lesion_weight` times the others."""

    images: Images
    codec: Codec
    lesion_weight: float = 1.0

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LatentSource`."""
        images, masks = self.images(batch, generator)
        with torch.no_grad():
            latents = self.codec.encode(images, generator)
        return latents, emphasis(masks, self.lesion_weight, latents.shape[-1])


class CachedLatents:
    """The `LatentSource` that reads moments from `folder`, of which each image has `variants`, each augmented in its own way."""

    def __init__(self, folder: Path, codec: Codec, device: torch.device, lesion_weight: float = 1.0) -> None:
        self.codec, self.device, self.lesion_weight = codec, device, lesion_weight
        self.moments = np.load(folder / MOMENTS_FILE, mmap_mode="r")
        self.masks = np.load(folder / MASKS_FILE, mmap_mode="r") if (folder / MASKS_FILE).is_file() else None
        self.variants = self.moments.shape[1]

    def __call__(self, batch: Batch, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LatentSource`; `batch` has the numbers of its `rows`."""
        rows = batch["rows"].cpu().numpy()
        chosen = np.zeros(len(rows), int)
        if self.variants > 1:
            chosen = torch.randint(self.variants, (len(rows),), generator=generator, device=generator.device).cpu().numpy()
        moments = torch.from_numpy(self.moments[rows, chosen]).to(self.device)
        masks = None if self.masks is None else torch.from_numpy(self.masks[rows, chosen]).to(self.device)
        return self.codec.draw(moments, generator), emphasis(masks, self.lesion_weight, moments.shape[-1])


def emphasis(masks: torch.Tensor | None, lesion_weight: float, latent_side: int) -> torch.Tensor | None:
    """Weights of a latent's places `(B, 1, latent_side, latent_side)`; None where all are alike."""
    return None if masks is None or lesion_weight == 1 else lesion_emphasis(masks, lesion_weight, latent_side)


def cache_moments(root: Path, rows: Any, images: Images, codec: Codec, device: torch.device, variants: int, seed: int, masks: bool) -> Path:
    """The folder below `root` with the moments of `rows`, computed now where it is not there yet.

    Its name is a hash of all that they depend on: codec and weights, data, augmentation and seed. `moments.npy` is
    `(N, variants, m, h, w)` float32; `masks.npy`, where there are masks, is `(N, variants, 1, h, w)`, 1 where a lesion touches the place.
    The folder appears when it is complete.
    """
    record = {
        "codec": codec.to_dict(),
        "weights": _weights_hash(codec),
        "fingerprint": images.data.fingerprint,
        "rows": hashlib.sha256("\n".join(column(rows, "key").to_pylist()).encode()).hexdigest(),
        "resolution": images.data.resolution,
        "intensity": images.data.intensity,
        "augmentation": asdict(images.augment) if variants > 1 else None,
        "variants": variants,
        "seed": seed if variants > 1 else None,
        "masks": masks,
    }
    folder = root / hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / RECORD_FILE).is_file():
        root.mkdir(parents=True, exist_ok=True)
        made = partial_folder(folder)
        _compute(made, rows, images, codec, device, variants, seed, masks)
        (made / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    return folder


@torch.no_grad()
def _compute(folder: Path, rows: Any, images: Images, codec: Codec, device: torch.device, variants: int, seed: int, masks: bool) -> None:
    reader, files = TrainingRows(rows, with_masks=masks), {}
    generator = torch.Generator(device).manual_seed(seed)
    bar = tqdm(total=len(rows) * variants, desc="encoding", unit="image")
    for variant in range(variants):
        for first in range(0, len(rows), ENCODE_BATCH):
            numbers = list(range(first, min(first + ENCODE_BATCH, len(rows))))
            batch = {name: value.to(device) for name, value in reader[numbers].items()}
            unit, lesions = images(batch, generator)
            parts = {MOMENTS_FILE: codec.moments(unit)}
            if masks:
                parts[MASKS_FILE] = adaptive_max_pool2d((lesions != 0).float(), parts[MOMENTS_FILE].shape[-2:])
            for name, values in parts.items():
                if name not in files:
                    shape = (len(rows), variants, *values.shape[1:])
                    files[name] = np.lib.format.open_memmap(folder / name, "w+", np.float32, shape)
                files[name][numbers, variant] = values.cpu().numpy()
            bar.update(len(numbers))
    bar.close()
    for file in files.values():
        file.flush()


def _weights_hash(codec: Codec) -> str:
    """Over the autoencoder's weights; of a codec that learns nothing, over nothing. The scale of its latents is applied when drawn."""
    digest = hashlib.sha256()
    vae = getattr(codec, "vae", None)
    for name, value in sorted(vae.state_dict().items()) if vae is not None else ():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
