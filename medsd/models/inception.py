"""The InceptionV3 of the Fréchet inception distance (Heusel et al., NeurIPS 2017): the TensorFlow graph of 2015-12-05, in torch.

It is not torchvision's: average pools leave out the border that was added, and the last block pools by maximum. Names of weights are those
of the published port (`pt_inception-2015-12-05-6726825d.pth`); its classes are not needed.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from medsd.errors import InputError
from medsd.models.parts import Weights, fill

SIDE, WIDTH = 299, 2048
"""Pixels of the images that it sees, and its features."""
CLASSES = 1008
FIRST_KEY = "Conv2d_1a_3x3.conv.weight"

Step = tuple[int, int | tuple[int, int]]
Branches = Mapping[str, list[Step | list[Step]]]
"""Of each branch its convolutions (outputs, kernel) one after the other; those in a list stand side by side. They are numbered from 1, side
by side also from a."""

WIDE, TALL = (1, 7), (7, 1)
STEM = {"Conv2d_1a_3x3": (32, 3, 2, 0), "Conv2d_2a_3x3": (32, 3, 1, 0), "Conv2d_2b_3x3": (64, 3, 1, 1)}
STEM_BEHIND_POOL = {"Conv2d_3b_1x1": (80, 1, 1, 0), "Conv2d_4a_3x3": (192, 3, 1, 0)}
"""(outputs, kernel, stride, padding); both end in a pool."""


def _a(pooled: int) -> Branches:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }


def _c(inner: int) -> Branches:
    long = [(inner, 1), (inner, TALL), (inner, WIDE), (inner, TALL), (192, WIDE)]
    short = [(inner, 1), (inner, WIDE), (192, TALL)]
    return {"branch1x1": [(192, 1)], "branch7x7": short, "branch7x7dbl": long, "branch_pool": [(192, 1)]}


_FORK: list[Step] = [(384, (1, 3)), (384, (3, 1))]
_B: Branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}
_D: Branches = {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, WIDE), (192, TALL), (192, 3)], "branch_pool": []}
_E: Branches = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), _FORK],
    "branch3x3dbl": [(448, 1), (384, 3), _FORK],
    "branch_pool": [(192, 1)],
}
BLOCKS: dict[str, tuple[str, Branches]] = {
    "Mixed_5b": ("average", _a(32)),
    "Mixed_5c": ("average", _a(64)),
    "Mixed_5d": ("average", _a(64)),
    "Mixed_6a": ("halve", _B),
    "Mixed_6b": ("average", _c(128)),
    "Mixed_6c": ("average", _c(160)),
    "Mixed_6d": ("average", _c(160)),
    "Mixed_6e": ("average", _c(192)),
    "Mixed_7a": ("halve", _D),
    "Mixed_7b": ("average", _E),
    "Mixed_7c": ("maximum", _E),
}
"""How each pools, and its branches; one that halves the side does so in the last convolution of every branch."""


class Convolution(nn.Module):
    """Without bias, normalised, rectified."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int, padding: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, inputs, h, w)` -> `(B, outputs, h', w')`."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side; `width` is how many channels they give together."""

    def __init__(self, inputs: int, pool: str, branches: Branches) -> None:
        super().__init__()
        self.pool, self.width, self.branches = pool, 0, {}
        for branch, steps in branches.items():
            self.branches[branch], width = [], inputs
            for number, step in enumerate(steps, 1):
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                last = pool == "halve" and number == len(steps)
                side_by_side = (
                    {f"{name}{letter}": one for letter, one in zip("ab", step, strict=True)} if isinstance(step, list) else {name: step}
                )
                for key, (outputs, kernel) in side_by_side.items():
                    self.add_module(key, Convolution(width, outputs, kernel, *((2, 0) if last else (1, "same"))))
                self.branches[branch].append(list(side_by_side))
                width = sum(outputs for outputs, _ in side_by_side.values())
            self.width += width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, inputs, h, w)` -> `(B, width, h', w')`."""
        return torch.cat(
            [self._along(steps, self._pooled(x) if branch == "branch_pool" else x) for branch, steps in self.branches.items()], 1
        )

    def _along(self, steps: list[list[str]], x: torch.Tensor) -> torch.Tensor:
        for names in steps:
            x = torch.cat([self.get_submodule(name)(x) for name in names], 1)
        return x

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return F.max_pool2d(x, 3, 2) if self.pool == "halve" else F.max_pool2d(x, 3, 1, 1)


class InceptionV3(nn.Module):
    """Images -> 2048 features."""

    name = "inception-v3"

    def __init__(self) -> None:
        super().__init__()
        self.settings = {"side": SIDE}
        width = 3
        for name, (outputs, *shape) in (STEM | STEM_BEHIND_POOL).items():
            self.add_module(name, Convolution(width, outputs, *shape))
            width = outputs
        for name, (pool, branches) in BLOCKS.items():
            self.add_module(name, Block(width, pool, branches))
            width = self.get_submodule(name).width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in `[-1, 1]` -> `(B, 2048)`; they are brought to 299 px bilinearly, as pytorch-fid does."""
        x = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        for part in (STEM, STEM_BEHIND_POOL):
            for name in part:
                x = self.get_submodule(name)(x)
            x = F.max_pool2d(x, 3, 2)
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def build_inception(weights: Weights) -> InceptionV3:
    """From the published port's weights; raises InputError for torchvision's of the same names, and where one is missing."""
    if "AuxLogits.conv0.conv.weight" in weights or ("fc.weight" in weights and len(weights["fc.weight"]) != CLASSES):
        raise InputError("this is torchvision's Inception, which is not that of FID: name the file pt_inception-2015-12-05-6726825d.pth")
    return fill(InceptionV3, {key: value for key, value in weights.items() if not key.startswith("fc.")})
