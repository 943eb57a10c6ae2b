"""From stored images to the batches that training sees.

The loader hands over source integers; intensity map, shrinking and augmentation run batched on the training device.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample

from medsd.data.dataset import DataInfo
from medsd.data.intensity import IntensityMap, label_channels
from medsd.data.splits import nested_subset
from medsd.errors import InputError
from medsd.randomness import Randomness, integers, uniform

PATIENCE = 300.0
"""Seconds after which a batch that is not read is given up: a network disk may be slow, but not so slow."""
UNIT_BATCH = 64
Task = tuple[list[int], "Future[dict[str, torch.Tensor]]"]
"""Rows to read, and the batch that is promised."""


@dataclass(frozen=True)
class Augmentation:
    """Random changes to training images `(B, C, H, W)` in `[-1, 1]`; each that is 0 or none draws nothing."""

    shift: int = 0
    """Whole pixels each way."""
    rotation: float = 0.0
    """Degrees each way."""
    scale: float = 0.0
    """Share by which images become larger or smaller."""
    intensity: float = 0.0
    """Share of contrast (gain about 0) each way, and of the range's half (offset) each way."""
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirrored left to right, upside down or either, half of the images each."""
    label_channels: int = 0
    """Last channels that hold labels: moved with the others, never mixed and never made brighter."""

    def __call__(self, images: torch.Tensor, draws: Randomness) -> torch.Tensor:
        """Changed images; the very same tensor where there is nothing to change."""
        count = len(images)
        if self.shift:
            images = shift(images, integers(-self.shift, self.shift + 1, (count, 2), draws))
        if self.rotation or self.scale:
            degrees, scales = _signed((count, 2), draws).unbind(1)
            images = rotate_and_scale(images, degrees * self.rotation, 1 + scales * self.scale, self.label_channels)
        for direction, axis in (("horizontal", -1), ("vertical", -2)):
            if self.flip in {direction, "both"}:
                mirrored = _signed((count, 1, 1, 1), draws) < 0
                images = torch.where(mirrored, images.flip(axis), images)
        if self.intensity:
            gain, offset = (_signed((count, 2, 1, 1, 1), draws) * self.intensity).unbind(1)
            grey, labels = _apart(images, self.label_channels)
            images = torch.cat([(grey * (1 + gain) + offset).clamp(-1, 1), labels], 1)
        return images


def _signed(shape: tuple[int, ...], draws: Randomness) -> torch.Tensor:
    """Uniform in `[-1, 1)`."""
    return uniform(shape, draws) * 2 - 1


def _apart(images: torch.Tensor, label_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(B, C, H, W)` without their last `label_channels`, and those."""
    grey = images.shape[1] - label_channels
    return images[:, :grey], images[:, grey:]


def rotate_and_scale(images: torch.Tensor, degrees: torch.Tensor, scales: torch.Tensor, label_channels: int = 0) -> torch.Tensor:
    """Turn square images `(B, C, H, H)` about their middle by `degrees` `(B,)`, counter-clockwise, and enlarge them by `scales` `(B,)`.

    Bilinear, but each pixel of the last `label_channels` takes the nearest one's value; edges are repeated.
    """
    cosine, sine, zero = degrees.deg2rad().cos() / scales, degrees.deg2rad().sin() / scales, torch.zeros_like(scales)
    matrices = torch.stack([torch.stack([cosine, -sine, zero], 1), torch.stack([sine, cosine, zero], 1)], 1)
    places = affine_grid(matrices, list(images.shape), align_corners=False)
    grey, labels = _apart(images, label_channels)
    options = {"padding_mode": "border", "align_corners": False}
    return torch.cat([grid_sample(grey, places, "bilinear", **options), grid_sample(labels, places, "nearest", **options)], 1)


