"""Where a training step's latents come from: images through the codec, or moments that were computed once and kept on disk.

Moments (mean and log-variance of the posterior) are kept, never samples: a sample kept is noise that a model learns by heart. Each
step draws its latents anew from them.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_max_pool2d
from tqdm import tqdm

from medsd.data.dataset import DataInfo
from medsd.data.transforms import Augmentation, TrainingRows, column, shrink_batch, to_unit
from medsd.errors import InputError
from medsd.models.channels import BACKGROUND
from medsd.models.codec import SCALES, Codec, encoder_weights
from medsd.objectives.diffusion import lesion_emphasis
from medsd.randomness import Randomness, integers
from medsd.runtime import to_device

Batch = dict[str, torch.Tensor]
LatentSource = Callable[[Batch, Randomness], tuple[torch.Tensor, torch.Tensor | None]]
"""A batch of `TrainingRows` and the step's numbers -> latents `(B, c, h, w)`, and the emphasis `(B, 1, h, w)` of places or None."""
MOMENTS_FILE, MASKS_FILE, RECORD_FILE = "moments.npy", "masks.npy", "record.json"
ENCODE_BATCH = 32
VERSION = 1
"""Of what moments are; another one where the way from an image to them changes."""


@dataclass(frozen=True)
class Images:
    """Source images and masks of a batch -> augmented images in `[-1, 1]` and masks, on the batch's device."""

    data: DataInfo
    augment: Augmentation

    def __call__(self, batch: Batch, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images `(B, C, H, W)` and masks `(B, 1, H, W)`, not 0 in a lesion: the batch's own, or the images' last channel of labels."""
        images = to_unit(batch["images"], self.data.intensity_map, batch.get("ranges"), self.data.resolution)
        if "masks" not in batch:
            images = self.augment(images, draws)
            return images, images[:, -1:] > BACKGROUND if self.augment.label_channels else None
        masks = shrink_batch(batch["masks"], self.data.resolution, 1)
        moved = replace(self.augment, label_channels=self.augment.label_channels + 1)(torch.cat([images, masks], 1), draws)
        return moved[:, :-1], moved[:, -1:]


@dataclass(frozen=True)
class EncodedLatents:
    """The `LatentSource` that encodes images at every step. A lesion's places count `lesion_weight` times the others."""

    images: Images
    codec: Codec
    lesion_weight: float = 1.0

    def __call__(self, batch: Batch, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LatentSource`."""
        images, masks = self.images(batch, draws)
        with torch.no_grad():
            latents = self.codec.encode(images, draws)
        return latents, emphasis(masks, self.lesion_weight, latents.shape[-1])


class CachedLatents:
    """The `LatentSource` that reads moments from `folder`, of which each image has `variants`, each augmented in its own way."""

    def __init__(self, folder: Path, codec: Codec, device: torch.device, lesion_weight: float = 1.0) -> None:
        self.codec, self.device, self.lesion_weight = codec, device, lesion_weight
        self.moments = np.load(folder / MOMENTS_FILE, mmap_mode="r")
        self.masks = np.load(folder / MASKS_FILE, mmap_mode="r") if (folder / MASKS_FILE).is_file() else None
        self.variants = self.moments.shape[1]

    def __call__(self, batch: Batch, draws: Randomness) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `LatentSource`; `batch` has the numbers of its `rows`."""
        rows = batch["rows"].numpy()
        chosen = np.zeros(len(rows), int)
        if self.variants > 1:
            chosen = integers(0, self.variants, (len(rows),), draws).cpu().numpy()
        moments = to_device(torch.from_numpy(self.moments[rows, chosen]), self.device)
        masks = None if self.masks is None else to_device(torch.from_numpy(self.masks[rows, chosen]), self.device)
        return self.codec.draw(moments, draws), emphasis(masks, self.lesion_weight, moments.shape[-1])


def emphasis(masks: torch.Tensor | None, lesion_weight: float, latent_side: int) -> torch.Tensor | None:
    """Weights of a latent's places `(B, 1, latent_side, latent_side)`; None where all are alike."""
    return None if masks is None or lesion_weight == 1 else lesion_emphasis(masks, lesion_weight, latent_side)


def cache_moments(root: Path, rows: Any, images: Images, codec: Codec, device: torch.device, variants: int, seed: int, masks: bool) -> Path:
    """The folder below `root` with the moments of `rows`, computed now where it is not there yet.

    Its name is a hash of all that they depend on: codec and weights, data, augmentation and seed. `moments.npy` is
    `(N, variants, m, h, w)` float32; `masks.npy`, where there are masks, is `(N, variants, 1, h, w)`, 1 where a lesion touches the place.
    The folder appears when it is complete. Raises InputError where there is no room for it.
    """
    augmented = images.augment != Augmentation(label_channels=images.augment.label_channels)
    record = {
        "version": VERSION,
        "codec": codec.to_dict(),
        "autoencoder": _autoencoder_hash(codec),
        "data": {name: getattr(images.data, name) for name in ("fingerprint", "intensity", "image_channels", "resolution")},
        "rows": {name: _column_hash(rows, name) for name in ("key", "intensity_range", *(["mask"] if masks else []))},
        "augmentation": asdict(images.augment) | {"seed": seed} if augmented else None,
        "variants": variants,
    }
    folder = root / hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    if not (folder / RECORD_FILE).is_file():
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".", ignore_cleanup_errors=True) as parent:
            made = Path(parent) / folder.name
            made.mkdir()
            _compute(made, rows, images, codec, device, variants, seed, masks)
            (made / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n")
            _publish(made, folder)
    return folder


def _publish(made: Path, folder: Path) -> None:
    """Rename; where another process was faster, its folder is as good."""
    try:
        made.replace(folder)
    except OSError:
        if not (folder / RECORD_FILE).is_file():
            raise


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
                    files[name] = _open(folder / name, (len(rows), variants, *values.shape[1:]))
                files[name][numbers, variant] = values.cpu().numpy()
            bar.update(len(numbers))
    bar.close()
    for file in files.values():
        file.flush()


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new array on disk; raises InputError where there is no room for it."""
    needed, free = 4 * math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"the moments need {needed / 1e9:.3g} GB and {path.parent.parent.parent} has {free / 1e9:.3g}: set HF_HOME to another disk, "
            "or leave --cache_latents away"
        )
    return np.lib.format.open_memmap(path, "w+", np.float32, shape)


def _column_hash(rows: Any, name: str) -> str | None:
    """Over a column's values; None where there is no such column."""
    if name not in rows.column_names:
        return None
    digest = hashlib.sha256()
    for value in column(rows, name):
        digest.update(repr(value.as_py()).encode())
    return digest.hexdigest()


def _autoencoder_hash(codec: Codec) -> str | None:
    """Over shape and the weights that encode; the scale of its latents, which is applied when they are drawn, does not count."""
    vae = getattr(codec, "vae", None)
    if vae is None:
        return None
    shape = {name: value for name, value in vae.config.items() if name not in SCALES and not name.startswith("_")}
    digest = hashlib.sha256(repr((sorted(shape.items()), getattr(vae, "use_tiling", False))).encode())
    for name, value in sorted(encoder_weights(vae).items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
