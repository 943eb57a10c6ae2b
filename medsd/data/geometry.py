"""How an image becomes a square of the wanted side: shrunk by area averaging, never enlarged, padded with background."""

import math

import numpy as np

MOST_PIXELS = 2**15
"""In a block, so that the sum of 16-bit values stays below 2**31."""


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
    shrunk = shrink(image, max(1, round(height * scale[0])), max(1, round(width * scale[1])), nearest)
    return _pad(shrunk, resolution, image.min() if background is None else background), (scale[0], scale[1])


def without_padding(square: np.ndarray, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    """What `fit_square` padded: the middle of `square` that an image `(C, height, width)`, shrunk by `scale`, fills."""
    rows, columns = (min(square.shape[-1], max(1, round(side * part))) for side, part in zip((height, width), scale, strict=True))
    top, left = (square.shape[-1] - rows) // 2, (square.shape[-1] - columns) // 2
    return square[:, top : top + rows, left : left + columns]


def shrink(image: np.ndarray, height: int, width: int, nearest: bool = False) -> np.ndarray:
    """`(C, H, W)` -> `(C, height, width)` of the same dtype by area averaging, or each pixel the nearest one of the source."""
    if image.shape[-2:] == (height, width):
        return image
    blocks = (image.shape[-2] // height, image.shape[-1] // width)
    exact = image.shape[-2] == height * blocks[0] and image.shape[-1] == width * blocks[1]
    if exact and not nearest and math.prod(blocks) <= MOST_PIXELS and np.issubdtype(image.dtype, np.integer) and image.dtype.itemsize <= 2:
        return _block_means(image, *blocks)
    return _resample(image, height, width, nearest)


def _block_means(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Means of whole blocks of up to `MOST_PIXELS`, summed as integers and rounded to the nearest."""
    sums = _sum([image[..., row::rows, :] for row in range(rows)])
    total = _sum([sums[..., column::columns] for column in range(columns)])
    return np.rint(total * np.float32(1 / (rows * columns))).astype(image.dtype)


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    total = parts[0].astype(np.int32)
    for part in parts[1:]:
        total += part
    return total


def _resample(image: np.ndarray, height: int, width: int, nearest: bool) -> np.ndarray:
    from PIL import Image

    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BOX
    planes = [np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), method)) for plane in image]
    shrunk = np.stack(planes)
    return np.rint(shrunk).astype(image.dtype) if np.issubdtype(image.dtype, np.integer) else shrunk


def _middle_square(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def _pad(image: np.ndarray, resolution: int, background: float) -> np.ndarray:
    height, width = image.shape[-2:]
    if (height, width) == (resolution, resolution):
        return image
    square = np.full((len(image), resolution, resolution), background, image.dtype)
    top, left = (resolution - height) // 2, (resolution - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square
