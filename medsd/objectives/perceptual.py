"""Feature distance between images, with a gradient, for any number of channels.

Every channel is looked at on its own, as a grey image, so two and five channels need no other network. The default network needs
no download: its filters are drawn once from a fixed seed. Random convolutions keep much of the order in which trained ones rank
distortions (Zhang et al., 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", section 4).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate, leaky_relu

from medsd.errors import InputError

WIDTHS = (16, 32, 64, 64)
LARGEST_SIDE = 224
"""Planes are enlarged or shrunk to the side that a pretrained network was trained on, or to this where that is larger (DINOv2: 518)."""
FAINT = 0.01
"""Squared length of features below which a place counts less, so that the noise of an empty background is not made equal to edges."""


class RandomFeatures(nn.Module):
    """Four levels of fixed random 3x3 convolutions, each at half the side of the one before.

    Filters have unit length, and in the first level zero mean: it sees structure and not brightness.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for level, (width, before) in enumerate(zip(WIDTHS, (1, *WIDTHS), strict=False)):
            weight = torch.randn(width, before * 9, generator=generator)
            if level == 0:
                weight = weight - weight.mean(1, keepdim=True)
            weight = weight / weight.norm(dim=1, keepdim=True)
            self.register_buffer(f"weight{level}", weight.unflatten(1, (before, 3, 3)))

    def forward(self, planes: torch.Tensor) -> list[torch.Tensor]:
        """Planes `(N, 1, H, W)` in `[-1, 1]` -> features `(N, c, h, w)` of each level that the side allows."""
        levels, features = [], planes
        for level in range(len(WIDTHS)):
            if level:
                features = avg_pool2d(features, 2)
            features = leaky_relu(conv2d(features, getattr(self, f"weight{level}"), padding=1), 0.2)
            levels.append(features)
            if min(features.shape[-2:]) < 4:
                break
        return levels


class PretrainedFeatures(nn.Module):
    """The hidden states of a vision model of transformers (DINOv2, ViT, ResNet, ConvNeXt ...), which reads grey planes as colour."""

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float], side: int | None) -> None:
        super().__init__()
        self.model, self.side = model.eval().requires_grad_(False), side if side is None else min(side, LARGEST_SIDE)
        interpolates = self.side != side and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if interpolates else {}
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    @classmethod
    def load(cls, name: str) -> "PretrainedFeatures":
        """From a folder or Hub id; raises InputError where there is no vision model with safetensors weights."""
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"--perceptual_model {name}: no vision model of transformers there ({str(error).splitlines()[0]})") from error
        if not hasattr(model.config, "num_channels") or model.config.num_channels != 3:
            raise InputError(f"--perceptual_model {name}: a model of colour images is expected, this is a {type(model).__name__}")
        side = getattr(model.config, "image_size", None)
        return cls(model, *_normalisation(name), side if side is None or isinstance(side, int) else min(side))

    def forward(self, planes: torch.Tensor) -> list[torch.Tensor]:
        """Planes `(N, 1, H, W)` in `[-1, 1]` -> hidden states, channels (or token width) second."""
        colour = ((planes + 1) / 2 - self.mean) / self.std
        if self.side is not None and colour.shape[-1] != self.side:
            colour = interpolate(colour, (self.side, self.side), mode="bilinear", antialias=True)
        states = self.model(pixel_values=colour, output_hidden_states=True, **self.options).hidden_states
        return [state if state.ndim == 4 else state.movedim(1, 2) for state in states]


class PerceptualDistance(nn.Module):
    """Distance of two images in the features of a fixed network (Zhang et al., 2018, eq. 1, without learned weights).

    Features are scaled to (nearly) unit length over their channels at each place, so that each place and each level counts alike.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)

    def forward(self, reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Of both `(B, C, H, W)` in `[-1, 1]`, one number per image `(B,)`; the gradient flows to the reconstruction."""
        channels = images.shape[1]
        planes = torch.cat([reconstruction, images]).flatten(0, 1).unsqueeze(1).float()
        levels = [_unit_length(level) for level in self.features(planes)]
        distances = [(ours - theirs).square().sum(1).flatten(1).mean(1) for ours, theirs in (level.chunk(2) for level in levels)]
        return torch.stack(distances).mean(0).unflatten(0, (-1, channels)).mean(1)


def perceptual_distance(model: str | None) -> PerceptualDistance:
    """With the vision model of a folder or Hub id, or with `RandomFeatures` for None."""
    return PerceptualDistance(RandomFeatures() if model is None else PretrainedFeatures.load(model))


def _unit_length(features: torch.Tensor) -> torch.Tensor:
    return features / (features.square().sum(1, keepdim=True) + FAINT).sqrt()


def _normalisation(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the model's image processor; one half where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        record, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        record = {}
    return record.get("image_mean", [0.5] * 3), record.get("image_std", [0.5] * 3)
