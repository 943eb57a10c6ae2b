"""Figures of images: tables of tiles with names beside them, each a function of uint8 arrays that gives a matplotlib figure.

Images are `(H, W)` grey or `(H, W, 3)` colour.
"""

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medsd.errors import InputError
from medsd.report.style import SMALL, WIDTH, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.04
"""Between tiles, of a tile's side."""
LETTER = 0.085
"""Width of a letter beside the tiles, inches."""
LONGEST = 16
"""Letters in a line beside the tiles."""


def image_grid(images: NDArray, names: Sequence[str], title: str = "", columns: Sequence[str] = ()) -> "Figure":
    """Rows of images `(K, n, H, W[, 3])` uint8, their K names beside them, and over them `columns`, if any."""
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or len(images) != len(names):
        raise InputError(f"expected {len(names)} rows of images, uint8 (K, n, H, W[, 3]), got {images.dtype} {images.shape}")
    rows, across, height, width = images.shape[:4]
    beside = [fill(name, LONGEST) for name in names]
    free = WIDTH - LETTER * max((len(line) for name in beside for line in name.split("\n")), default=0) - 0.2
    figure = canvas(free * rows * height / (across * width) + 0.3 + 0.3 * bool(title))
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.imshow(mosaic(images), interpolation="antialiased")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL, labeltop=True, labelbottom=False)
    axes.set_yticks(_middles(rows, height), beside)
    axes.set_xticks(_middles(across, width) if columns else [], columns)
    return figure


def mosaic(images: NDArray) -> NDArray:
    """Images `(K, n, H, W[, 3])` side by side as one, uint8 `(height, width, 4)`, with clear gaps between them."""
    rows, across, height, width = images.shape[:4]
    down, right = height + _gap(height), width + _gap(width)
    sheet = np.zeros((rows * down - _gap(height), across * right - _gap(width), 4), np.uint8)
    for row, column in np.ndindex(rows, across):
        tile = sheet[row * down : row * down + height, column * right : column * right + width]
        image = images[row, column]
        tile[..., :3] = image if image.ndim == 3 else image[..., None]
        tile[..., 3] = 255
    return sheet


def _gap(side: int) -> int:
    return max(1, round(GAP * side))


def _middles(count: int, side: int) -> NDArray:
    return np.arange(count) * (side + _gap(side)) + (side - 1) / 2


def denoising_strip(frames: NDArray, names: Sequence[str]) -> "Figure":
    """How an image of each class comes out of noise: `(K, frames, H, W[, 3])` uint8, from the first step to the last."""
    ends = ["noise", *[""] * (frames.shape[1] - 2), "image"] if frames.shape[1] > 2 else []
    return image_grid(frames, names, "Denoising", ends)


def evidence_maps(maps: Sequence[tuple[NDArray, str]]) -> "Figure":
    """Images `(H, W, 3)` uint8 under their captions, two in a row."""
    return _captioned([[image] for image, _ in maps], [caption for _, caption in maps], "Evidence", 2)


def audit_pairs(samples: NDArray, neighbours: NDArray, captions: Sequence[str]) -> "Figure":
    """Generated images `(n, H, W[, 3])` uint8, each left of its nearest training image, two pairs in a row."""
    return _captioned(list(zip(samples, neighbours, strict=True)), captions, "Generated (left) and nearest training image", 2)


def _captioned(groups: Sequence[Sequence[NDArray]], captions: Sequence[str], title: str, across: int) -> "Figure":
    """Groups of images side by side under a caption each."""
    letters = round(WIDTH / across / LETTER) - 2
    texts = [fill(caption, letters) for caption in captions]
    lines = max((text.count("\n") + 1 for text in texts), default=1)
    sheets = [mosaic(np.stack(group)[None]) for group in groups]
    side = WIDTH / across * max(sheet.shape[0] / sheet.shape[1] for sheet in sheets)
    down = -(-len(sheets) // across)
    figure = canvas(down * (side + 0.18 * lines + 0.1) + 0.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    plots = figure.subplots(down, across, squeeze=False).ravel()
    for axes in plots:
        axes.set_axis_off()
    for axes, sheet, text in zip(plots, sheets, texts, strict=False):
        axes.imshow(sheet, interpolation="antialiased")
        axes.set_title(text, fontsize=SMALL, fontweight="normal")
    return figure
