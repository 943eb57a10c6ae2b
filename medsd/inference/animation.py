"""How an image comes out of noise, as an animation that says it is synthetic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medsd.inference.pictures import picture

FRAMES = 24
FRAME_MS, LAST_FRAME_MS = 80, 2000
DESCRIPTION, SOFTWARE = 0x010E, 0x0131
"""Tags of EXIF."""
SIDE = 256
"""Smaller images are enlarged to about so many pixels."""


class Film:
    """A `callback_on_step_end` that keeps x_t of some images of a batch, after up to `FRAMES` evenly chosen steps; the last is one."""

    def __init__(self, places: Sequence[int]) -> None:
        self.places = list(places)
        self.latents: list[torch.Tensor] = []

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep x_t `(B, c, h, w)` where this step is one of the chosen."""
        if self.places and step in chosen_steps(len(pipe.scheduler.timesteps)):
            self.latents.append(tensors["latents"][self.places].clone())
        return tensors

    @torch.no_grad()
    def frames(self, pipe: Any) -> dict[int, torch.Tensor]:
        """Of each place in the batch, frames `(F, C, H, W)` in `[-1, 1]` on the CPU."""
        if not self.places:
            return {}
        decoded = torch.stack([pipe.codec.decode(latents).float().clamp(-1, 1).cpu() for latents in self.latents], 1)
        return dict(zip(self.places, decoded, strict=True))


def chosen_steps(total: int) -> set[int]:
    """Numbers of up to `FRAMES` of `total` steps, evenly spread, from the first to the last."""
    return set(np.linspace(0, total - 1, min(FRAMES, total)).round().astype(int).tolist())


def write_animation(path: Path, frames: torch.Tensor, text: str) -> None:
    """Frames `(F, C, H, W)` in `[-1, 1]` as a GIF, or a lossless WebP, by the name's ending; the last one stays for a while.

    `text` goes into the GIF's comment, or into the WebP's EXIF.
    """
    views = [_enlarged(picture(frame)) for frame in frames]
    durations = [FRAME_MS] * (len(views) - 1) + [LAST_FRAME_MS]
    options: dict[str, Any] = {"comment": text.encode("ascii", "replace")}
    if path.suffix == ".webp":
        exif = Image.Exif()
        exif[DESCRIPTION], exif[SOFTWARE] = text, "medsd"
        options = {"exif": exif, "lossless": True}
    views[0].save(path, save_all=True, append_images=views[1:], duration=durations, loop=0, **options)


def _enlarged(view: Image.Image) -> Image.Image:
    zoom = max(1, SIDE // view.height)
    return view.resize((view.width * zoom, view.height * zoom), Image.Resampling.NEAREST)
