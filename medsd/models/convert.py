"""The door for foreign checkpoints: one file, or a MONAI bundle folder, -> diffusers' own classes, offline.

A file is read without running code: safetensors, or a pickle of tensors only.
"""

import ast
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from medsd.errors import InputError
from medsd.models.ldm import convert_ldm, convert_ldm_vae, is_ldm, is_ldm_vae
from medsd.models.monai import (
    DEFINITION_KEYS,
    convert_monai,
    convert_monai_schedule,
    is_monai_autoencoder,
    is_monai_unet,
)
from medsd.models.parts import Parts, Weights

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
NESTS = ("state_dict", "model", "network", "autoencoder_state_dict", "unet_state_dict")
"""Where training programs put the weights within a file."""
SCHEDULE_KEYS = ("num_train_timesteps", "schedule", "beta_start", "beta_end", "prediction_type")


def is_single_file(name: str | Path) -> bool:
    """Whether `name` is an existing file of weights."""
    return Path(name).suffix.lower() in SUFFIXES and Path(name).is_file()


def is_monai_bundle(name: str | Path) -> bool:
    """Whether `name` is a folder with files of weights in `models/`, as a MONAI bundle has, and without a diffusers index."""
    weights = [path for path in (Path(name) / "models").glob("*") if path.suffix.lower() in SUFFIXES]
    return bool(weights) and not (Path(name) / "model_index.json").is_file()


def read_weights(path: str | Path) -> Weights:
    """The tensors of one file by name; raises InputError where it is damaged, holds more than data, or holds no tensors."""
    record = _read(Path(path))
    while nest := next((name for name in NESTS if isinstance(record, Mapping) and isinstance(record.get(name), Mapping)), None):
        record = record[nest]
    if weights := _tensors(record):
        return weights
    raise InputError(f"{path} holds no weights by name: name the file of a model's state_dict")


def _tensors(record: Any) -> Weights:
    entries = record.items() if isinstance(record, Mapping) else ()
    return {key: value for key, value in entries if isinstance(key, str) and isinstance(value, torch.Tensor)}


