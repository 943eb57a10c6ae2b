"""The discriminator that an autoencoder is trained against, with its own optimizer; and the absence of one."""

from collections.abc import Sequence
from typing import Any

import torch

from medsd.objectives.adversarial import PatchDiscriminator, adaptive_weight, deception_loss, discriminator_loss
from medsd.training.setup import Optimisation, start
from medsd.training.state import TrainState
from medsd.training.stopwatch import Stopwatch


class Adversary:
    """A patch discriminator that joins at update `first`; its loss is weighted `weight` times the adaptive weight."""

    def __init__(
        self,
        accelerator: Any,
        channels: int,
        weight: float,
        first: int,
        last_layer: Sequence[torch.Tensor],
        optimisation: Optimisation,
        watch: Stopwatch,
    ) -> None:
        self.accelerator, self.weight, self.last_layer = accelerator, weight, last_layer
        self.discriminator = PatchDiscriminator(channels).to(accelerator.device)
        self.state, network = start(accelerator, self.discriminator, optimisation, watch)
        self.state.memory["first_update"] = torch.tensor([first])
        self.networks: list[torch.nn.Module] = [network]
        self.partners: dict[str, TrainState] = {"discriminator": self.state}

    def joined(self, step: int) -> bool:
        """Whether the discriminator plays a part in update `step`; a resumed run keeps the moment at which it joined."""
        return step >= self.state.memory["first_update"].item()

    def deception(self, step: int, error: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """The weighted loss, a number, that `error` is added to; 0 until the discriminator joins."""
        if not self.joined(step):
            return torch.zeros_like(error)
        deception = deception_loss(self.discriminator, reconstruction).mean()
        return self.weight * adaptive_weight(error, deception, self.last_layer) * deception

    def learn(self, step: int, images: torch.Tensor, reconstruction: torch.Tensor, max_grad_norm: float) -> None:
        """The discriminator's update."""
        if self.joined(step):
            loss = discriminator_loss(self.networks[0], images, reconstruction).mean()
            self.state.learn(self.accelerator, loss, max_grad_norm)


class NoAdversary:
    """The interface of `Adversary`, without a discriminator."""

    def __init__(self) -> None:
        self.networks: list[torch.nn.Module] = []
        self.partners: dict[str, TrainState] = {}

    def deception(self, step: int, error: torch.Tensor, reconstruction: torch.Tensor) -> torch.Tensor:
        """0."""
        return torch.zeros_like(error)

    def learn(self, step: int, images: torch.Tensor, reconstruction: torch.Tensor, max_grad_norm: float) -> None:
        """Nothing."""