def shift(images: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Move images `(B, C, H, W)` by whole pixels `(B, 2)` (down, right); edges are repeated."""
    count, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) - offsets[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=images.device) - offsets[:, 1:]).clamp(0, width - 1)
    index = torch.arange(count, device=images.device)[:, None, None]
    return images.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def shrink_batch(images: torch.Tensor, resolution: int, label_channels: int = 0) -> torch.Tensor:
    """Images `(B, C, H, H)` in the source's unit -> float32 `(B, C, R, R)`, just as `medsd.data.geometry.fit_square` shrinks them.

    H is a multiple of R. Means of blocks, rounded where the source has integers; of the last `label_channels` the middle pixels.
    """
    block = images.shape[-1] // resolution
    if block == 1:
        return images.float()
    grey, labels = _apart(images, label_channels)
    means = avg_pool2d(grey.float(), block) if grey.shape[1] else grey[..., ::block, ::block].float()  # Torch pools no empty tensor.
    means = means if images.is_floating_point() else means.round()
    return torch.cat([means, labels[..., block // 2 :: block, block // 2 :: block].float()], 1)


def to_unit(
    images: torch.Tensor, intensity: IntensityMap, ranges: torch.Tensor | None = None, resolution: int | None = None
) -> torch.Tensor:
    """Source integers `(B, C, H, H)` -> float32 `[-1, 1]`, shrunk to `resolution` first; `ranges` `(B, C, 2)` where they are recorded."""
    small = shrink_batch(images, resolution or images.shape[-1], label_channels(intensity, images.shape[1]))
    return intensity.to_unit(small, ranges)


def unit_batches(dataset: Any, intensity: IntensityMap, resolution: int | None = None, size: int = UNIT_BATCH) -> Iterator[torch.Tensor]:
    """All images of a data set in order, `(B, C, R, R)` float32 in `[-1, 1]`, `size` at a time."""
    rows = TrainingRows(dataset)
    for start in range(0, len(rows), size):
        batch = rows[list(range(start, min(start + size, len(rows))))]
        yield to_unit(batch["images"], intensity, batch.get("ranges"), resolution)


def at_resolution(data: DataInfo, wanted: int | None) -> DataInfo:
    """The data as `to_unit` shrinks it to a side of `wanted` pixels; raises InputError where blocks of pixels do not make that up."""
    if wanted is not None and (wanted > data.resolution or data.resolution % wanted):
        raise InputError(f"--resolution {wanted}: the data has {data.resolution} px; that or a half, a third ... of it is expected")
    return replace(data, resolution=wanted or data.resolution)


def pixel_statistics(dataset: Any, intensity: IntensityMap, limit: int = 512, resolution: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation of up to `limit` images in `[-1, 1]`, evenly picked."""
    unit = sample_images(dataset, intensity, limit, resolution)
    if unit.std() == 0:
        raise InputError("every pixel of the training images is the same in [-1, 1]: check --windows")
    return unit.mean().item(), unit.std().item()


def sample_images(dataset: Any, intensity: IntensityMap, limit: int, resolution: int | None = None) -> torch.Tensor:
    """About `limit` images of a data set, evenly picked, as `(N, C, R, R)` in `[-1, 1]`."""
    rows = TrainingRows(dataset)
    batch = rows[list(range(0, len(rows), max(1, len(rows) // limit)))]
    return to_unit(batch["images"], intensity, batch.get("ranges"), resolution)


def column(dataset: Any, name: str) -> Any:
    """One column as a `pyarrow.ChunkedArray`; no other is read."""
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def recorded_ranges(dataset: Any) -> np.ndarray | None:
    """(low, high) of every row's channels `(N, C, 2)`; None where the intensity map is not recorded per image."""
    return _ranges(column(dataset, "intensity_range")) if "intensity_range" in dataset.column_names else None


def row_labels(dataset: Any) -> np.ndarray:
    """The class index of every row `(N,)`, or its findings `(N, K)` of 0 and 1; -1 where a row has none."""
    if "labels" not in dataset.column_names:
        return column(dataset, "label").fill_null(-1).to_numpy()
    return _findings(column(dataset, "labels"))


def row_classes(dataset: Any) -> np.ndarray:
    """The class index of every row `(N,)`; where several of K findings can hold, the rarest that does, and K where none does."""
    findings = row_labels(dataset)
    if findings.ndim == 1:
        return findings
    counts = np.where(findings > 0, findings.sum(0), len(findings) + 1)
    return np.where(findings.any(1), counts.argmin(1), findings.shape[1])


class TrainingOrder:
    """Endless batches of row indices; which rows batch n holds depends on (seed, n, rank) alone, so any step can be resumed.

    `natural` visits every row once an epoch; `balanced` draws each class equally often, `sqrt` in proportion to the
    square root of its count, with replacement. `labels` are those of `row_classes`.
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


def training_rows(dataset: Any, fraction: float | None, limit: int | None, seed: int) -> Any:
    """The rows to learn from: those of `fraction` of the patients, see `nested_subset`, and of these at most `limit`; all without both."""
    if fraction is not None:
        dataset = dataset.select(nested_subset(column(dataset, "patient_id").to_pylist(), row_labels(dataset), fraction, seed))
    return sample_rows(dataset, limit, seed)


def sample_rows(dataset: Any, limit: int | None, seed: int) -> Any:
    """The data set, or `limit` of its rows drawn at random, in their order."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit]))


def stratified(labels: np.ndarray, keys: Sequence[str], limit: int | None, seed: int) -> np.ndarray:
    """Places of all rows, or of `limit` rows with the classes in their proportions (one of each at least, as far as that goes), by key.

    `labels` `(N,)` or `(N, K)` of findings. The choice depends on the keys and not on the rows' order.
    """
    drawn = [hashlib.sha256(f"{seed} {key}".encode()).digest() for key in keys]
    if limit is None or limit >= len(keys):
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=int)
    strata = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    counts = np.bincount(strata)
    rank = np.empty(len(keys))
    for stratum in range(len(counts)):
        members = sorted(np.flatnonzero(strata == stratum), key=drawn.__getitem__)
        # The first of each stratum come first, then all strata fill up alike.
        rank[members] = np.arange(len(members)) / counts[stratum]
    chosen = sorted(range(len(keys)), key=lambda place: (rank[place], drawn[place]))[:limit]
    return np.array(sorted(chosen, key=keys.__getitem__), dtype=int)


class TrainingRows:
    """Rows of a data set by whole batches, taken from the memory-mapped Arrow table without the columns that training does not need.

    A batch has `images` `(B, C, H, W)` in the source's integers (not `with_images=False`), `labels` `(B,)` class indices or `(B, K)`
    findings of 0 and 1, `rows` `(B,)`, the numbers of the rows, and, where there are any, `ranges` `(B, C, 2)` and `prompts` `(B,)`,
    each row's number from `prompts` `(N,)`; `with_masks` also `masks` `(B, 1, H, W)`, 0 where a row has none.
    """

    def __init__(self, dataset: Any, prompts: np.ndarray | None = None, with_masks: bool = False, with_images: bool = True) -> None:
        columns = ["label", "labels"] + ["image", "intensity_range"] * with_images + ["mask"] * with_masks
        wanted = [name for name in columns if name in dataset.column_names]
        self.table, self.prompts = dataset.select_columns(wanted).with_format("arrow"), prompts

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        rows = self.table[indices]
        labels = rows["label"].to_numpy() if "label" in rows.column_names else _findings(rows["labels"])
        batch = {"labels": labels, "rows": np.array(indices)}
        if "image" in rows.column_names:
            batch["images"] = _images(rows["image"])
        if "intensity_range" in rows.column_names:
            batch["ranges"] = _ranges(rows["intensity_range"])
        if "mask" in rows.column_names:
            batch["masks"] = _masks(rows["mask"], batch["images"].shape[-2:])
        if self.prompts is not None:
            batch["prompts"] = self.prompts[indices]
        return {name: torch.from_numpy(np.require(values, requirements="W")) for name, values in batch.items()}


def _images(stored: Any) -> np.ndarray:
    """Arrow structs of bytes, shape and dtype -> `(B, C, H, W)`; uint16, which torch hardly knows, as int32."""
    from pyarrow.compute import struct_field

    contents, shapes, dtypes = (struct_field(stored, name) for name in ("bytes", "shape", "dtype"))
    planes = [
        np.frombuffer(content.as_buffer(), dtype).reshape(shape)
        for content, shape, dtype in zip(contents, shapes.to_pylist(), dtypes.to_pylist(), strict=True)
    ]
    images = np.stack(planes)
    return images.astype(np.int32) if images.dtype == np.uint16 else images


def _masks(stored: Any, side: tuple[int, int]) -> np.ndarray:
    """Arrow structs -> `(B, 1, H, W)` uint8, 1 where the mask is not 0; all 0 for a row without one."""
    masks = np.zeros((len(stored), 1, *side), np.uint8)
    for place, mask in zip(masks, stored.to_pylist(), strict=True):
        if mask is not None and mask["bytes"] is not None:
            place[:] = np.frombuffer(mask["bytes"], mask["dtype"]).reshape(mask["shape"])[:1] != 0
    return masks


def _findings(labels: Any) -> np.ndarray:
    """Arrow lists of 0 and 1 -> `(B, K)`; -1 in the row of a null."""
    rows = labels.to_pylist()
    unknown = [-1] * max((len(row) for row in rows if row is not None), default=0)
    return np.asarray([unknown if row is None else row for row in rows], np.int64)


def _ranges(ranges: Any) -> np.ndarray:
    """Arrow lists of (low, high) -> `(B, C, 2)`."""
    return np.asarray(ranges.to_pylist(), np.float32)


def training_loader(
    rows: TrainingRows, order: Iterable[list[int]], num_workers: int, patience: float = PATIENCE
) -> Iterator[dict[str, torch.Tensor]]:
    """The rows' batches in the given order; each of `num_workers` threads reads up to two batches ahead.

    Threads are enough, because reading is copying from mapped memory, and they spare each batch the way between two processes. Raises
    what a thread raises, and InputError where it takes longer than `patience` seconds.
    """
    if num_workers == 0:
        yield from map(rows.__getitem__, order)
        return
    tasks: SimpleQueue[Task | None] = SimpleQueue()
    for _ in range(num_workers):
        Thread(target=_read, args=(rows, tasks), daemon=True).start()  # One that hangs must not keep the process alive.
    ahead: deque[Task] = deque()
    try:
        for indices in order:
            ahead.append((indices, Future()))
            tasks.put(ahead[-1])
            if len(ahead) > 2 * num_workers:
                yield _awaited(*ahead.popleft(), patience)
        while ahead:
            yield _awaited(*ahead.popleft(), patience)
    finally:
        for _ in range(num_workers):
            tasks.put(None)


def _read(rows: TrainingRows, tasks: "SimpleQueue[Task | None]") -> None:
    """A reader's life."""
    while (task := tasks.get()) is not None:
        indices, batch = task
        try:
            batch.set_result(rows[indices])
        except BaseException as error:
            batch.set_exception(error)


def _awaited(indices: list[int], batch: "Future[dict[str, torch.Tensor]]", patience: float) -> dict[str, torch.Tensor]:
    try:
        return batch.result(patience)
    except TimeoutError as error:
        if batch.done():
            raise
        raise InputError(
            f"rows {indices} were not read within {patience:g} s: is the disk of the data set (or of HF_HOME) there? Go on with "
            "--resume_from_checkpoint latest, with --dataloader_num_workers 0 if it happens again"
        ) from error
