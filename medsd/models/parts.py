"""What a foreign checkpoint becomes: diffusers' own classes, filled strictly."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from transformers import CLIPTextModel, CLIPTokenizer

from medsd.errors import InputError

Weights = dict[str, torch.Tensor]
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Parts:
    """The parts of a pipeline that a checkpoint holds; None for those it does not."""

    unet: UNet2DConditionModel | UNet2DModel | None = None
    vae: AutoencoderKL | VQModel | None = None
    text_encoder: CLIPTextModel | None = None
    tokenizer: CLIPTokenizer | None = None
    class_embedding: torch.Tensor | None = None
    """`(classes, dim)`: the condition `(B, 1, dim)` of an image is its class's row."""
    scheduler: DDIMScheduler | None = None


def build(make: Callable[[], Model]) -> Model:
    """The model that `make` builds, with shapes but no memory; raises InputError where diffusers refuses its configuration."""
    try:
        with init_empty_weights():
            return make()
    except ValueError as error:
        raise InputError(f"no such model can be built: {' '.join(str(error).split())}") from error


def fill(make: Callable[[], Model], weights: Mapping[str, torch.Tensor]) -> Model:
    """The model that `make` builds, holding float32 copies of `weights`; raises InputError where a key or a shape does not fit."""
    model = build(make)
    _check_fit(model, weights)
    model.load_state_dict({key: value.detach().to(torch.float32, copy=True).contiguous() for key, value in weights.items()}, assign=True)
    return model.eval()


def _check_fit(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    expected = model.state_dict()
    reshaped = [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
    problems = {
        "missing": [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in weights if key not in expected],
        "of another shape": [f"{key} {tuple(weights[key].shape)} for {tuple(expected[key].shape)}" for key in reshaped],
    }
    if found := "; ".join(f"{name} {first(keys)}" for name, keys in problems.items() if keys):
        raise InputError(f"these weights do not fit {type(model).__name__}: {found}. This variant cannot be converted")


def first(keys: Iterable[str], most: int = 3) -> str:
    """The first keys, for a message."""
    listed = list(keys)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def strip(weights: Mapping[str, torch.Tensor], prefix: str) -> Weights:
    """The weights whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def count(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many numbered modules stand right behind `prefix`: one more than the highest number, 0 where there is none."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def tensor(weights: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """One of the weights; raises InputError where it is missing."""
    if key not in weights:
        raise InputError(f"the weights lack {key}: the file is not whole, or its kind is not known")
    return weights[key]


def shape(weights: Mapping[str, torch.Tensor], key: str) -> torch.Size:
    """Shape of one of the weights; raises InputError where it is missing."""
    return tensor(weights, key).shape
