"""Blocks of decoded images -> the Parquet shards of a data set, with previews; and a sheet of them to look at."""

import hashlib
import io
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsd.data.dataset import pack, unpack
from medsd.data.geometry import shrink
from medsd.data.intensity import IntensityMap
from medsd.data.staging import read_places, settle

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

PREVIEW_SIDE = 96
SHARD_BYTES = 2**26
GROUP_BYTES = 2**25
"""Bytes of pixels in a shard, and in each of its row groups."""
SHEET_COLUMNS = 8
SHEET_ROWS = 64


def rows_per_shard(image_bytes: int) -> int:
    """Images of `image_bytes` in one shard."""
    return max(1, SHARD_BYTES // image_bytes)


def write_shard(
    path: Path,
    folder: Path,
    rows: "pyarrow.Table",
    schema: "pyarrow.Schema",
    intensity: IntensityMap,
    channels: int,
    announce: Callable[[int], None],
) -> str:
    """Write the shard of `rows`, whose pixels are at (`block`, `place`) in the blocks of `folder`; returns its sha256.

    Grey images become colour where `channels` is 3.
    """
    import pyarrow.parquet

    made = path.with_suffix(".partial")
    with pyarrow.parquet.ParquetWriter(made, schema, compression="zstd") as writer:
        waiting: list[dict[str, Any]] = []
        for block, lines in groupby(rows.to_pylist(), key=lambda line: line["block"]):
            announce(block)
            for line, pixels in zip(lines := list(lines), _pixels(folder, block, lines, "mask" in schema.names), strict=True):
                waiting.append(_columns(line, pixels, intensity, channels))
                if len(waiting) * len(waiting[-1]["image"]["bytes"]) >= GROUP_BYTES:
                    writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
                    waiting = []
        if waiting:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    settle(made, path)
    return digest


def _pixels(folder: Path, block: int, lines: Sequence[dict[str, Any]], with_mask: bool) -> list[dict[str, Any]]:
    """The stored structs of some places of a block."""
    names = ["image", "mask"] if with_mask else ["image"]
    return read_places(folder / f"block-{block:06d}.arrow", names, [line["place"] for line in lines])


def _columns(line: dict[str, Any], pixels: dict[str, Any], intensity: IntensityMap, channels: int) -> dict[str, Any]:
    image = unpack(pixels["image"])
    if len(image) != channels:
        image = np.broadcast_to(image, (channels, *image.shape[1:]))
        pixels = pixels | {"image": pack(image)}
    ranges = line.get("intensity_range")
    preview = {"bytes": preview_of(image, intensity, np.array(ranges) if ranges else None), "path": None}
    return {name: value for name, value in line.items() if name not in {"block", "place"}} | pixels | {"preview": preview}


def preview_of(image: np.ndarray, intensity: IntensityMap, ranges: np.ndarray | None) -> bytes:
    """8-bit JPEG thumbnail of the first channel in `[-1, 1]` (of all three where there are three)."""
    unit = _small_unit(image, intensity, ranges)
    return _jpeg(unit if len(unit) == 3 else unit[:1])


def panels_of(image: np.ndarray, mask: np.ndarray | None, intensity: IntensityMap, ranges: np.ndarray | None) -> list[bytes]:
    """Thumbnails of all that an image holds: itself, or each channel where no colours can show them; then its mask."""
    unit = _small_unit(image, intensity, ranges)
    panels = [unit] if len(unit) == 3 else list(unit[:, None])
    if mask is not None:
        labels, places = np.unique(mask, return_inverse=True)
        panels.append(shrink(places.reshape(mask.shape) * (2 / max(1, len(labels) - 1)) - 1, *unit.shape[1:], nearest=True))
    return [_jpeg(panel) for panel in panels]


def _small_unit(image: np.ndarray, intensity: IntensityMap, ranges: np.ndarray | None) -> np.ndarray:
    from PIL import Image

    factor = math.ceil(max(image.shape[1:]) / PREVIEW_SIDE)
    small = np.stack([np.asarray(Image.fromarray(plane.astype(np.float32)).reduce(factor)) for plane in image])
    return np.asarray(intensity.to_unit(small, ranges))


def _jpeg(unit: np.ndarray) -> bytes:
    """`(1, H, W)` or `(3, H, W)` in `[-1, 1]` as a JPEG."""
    from PIL import Image

    grey, stream = np.rint((unit + 1) * 127.5).astype(np.uint8), io.BytesIO()
    Image.fromarray(np.moveaxis(grey, 0, -1) if len(grey) == 3 else grey[0]).save(stream, "JPEG", quality=90, subsampling=0)
    return stream.getvalue()


def contact_sheet(rows: Sequence[tuple[str, Sequence[bytes]]]) -> "Image.Image":
    """A row of previews under each caption."""
    from PIL import Image, ImageDraw

    caption, side, columns = 16, PREVIEW_SIDE, max(SHEET_COLUMNS, *(len(previews) for _, previews in rows), 0)
    sheet = Image.new("RGB", (columns * (side + 2), max(1, len(rows)) * (side + caption + 2)), (32, 32, 32))
    for index, (text, previews) in enumerate(rows):
        top = index * (side + caption + 2)
        ImageDraw.Draw(sheet).text((2, top + 2), text, fill=(255, 255, 255))
        for column, preview in enumerate(previews):
            image = Image.open(io.BytesIO(preview)).convert("RGB")
            factor = max(1, side // max(image.size))
            sheet.paste(
                image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST), (column * (side + 2), top + caption)
            )
    return sheet
