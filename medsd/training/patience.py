"""How the small networks stop that are trained beside the diffusion model: where held-out loss no longer falls."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from medsd.errors import InputError

PATIENCE = 20
"""Epochs without a lower held-out loss."""
Model = TypeVar("Model", bound=nn.Module)


def train_until_stale(
    model: Model, epochs: int, train: Callable[[], None], held_out_loss: Callable[[], float], progress: Callable[[], Any]
) -> Model:
    """Up to `epochs` calls of `train`, an epoch each, until `PATIENCE` of them have not lowered the held-out loss; with the best's weights.

    `progress` is called after each epoch. Raises InputError where the loss is never a number.
    """
    best, kept, stale = float("inf"), {}, 0
    for _ in range(epochs):
        model.train()
        train()
        reached = held_out_loss()
        progress()
        stale = 0 if reached < best else stale + 1
        if reached < best:
            best, kept = reached, {name: value.clone() for name, value in model.state_dict().items()}
        if stale >= PATIENCE:
            break
    if not kept:
        raise InputError(f"a {type(model).__name__} learns nothing from these images: its held-out loss is no number; look at their values")
    model.load_state_dict(kept)
    return model.eval()
