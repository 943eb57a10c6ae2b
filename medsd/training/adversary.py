"""The discriminator that an autoencoder is trained against, with its own optimizer; and the absence of one."""

from collections.abc import Sequence
from typing import Any

import torch

from medsd.objectives.adversarial import PatchDiscriminator, adaptive_weight, deception_loss, discriminator_loss
from medsd.training.checkpoint import TrainState
from medsd.training.setup import Optimisation, start


class Adversary:
    """A patch discriminator that joins at update `first`; its loss is weighted `weight` times the adaptive weight."""

    def __init__(
        self, accelerator: Any, channels: int, weight: float, first: int, last_layer: Sequence[torch.Tensor], optimisation: Optimisation
    ) -> None:
        self.accelerator, self.weight, self.first, self.last_layer = accelerator, weight, first, last_layer
        self.discriminator = PatchDiscriminator(channels).to(accelerator.device)
        self.state, networks = start(accelerator, {"discriminator": self.discriminator}, optimisation)
        self.networks: list[torch.nn.Module] = [networks["discriminator"]]
        self.partners: dict[str, TrainState] = {"discriminator": self.state}

    def deception(self, step: int, error: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """The weighted loss, a number, that `error` is added to; 0 until the discriminator joins."""
        if step < self.first:
            return torch.zeros_like(error)
        deception = deception_loss(self.discriminator, reconstruction).mean()
        return self.weight * adaptive_weight(error, deception, self.last_layer) * deception

    def learn(self, step: int, images: torch.Tensor, reconstruction: torch.Tensor, max_grad_norm: float) -> None:
        """The discriminator's update."""
        if step >= self.first:
            loss = discriminator_loss(self.networks[0], images, reconstruction).mean()
            self.state.learn(self.accelerator, loss, max_grad_norm)


class NoAdversary:
    """The interface of `Adversary`, without a discriminator."""

    networks: Sequence[torch.nn.Module] = ()
    partners: dict[str, TrainState] = {}

    def deception(self, step: int, error: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """0."""
        return torch.zeros_like(error)

    def learn(self, step: int, images: torch.Tensor, reconstruction: torch.Tensor, max_grad_norm: float) -> None:
        """Nothing."""
