"""A small ResNet for classes: what a discriminative model sees in the same images."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two convolutions around a shortcut (He et al., CVPR 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        plain = stride == 1 and inputs == outputs
        self.shortcut = (
            nn.Identity() if plain else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, inputs, h, w)` -> `(B, outputs, h / stride, w / stride)`."""
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 for small images `(B, C, R, R)` in `[-1, 1]`: a 3 x 3 stem without pooling, which halves images of more than 32 px.

    `width` channels after the stem, 8 `width` features in the end.
    """

    def __init__(self, channels: int, classes: int, side: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 1 + (side > 32), 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        levels = zip(widths, widths[1:], (1, 2, 2, 2), strict=False)
        self.body = nn.Sequential(*(layer for a, b, stride in levels for layer in (Block(a, b, stride), Block(b, b, 1))))
        self.head = nn.Linear(8 * width, classes)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        """`(B, 8 width, h, w)`, before the mean over places."""
        return self.body(self.stem(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, classes)`."""
        return self.head(self.maps(images).mean((2, 3)))
