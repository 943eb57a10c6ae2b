"""ResNet-50 (He et al., CVPR 2016) with published weights, of RadImageNet (Mei et al., Radiology AI 2022) or of ImageNet.

Three spellings of the keys are known: torchvision's (`layer1.0.conv1.weight`); RadImageNet's own, which numbers torchvision's modules
(`backbone.4.0.conv1.weight`); and that of the port of RadImageNet's Keras model, which MONAI's scripts use. That has torchvision's names,
but convolutions with a bias, blocks that halve the side in the first convolution instead of the second, and another epsilon.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetModel

from medsd.models.parts import Weights, fill

NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
IMAGENET_CLASSES, IMAGENET_SIDE = 1000, 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KERAS_EPSILON = 1.001e-5


class ResNet50(nn.Module):
    """Images -> 2048 features.

    RadImageNet's weights see images of any side, in the order blue, green, red, less ImageNet's mean, as in MONAI's scripts for the FID of
    MAISI (Guo et al., WACV 2025); ImageNet's see 224 px, normalised.
    """

    def __init__(self, model: ResNetModel, of_imagenet: bool) -> None:
        super().__init__()
        self.model, self.of_imagenet = model, of_imagenet
        self.name = "imagenet-resnet50" if of_imagenet else "radimagenet-resnet50"
        self.settings = {"in_first": model.config.downsample_in_bottleneck}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in `[-1, 1]` -> `(B, 2048)`, averaged over places."""
        seen = self._normalised(images) if self.of_imagenet else self._centred(images)
        return self.model(pixel_values=seen).last_hidden_state.mean((2, 3))

    @staticmethod
    def _centred(images: torch.Tensor) -> torch.Tensor:
        return (images.flip(1) + 1) / 2 - images.new_tensor(IMAGENET_MEAN[::-1])[:, None, None]

    @staticmethod
    def _normalised(images: torch.Tensor) -> torch.Tensor:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        seen = F.interpolate(images, (IMAGENET_SIDE, IMAGENET_SIDE), mode="bilinear", antialias=True)
        return ((seen + 1) / 2 - mean) / std


def torchvision_names(weights: Weights) -> Weights:
    """The weights with torchvision's names, whichever of the three spellings they have."""
    named = {}
    for key, value in weights.items():
        first, _, rest = key.removeprefix("module.").removeprefix("backbone.").partition(".")
        named[f"{NUMBERED.get(first, first)}.{rest}"] = value
    return named


def is_resnet50(named: Weights) -> bool:
    """Whether weights in torchvision's names are those of a ResNet-50 (18 and 34 have no third convolution, 101 has more blocks)."""
    return "layer3.5.conv3.weight" in named and "layer3.6.conv3.weight" not in named and "bn1.running_mean" in named


def build_resnet50(named: Weights) -> ResNet50:
    """From weights in torchvision's names; raises InputError where one is missing.

    They are of ImageNet where they come with its 1,000 classes, else of RadImageNet.
    """
    of_imagenet = "fc.weight" in named and len(named["fc.weight"]) == IMAGENET_CLASSES
    keras = "conv1.bias" in named
    body = {transformers_name(key): value for key, value in _without_biases(named).items() if not key.startswith("fc.")}
    model = fill(lambda: ResNetModel(ResNetConfig(downsample_in_bottleneck=keras)), body)
    for module in model.modules():
        if keras and isinstance(module, nn.BatchNorm2d):
            module.eps = KERAS_EPSILON
    return ResNet50(model, of_imagenet).eval()


def _without_biases(named: Weights) -> Weights:
    """A convolution's bias moves into the mean that the normalisation behind it subtracts."""
    biases = {key: value for key, value in named.items() if re.search(r"(conv\d|downsample\.0)\.bias$", key)}
    kept = {key: value for key, value in named.items() if key not in biases}
    for key, bias in biases.items():
        mean = key.replace("conv", "bn").replace("downsample.0", "downsample.1").replace(".bias", ".running_mean")
        kept[mean] = (kept[mean].double() - bias.double()).float()
    return kept


def transformers_name(key: str) -> str:
    """`layer1.0.bn2.weight` -> `encoder.stages.0.layers.0.layer.1.normalization.weight`."""
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"embedder.embedder.{kinds[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", key):
        stage, block, kind, place, last = found.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(place) - 1}.{kinds[kind]}.{last}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", key):
        stage, block, kind, last = found.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{kinds[kind]}.{last}"
    return key
