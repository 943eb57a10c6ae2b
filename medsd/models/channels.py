"""Channel surgery: a pretrained network made to take and give another number of image channels.

The network then sees the mean of the new channels wherever it saw one of the old ones, and gives each new channel the mean of the
old outputs. For one channel this is *exactly* the old network with the image repeated going in and averaged coming out; several
channels that hold the same image give what that image gave. Channels that hold labels (a mask) enter with weight zero and leave an
autoencoder as background, so they disturb nothing until they are learnt.
"""

from typing import Any

import torch
from torch import nn

from medsd.errors import InputError

BACKGROUND = -1.0
"""Of a mask, in `[-1, 1]`."""


def adapt_vae(vae: Any, channels: int, label_channels: int = 0) -> None:
    """Make an `AutoencoderKL` or `VQModel` one of images with `channels`, the last `label_channels` of them labels. Its latents stay.

    Raises InputError where it has channels that are not alike.
    """
    check_alike(vae.config.in_channels)
    old, new = vae.config.in_channels, (channels - label_channels, label_channels)
    vae.encoder.conv_in = adapt_input(vae.encoder.conv_in, old, *new)
    vae.decoder.conv_out = adapt_output(vae.decoder.conv_out, old, *new, background=BACKGROUND)
    vae.register_to_config(in_channels=channels, out_channels=channels)


def adapt_unet(unet: Any, image_channels: int, channels: int, label_channels: int = 0) -> None:
    """Make a UNet of folded pixels (`PixelCodec`) of images with `image_channels` one of images with `channels`.

    With several channels the mean that it sees has less noise than each of them, so it has to be trained; it predicts 0 for labels.
    Raises InputError where it has channels that are not alike.
    """
    check_alike(image_channels)
    block, heads = unet.config.in_channels // image_channels, unet.config.out_channels // unet.config.in_channels
    new = (channels - label_channels, label_channels)
    unet.conv_in = adapt_input(unet.conv_in, image_channels, *new)
    unet.conv_out = adapt_output(unet.conv_out, image_channels, *new, heads=heads)
    unet.register_to_config(in_channels=channels * block, out_channels=channels * block * heads)


def check_alike(channels: int) -> None:
    """Raise InputError where channels are not grey, colour or windows of one image: modalities or a mask do not mean the same."""
    if channels not in {1, 3}:
        raise InputError(f"--adapt_channels is for a model of 1 or 3 channels, this one has {channels}: start from another one")


def adapt_input(conv: nn.Conv2d, old: int, grey: int, labels: int) -> nn.Conv2d:
    """A first convolution of `old` channels (each of them a block of folded pixels) for `grey` and `labels` channels."""
    kernel = conv.weight.detach().unflatten(1, (old, -1))
    mean = kernel.sum(1, keepdim=True) / grey
    weight = torch.cat([mean.expand(-1, grey, -1, -1, -1), torch.zeros_like(mean).expand(-1, labels, -1, -1, -1)], 1)
    return _convolution(conv, weight.flatten(1, 2), conv.bias)


def adapt_output(conv: nn.Conv2d, old: int, grey: int, labels: int, background: float = 0.0, heads: int = 1) -> nn.Conv2d:
    """A last convolution of `old` channels for `grey` and `labels` channels, of each of `heads` outputs (2: mean and variance)."""
    kernel, bias = conv.weight.detach().unflatten(0, (heads, old, -1)), conv.bias.detach().unflatten(0, (heads, old, -1))
    means = [values.mean(1, keepdim=True) for values in (kernel, bias)]
    nothing = [torch.zeros_like(means[0]), torch.full_like(means[1], background)]
    weight, bias = (
        torch.cat([mean.repeat_interleave(grey, 1), empty.repeat_interleave(labels, 1)], 1).flatten(0, 2)
        for mean, empty in zip(means, nothing, strict=True)
    )
    return _convolution(conv, weight, bias)


def _convolution(like: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """A convolution with these weights, and stride and padding of another one."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], like.kernel_size, like.stride, like.padding)
    made.weight, made.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.detach().clone())
    return made
