"""Networks that others trained and that make features of colour images: vision models of transformers, and single files of weights.

Each is a module from images `(B, 3, H, W)` in `[-1, 1]` to features `(B, D)`. Its `name` and `settings` (JSON) say what determines the
numbers beside the weights.
"""

import inspect
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from medsd.errors import InputError
from medsd.models.convert import read_weights
from medsd.models.inception import FIRST_KEY, InceptionV3, build_inception
from medsd.models.parts import first
from medsd.models.resnet50 import ResNet50, build_resnet50, is_resnet50, torchvision_names
from medsd.models.trust import trusted_folder

SUFFIXES = (".safetensors", ".pt", ".pth")
SIDE = 224
"""Of a model that says none."""
BICUBIC = 3
"""In an image processor's file."""


class VisionModel(nn.Module):
    """A vision model of transformers (DINOv2, CLIP, ViT, ResNet, ConvNeXt ...) with what its image processor does to images.

    They are resized in float32, never in 8 bits, and not cropped.
    """

    def __init__(self, model: Any, processor: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.name = model, model.config.model_type
        plain = processor.get("do_normalize") is False
        self.settings = {
            "side": _side(processor) or _first_number(getattr(model.config, "image_size", None)) or SIDE,
            "mean": [0.0] * 3 if plain else processor.get("image_mean", [0.5] * 3),
            "std": [1.0] * 3 if plain else processor.get("image_std", [0.5] * 3),
            "mode": "bicubic" if processor.get("resample") == BICUBIC else "bilinear",
        }
        trained = _first_number(getattr(model.config, "image_size", None))
        stretched = trained != self.settings["side"] and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if stretched else {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, 3, H, W)` in `[-1, 1]` -> the pooled output `(B, D)`, or the mean over places where the model does not pool."""
        side, mean, std = self.settings["side"], *(images.new_tensor(self.settings[name])[:, None, None] for name in ("mean", "std"))
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode=self.settings["mode"], antialias=True)
        output = self.model(pixel_values=((images + 1) / 2 - mean) / std, **self.options)
        pooled = output.get("pooler_output")
        return self._averaged(output.last_hidden_state) if pooled is None else pooled.flatten(1)

    def _averaged(self, states: torch.Tensor) -> torch.Tensor:
        """Maps `(B, D, h, w)`, or tokens `(B, n, D)` of which those that stand for no place come first."""
        if states.ndim == 4:
            return states.mean((2, 3))
        patch = _first_number(getattr(self.model.config, "patch_size", None))
        places = (self.settings["side"] // patch) ** 2 if patch else states.shape[1]
        return states[:, -places:].mean(1)


def load_vision_model(name: str) -> VisionModel:
    """From a folder or Hub id: safetensors only, and no code of its own.

    Raises InputError where there is no vision model of colour images, or weights are missing.
    """
    from transformers import AutoModel

    folder = trusted_folder(name)
    options = {"use_safetensors": True, "dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
    try:
        whole, info = AutoModel.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(
            f"{name}: no vision model of transformers with safetensors weights ({' '.join(str(error).split())[:200]})"
        ) from error
    model = getattr(whole, "vision_model", whole)
    if getattr(model.config, "num_channels", None) != 3 or getattr(model, "main_input_name", None) != "pixel_values":
        raise InputError(f"{name}: a model of colour images is expected, this is a {type(whole).__name__}")
    own = set(model.state_dict())
    missing = {key.removeprefix("vision_model.") for key in info["missing_keys"]} & own
    if pooler := {key for key in missing if key.startswith("pooler.")}:
        model.pooler = None  # Saved without one, as classifiers are; transformers would pool with random numbers.
    if missing - pooler:
        raise InputError(f"{name}: its file lacks {first(sorted(missing - pooler))}, which would be random numbers: copy the folder again")
    return VisionModel(model.eval(), _processor(name))


def _processor(name: str) -> dict[str, Any]:
    """`preprocessor_config.json`; empty where there is none."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(name)[0]
    except (OSError, ValueError):
        return {}


def _side(processor: dict[str, Any]) -> int | None:
    """Of the square that a model sees, in pixels."""
    cropped = processor.get("do_center_crop") and processor.get("crop_size")
    size = cropped or processor.get("size")
    return _first_number(tuple(size.values()) if isinstance(size, dict) else size)


def _first_number(value: Any) -> int | None:
    return next(iter(value), None) if isinstance(value, tuple | list) else value


def load_network(path: str | Path) -> InceptionV3 | ResNet50:
    """Inception or a ResNet-50 from one file of weights, recognised from its keys; raises InputError for any other file."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: weights in {', '.join(SUFFIXES)} are expected")
    if _is_torchscript(path):
        raise InputError(f"{path} is TorchScript, which holds code: name a file of the model's state_dict")
    weights = read_weights(path)
    named = torchvision_names(weights)
    if FIRST_KEY not in weights and not is_resnet50(named):
        raise InputError(
            f"{path} is of no known network, its keys begin with {first(sorted({key.split('.')[0] for key in weights}))}: known are the "
            "Inception of FID (pt_inception-2015-12-05-6726825d.pth), and ResNet-50 of RadImageNet or ImageNet"
        )
    try:
        return build_inception(weights) if FIRST_KEY in weights else build_resnet50(named)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _is_torchscript(path: Path) -> bool:
    """Such an archive holds its program beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("constants.pkl" in name or "/code/" in name for name in archive.namelist())
