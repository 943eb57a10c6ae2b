"""Geometry when data is prepared, and the loader that feeds training.

The loader hands over source integers; intensity map and augmentation run batched on the training device.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from medsd.data.intensity import IntensityMap
from medsd.errors import InputError


def fit_square(
    image: np.ndarray, resolution: int, resize: str, nearest: bool = False, background: float | None = None
) -> tuple[np.ndarray, tuple[float, float]]:
    """`(C, H, W)` -> `(C, R, R)` of the same dtype, and the (row, column) scale new/old.

    The image shrinks by area averaging (or to the nearest pixel) and is never enlarged; what is missing is padded with
    `background`, by default the smallest value of the image. `pad` keeps all, `crop` the middle square, `stretch` gives up the aspect.
    """
    image = _middle_square(image) if resize == "crop" else image
    height, width = image.shape[-2:]
    longer = max(height, width)
    sides = (height, width) if resize == "stretch" else (longer, longer)
    scale = tuple(min(1.0, resolution / side) for side in sides)
    shrunk = _shrink(image, max(1, round(height * scale[0])), max(1, round(width * scale[1])), nearest)
    missing = [resolution - side for side in shrunk.shape[-2:]]
    margins = [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing)]
    return np.pad(shrunk, margins, constant_values=image.min() if background is None else background), (scale[0], scale[1])


def _middle_square(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def _shrink(image: np.ndarray, height: int, width: int, nearest: bool) -> np.ndarray:
    from PIL import Image

    if image.shape[-2:] == (height, width):
        return image
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BOX
    planes = [np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), method)) for plane in image]
    shrunk = np.stack(planes)
    return np.rint(shrunk).astype(image.dtype) if np.issubdtype(image.dtype, np.integer) else shrunk


def shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move images `(B, C, H, W)` by whole pixels `(B, 2)` (down, right); edges are repeated."""
    count, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    index = torch.arange(count, device=images.device)[:, None, None]
    return images.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def augment(images: torch.Tensor, random_shift: int, generator: torch.Generator) -> torch.Tensor:
    """Training images `(B, C, H, W)` moved at random by up to `random_shift` pixels each way."""
    if random_shift == 0:
        return images
    return shift(images, torch.randint(-random_shift, random_shift + 1, (len(images), 2), generator=generator, device=images.device))


def pixel_statistics(dataset: Any, intensity: IntensityMap, limit: int = 512) -> tuple[float, float]:
    """Mean and standard deviation of up to `limit` images in `[-1, 1]`, evenly picked."""
    unit = sample_images(dataset, intensity, limit)
    if unit.std() == 0:
        raise InputError("every pixel of the training images is the same in [-1, 1]: check --windows")
    return unit.mean().item(), unit.std().item()


def sample_images(dataset: Any, intensity: IntensityMap, limit: int) -> torch.Tensor:
    """About `limit` images of a data set, evenly picked, as `(N, C, H, W)` in `[-1, 1]`."""
    picked = dataset[range(0, len(dataset), max(1, len(dataset) // limit))]["image"]
    return to_unit(torch.from_numpy(np.stack(picked).astype(np.float32)), intensity)


def to_unit(images: torch.Tensor, intensity: IntensityMap) -> torch.Tensor:
    """Source integers `(B, C, H, W)` -> float32 `[-1, 1]`."""
    return intensity.to_unit(images.float())


class TrainingOrder(Sampler[list[int]]):
    """Endless batches of row indices; which rows batch n holds depends on (seed, n, rank) alone, so any step can be resumed.

    `natural` visits every row once an epoch; `balanced` draws each class equally often, `sqrt` in proportion to the
    square root of its count, with replacement.
    """

    def __init__(
        self,
        labels: Sequence[int],
        batch_size: int,
        class_sampling: str = "natural",
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.labels, self.batch_size, self.class_sampling = np.asarray(labels), batch_size, class_sampling
        self.seed, self.start, self.rank, self.world = seed, start, rank, world
        if len(self.labels) == 0:
            raise InputError("the training split is empty")

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start * self.world + self.rank
        epoch, order = -1, np.empty(0, dtype=int)
        while True:
            positions = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
            indices = []
            for position in positions:
                if position // len(self.labels) != epoch:
                    epoch = position // len(self.labels)
                    order = self._epoch(epoch)
                indices.append(int(order[position % len(self.labels)]))
            yield indices
            batch += self.world

    def _epoch(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, epoch])
        if self.class_sampling == "natural":
            return generator.permutation(len(self.labels))
        counts = np.bincount(self.labels)[self.labels].astype(float)
        weights = counts**-1 if self.class_sampling == "balanced" else counts**-0.5
        return generator.choice(len(self.labels), size=len(self.labels), p=weights / weights.sum())


def sample_rows(dataset: Any, limit: int | None, seed: int) -> Any:
    """The data set, or `limit` of its rows drawn at random, in their order."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit]))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows -> `images` `(B, C, H, W)` in the source's integers and `labels` `(B,)`."""
    images = np.stack([row["image"] for row in rows])
    images = images.astype(np.int32) if images.dtype == np.uint16 else images
    return {"images": torch.from_numpy(images), "labels": torch.tensor([row["label"] for row in rows])}


def training_loader(dataset: Any, order: TrainingOrder, num_workers: int) -> DataLoader:
    """Endless loader of `collate`d batches in the given order."""
    return DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=num_workers, persistent_workers=num_workers > 0)
