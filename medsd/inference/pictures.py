"""8-bit views of images in `[-1, 1]`."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

LINE, PADDING = 14, 4
"""Pixels of text."""


def picture(unit: torch.Tensor) -> Image.Image:
    """One image `(C, H, W)`: grey, colour, or other channels side by side."""
    grey = ((unit + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    if len(grey) == 3:
        return Image.fromarray(np.moveaxis(grey, 0, -1))
    return Image.fromarray(np.concatenate(list(grey), axis=1))


def shown(unit: torch.Tensor) -> np.ndarray:
    """`picture` as an array `(H, W)` or `(H, W, 3)` uint8."""
    return np.asarray(picture(unit))


def grid(images: torch.Tensor, names: Sequence[str] = (), side: int = 128) -> Image.Image:
    """Images `(rows, columns, C, H, W)` on one sheet, each row beside its name; small ones are enlarged to about `side` pixels."""
    views = [[picture(image) for image in row] for row in images]
    width, height = views[0][0].size
    zoom = max(1, side // height)
    width, height, margin = width * zoom, height * zoom, _margin(names)
    sheet = Image.new(views[0][0].mode, (margin + len(views[0]) * width, len(views) * height))
    text = ImageDraw.Draw(sheet)
    for row, line in enumerate(views):
        for column, view in enumerate(line):
            sheet.paste(view.resize((width, height), Image.Resampling.NEAREST), (margin + column * width, row * height))
    for row, name in enumerate(names):
        text.text((PADDING, (row + 0.5) * height), name, fill="white", anchor="lm")
    return sheet


def _margin(names: Sequence[str]) -> int:
    text = ImageDraw.Draw(Image.new("L", (1, 1)))
    return max((int(text.textlength(name)) + 2 * PADDING for name in names), default=0)


def overlay(unit: np.ndarray, values: np.ndarray, side: int = 256) -> Image.Image:
    """An image `(C, H, W)` in `[-1, 1]`, in grey, under a map `(H, W)`: red where it is above 0, blue below, clear at 0."""
    grey = (np.clip(unit.mean(0), -1, 1) + 1) / 2
    strength = np.abs(values) / max(float(np.abs(values).max()), 1e-12)
    colour = np.where((values > 0)[..., None], (1.0, 0.1, 0.1), (0.1, 0.3, 1.0))
    mixed = (1 - strength[..., None]) * grey[..., None] + strength[..., None] * colour
    zoom = max(1, side // len(values))
    shown = Image.fromarray((mixed * 255).round().astype(np.uint8))
    return shown.resize((shown.width * zoom, shown.height * zoom), Image.Resampling.NEAREST)


def captioned(picture: Image.Image, lines: list[str]) -> Image.Image:
    """The picture under lines of text."""
    text = ImageDraw.Draw(picture)
    width = max([picture.width, *(int(text.textlength(line)) + 2 * PADDING for line in lines)])
    sheet = Image.new("RGB", (width, picture.height + LINE * len(lines) + 6))
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((PADDING, 3 + LINE * number), line, fill="white")
    sheet.paste(picture, (0, sheet.height - picture.height))
    return sheet
