"""A patch discriminator and its two losses, for autoencoders (Isola et al., 2017; Esser et al., 2021).

The discriminator says of each patch how real it looks. It learns by the hinge loss; the autoencoder learns to raise what is said of
its reconstructions, weighted so that both of its aims pull the last layer equally hard.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import relu

MOST = 1e4
"""Upper bound of the adaptive weight."""
LOUD = 2.0**12


class PatchDiscriminator(nn.Module):
    """Images `(B, C, H, W)` in `[-1, 1]` -> a number per patch `(B, 1, h, w)`, high where it looks real.

    Three strided convolutions see patches of 34 pixels (70 in Isola et al., whose images are larger). Groups are normalised in place
    of batches, so that an image is judged alike in any batch and on any number of devices.
    """

    def __init__(self, channels: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((width, 2 * width, 2), (2 * width, 4 * width, 1)):
            layers += [nn.Conv2d(before, after, 4, stride, 1, bias=False), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """One number per patch."""
        return self.layers(images)


def discriminator_loss(discriminator: nn.Module, images: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
    """Hinge loss `(B,)` of real and reconstructed images; the reconstruction gets no gradient."""
    judged = discriminator(torch.cat([images, reconstruction.detach()])).float().flatten(1)
    real, false = judged.chunk(2)
    return 0.5 * (relu(1 - real) + relu(1 + false)).mean(1)


def deception_loss(discriminator: nn.Module, reconstruction: torch.Tensor) -> torch.Tensor:
    """What the autoencoder minimises, `(B,)`: minus the verdict on its reconstruction. The discriminator gets no gradient."""
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    return -functional_call(discriminator, frozen, reconstruction).float().flatten(1).mean(1)


def adaptive_weight(error: torch.Tensor, deception: torch.Tensor, last_layer: Sequence[torch.Tensor]) -> torch.Tensor:
    """Ratio of the two losses' gradients at the decoder's last layer (Esser et al., 2021, eq. 7); a number without gradient."""
    # Enlarged, so that gradients survive half precision; the ratio does not change.
    losses = (LOUD * error, LOUD * deception)
    norms = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, last_layer, retain_graph=True)]).norm() for loss in losses]
    return (norms[0] / (norms[1] + 1e-4 * LOUD)).clamp(0, MOST).detach()