def _read(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file; name a checkpoint ({', '.join(SUFFIXES)})")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "GLOBAL" in str(error) or zipfile.is_zipfile(path):
            raise InputError(
                f"{path} holds Python objects, which could run code: convert it to .safetensors on a machine you trust"
            ) from error
        raise InputError(f"{path} is damaged or no checkpoint: copy the file again") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({(str(error).splitlines() or [''])[0]}): copy the file again") from error


def load_single_file(path: str | Path) -> Parts:
    """The parts of one checkpoint file in CompVis' or MONAI's names, recognised from its keys.

    CompVis' YAML is read where it lies beside the file as its name with `.yaml`. Raises InputError where the kind is not known.
    """
    weights = read_weights(path)
    with _naming(path):
        return _convert(weights, _read_settings(Path(path).with_suffix(".yaml")))


@contextmanager
def _naming(source: str | Path) -> Iterator[None]:
    """Name the source in every refusal; weights of impossible shapes, which break the arithmetic anywhere, are one as well."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{source}: damaged, or of a kind that cannot be converted ({' '.join(str(error).split())})") from error


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        record = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} beside it is not YAML: mend it or move it away") from error
    return record if isinstance(record, dict) else {}


def _convert(weights: Weights, settings: Mapping[str, Any]) -> Parts:
    if any(key.startswith("conditioner.") for key in weights):
        raise InputError("this is Stable Diffusion XL, which has two text encoders: only 1.x and 2.x can be converted")
    if is_ldm(weights):
        return convert_ldm(weights, settings)
    if is_ldm_vae(weights):
        return Parts(vae=convert_ldm_vae(weights, settings))
    if is_monai_autoencoder(weights) or is_monai_unet(weights):
        warnings.warn(
            "a single file of MONAI tells neither groups nor head widths, and MONAI's defaults are assumed: name the bundle's folder, "
            "whose configs/ say them, if it was trained with others",
            stacklevel=2,
        )
        model = convert_monai(weights, None)
        return Parts(vae=model) if is_monai_autoencoder(weights) else Parts(unet=model)
    if "time_embedding.linear_1.weight" in weights or "encoder.down_blocks.0.resnets.0.conv1.weight" in weights:
        raise InputError("these weights have diffusers' names already: name the folder that holds the file and its config.json")
    beginnings = sorted({key.split(".")[0] for key in weights})
    raise InputError(
        f"not a checkpoint of a known kind, its keys begin with {', '.join(beginnings[:6])}: known are Stable Diffusion 1.x and 2.x, "
        "latent diffusion and its autoencoders in CompVis' names, and MONAI's AutoencoderKL and DiffusionModelUNet"
    )


def load_monai_bundle(folder: str | Path) -> Parts:
    """The parts of a MONAI bundle: `models/` holds the weights, `configs/` (JSON or YAML) the networks' definitions where there are any.

    The autoencoder's scaling factor is the `scale_factor` of a weights file or a config, else 1.
    """
    folder = Path(folder)
    files = sorted(path for path in (folder / "models").glob("*") if path.suffix in SUFFIXES)
    records = {path: _read(path) for path in files}
    configs = [_read_config(path) for path in sorted((folder / "configs").glob("*"))]
    vae_weights = _one_of(records, is_monai_autoencoder)
    unet_weights = _one_of(records, is_monai_unet)
    if vae_weights is None and unet_weights is None:
        raise InputError(f"{folder}/models holds no weights of MONAI's AutoencoderKL or DiffusionModelUNet in {', '.join(SUFFIXES)}")
    with _naming(folder):
        vae = convert_monai(vae_weights, _definition(configs, ("AutoencoderKL",), DEFINITION_KEYS)) if vae_weights else None
        unet = convert_monai(unet_weights, _definition(configs, ("DiffusionModelUNet",), DEFINITION_KEYS)) if unet_weights else None
        schedule = _definition(configs, ("DDPMScheduler", "DDIMScheduler"), SCHEDULE_KEYS)
        scheduler = convert_monai_schedule(schedule) if schedule is not None else None
    if vae is not None:
        vae.register_to_config(scaling_factor=_scale_factor([*records.values(), *configs]))
    return Parts(unet=unet, vae=vae, scheduler=scheduler)


def _one_of(records: Mapping[Path, Any], belongs: Callable[[Weights], bool]) -> Weights | None:
    found = [(path.name, weights) for path, record in records.items() for weights in _state_dicts(record) if belongs(weights)]
    if len(found) > 1:
        raise InputError(f"{', '.join(name for name, _ in found)} hold weights of the same kind of network: move away all but one")
    return found[0][1] if found else None


def _state_dicts(record: Any) -> Iterator[Weights]:
    if isinstance(record, Mapping):
        yield _tensors(record)
        for value in record.values():
            yield from _state_dicts(value)


def _read_config(path: Path) -> dict[str, Any]:
    if path.suffix not in (".json", ".yaml", ".yml"):
        return {}
    try:
        record = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not {path.suffix[1:].upper()}: mend it or move it away") from error
    return record if isinstance(record, dict) else {}


def _definition(configs: list[dict[str, Any]], classes: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The keywords `keys` with which the bundle builds one of `classes`; None where it does not."""
    found: list[dict[str, Any]] = []
    for config in configs:
        for entry in _entries(config):
            if str(entry.get("_target_", "")).split(".")[-1] in classes:
                keywords = {key: _resolve(config, key, entry[key]) for key in keys if key in entry}
                found += [keywords] if keywords not in found else []
    if len(found) > 1:
        raise InputError(f"configs/ define {classes[0]} in different ways ({found[0]} and {found[1]}): move away all but one")
    return found[0] if found else None


def _entries(record: Any) -> Iterator[dict[str, Any]]:
    if isinstance(record, dict):
        yield record
    for value in record.values() if isinstance(record, dict) else record if isinstance(record, list) else ():
        yield from _entries(value)


def _resolve(config: dict[str, Any], key: str, value: Any) -> Any:
    """A value of a bundle's config: `@name` is another entry, `$text` a Python expression, of which only constants are read."""
    if not isinstance(value, str) or value[:1] not in ("@", "$"):
        return value
    try:
        if value[0] == "$":
            return ast.literal_eval(value[1:])
        found: Any = config
        for name in re.split("#|::", value[1:]):
            found = found[int(name)] if isinstance(found, list) else found[name]
        return _resolve(config, key, found)
    except (KeyError, IndexError, TypeError, ValueError, SyntaxError, RecursionError) as error:
        raise InputError(f"{key} is {value} in the bundle's configs, which cannot be looked up: write its value there") from error


def _scale_factor(records: list[Any]) -> float:
    """The first number that a weights file or a config calls `scale_factor`, else 1; raises InputError where only a formula says it."""
    found = [(record, entry["scale_factor"]) for record in records for entry in _entries(record) if "scale_factor" in entry]
    numbers = [value for _, value in found if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)]
    if numbers or not found:
        return float(numbers[0]) if numbers else 1.0
    record, value = found[0]
    return float(_resolve(record, "scale_factor", value))
