"""The pipeline folder: what recipes hand to each other and to the Hub.

A diffusers folder plus `medsd.json`. SD-shaped models carry `_class_name: StableDiffusionPipeline` and load in plain
diffusers. A LoRA run holds its adapters, its class tokens' embeddings and the name of its base instead of the weights.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medsd.data.dataset import INFO_FILE, DataInfo, load_dataset, load_info, looks_like_hub_id
from medsd.data.transforms import column, training_rows
from medsd.errors import InputError, first_line
from medsd.hub.contents import EMBEDS as EMBEDS_DIR
from medsd.hub.contents import INDEX as INDEX_FILE
from medsd.hub.contents import LORA as LORA_FILE
from medsd.hub.contents import files_sha256, read_json, record_of, run_config
from medsd.inference.info import Base, PipelineInfo
from medsd.output import write_text


def read_info(folder: Path) -> PipelineInfo:
    """`medsd.json` of a local folder; an empty record where there is none."""
    path = folder / INFO_FILE
    if not path.is_file():
        return PipelineInfo()
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: copy the folder again") from error
    if isinstance(record, dict) and "codec" not in record:
        raise InputError(f"{folder} is a data folder, not a pipeline folder: name the folder that finetune_unet.py wrote")
    return _checked(record, path)


def _checked(record: Any, path: Path) -> PipelineInfo:
    """Of the types that medsd writes."""
    from pydantic import TypeAdapter, ValidationError

    try:
        info = PipelineInfo.from_dict(record)
        for kind, value in ((DataInfo, record.get("data")), (dict[str, str | int | float], info.codec), (Base, record.get("base"))):
            if value is not None:
                TypeAdapter(kind).validate_python(value)
    except (ValidationError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{path} is not as medsd writes it ({first_line(error)}): copy the folder again") from error
    return info


def check_folder(folder: Path) -> None:
    """Raise InputError where `folder` is no pipeline folder or misses a part that its index names."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; train one with recipes/finetune_unet.py or name another pipeline")
    if (folder / "config.json").is_file() and not (folder / INDEX_FILE).is_file():
        raise InputError(f"{folder} is one model, not a pipeline folder: give an autoencoder as --vae, and name a pipeline")
    if not (folder / INDEX_FILE).is_file():
        raise InputError(f"{folder} has no {INDEX_FILE}, so it is not a finished pipeline folder{_training_state(folder)}")
    index = read_json(folder / INDEX_FILE)
    needed = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value[0] and name in {"vae", "unet", "text_encoder", "tokenizer", "scheduler"}
    ]
    for part in needed:
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise InputError(f"{folder}: the part {part}/ is missing although {INDEX_FILE} names it: copy the folder again")


def weights_variant(folder: Path) -> str | None:
    """Of a pipeline folder whose UNet is there in one variant only (`diffusion_pytorch_model.fp16.safetensors`), its name."""
    names = [file.name.split(".") for file in (folder / "unet").glob("*.safetensors")]
    variants = {parts[1].partition("-")[0] if len(parts) > 2 else None for parts in names}
    return variants.pop() if len(variants) == 1 else None


def _training_state(folder: Path) -> str:
    status = folder / "status.json"
    if not status.is_file():
        return ""
    record = read_json(status)
    if record.get("state") in {None, "finished"}:
        return ""
    again = "go on with --resume_from_checkpoint latest"
    remedy = f"wait for its end, or {again} if it was killed" if record["state"] == "running" else again
    return f" (training is {record['state']} at step {record['step']}; {remedy})"


def write_info(folder: Path, info: PipelineInfo) -> None:
    """Write `medsd.json`."""
    write_text(folder / INFO_FILE, json.dumps(info.to_dict(), indent=2) + "\n")


def write_embeddings(folder: Path, embeddings: dict[str, torch.Tensor]) -> None:
    """`learned_embeds/TOKEN.safetensors`, one token a file, as `load_textual_inversion` wants; embeddings `(dim,)`."""
    (folder / EMBEDS_DIR).mkdir()
    for token, embedding in embeddings.items():
        save_file({token: embedding.detach().contiguous().cpu()}, folder / EMBEDS_DIR / f"{token.strip('<>')}.safetensors")


def order_metadata(file: Path) -> None:
    """Bring the metadata of a safetensors file into order, which is another one at each save, so that the same model is the same file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    file.write_bytes(len(ordered).to_bytes(8, "little") + ordered + content[8 + length :])


def read_embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """What `write_embeddings` wrote."""
    files = sorted((folder / EMBEDS_DIR).glob("*.safetensors"))
    return {token: embedding for file in files for token, embedding in load_file(file).items()}


def download_record(hub_id: str, revision: str | None) -> Path:
    """Local folder with the `medsd.json`, the index (and LoRA files) of a Hub repository; an empty one where it has none."""
    from huggingface_hub import snapshot_download

    wanted = [INFO_FILE, INDEX_FILE, "config.json", LORA_FILE, f"{EMBEDS_DIR}/*.safetensors", "vae/*.json", "vae/*.safetensors"]
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))


def publish(made: Path, folder: Path) -> None:
    """Move everything in `made` to `folder` and remove `made`.

    Old index and `medsd.json` go first and the new ones come last, so that a folder which has them is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = (INDEX_FILE, INFO_FILE)
    for name in last:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name in last):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    made.rmdir()


def base_sha256(base: Path) -> str:
    """sha256 over the UNet's weight files of a local pipeline folder, or over a single file."""
    files = [base] if base.is_file() else sorted((base / "unet").glob("*.safetensors"))
    if not files:
        raise InputError(f"{base}/unet holds no safetensors weights: convert them with diffusers' save_pretrained first")
    return files_sha256(files)


def describe_base(base: str, revision: str | None) -> Base:
    """Record of the model that LoRA adapters start from: of a model on the Hub the commit, since a branch moves on."""
    if Path(base).exists():
        return Base(str(Path(base).resolve()), None, base_sha256(Path(base)))
    return Base(base, download_record(base, revision).name, None)


def relative_base(base: Base, run: Path) -> Base:
    """The record as `medsd.json` in `run` holds it."""
    return base if base.sha256 is None else replace(base, name=os.path.relpath(base.name, run.resolve()))


def check_base(base: Base, run: Path, local: bool) -> None:
    """Raise InputError for a base that adapters may not have: a place on this machine that a downloaded folder names, or themselves."""
    of_hub = base.sha256 is None
    if of_hub and (Path(base.name).exists() or not looks_like_hub_id(base.name)):
        raise InputError(f"{run} holds LoRA adapters of {base.name}, which is no Hub id: take the model from another place")
    if not of_hub and not local:
        raise InputError(f"{run} holds LoRA adapters of a model on its maker's machine: ask for the merged model")
    if not of_hub and (run.resolve() / base.name).resolve() == run.resolve():
        raise InputError(f"{run} holds LoRA adapters of itself: take the model from another place")


def locate_base(base: Base, run: Path) -> Base:
    """Inverse of `relative_base`; raises InputError where the base is gone or has changed since."""
    if base.sha256 is None:
        return base
    place = (run.resolve() / base.name).resolve()
    if not place.exists():
        raise InputError(f"{run} holds LoRA adapters of {place}, which is not there: bring it back to that place")
    if base_sha256(place) != base.sha256:
        raise InputError(f"{run} holds LoRA adapters of {place}, whose weights have changed since: restore them or train again")
    return replace(base, name=str(place))


def trained_on(folder: Path) -> tuple[float | None, int | None, int]:
    """What of the training split a local pipeline saw: arguments of `medsd.data.transforms.training_rows`, as its run recorded them."""
    config = training_config(folder)
    return config.get("train_fraction"), config.get("max_train_samples"), config.get("seed", 0)


def training_config(folder: Path) -> dict[str, Any]:
    """The flags that a local pipeline was trained with, or the run whose `best` it is; empty where there is no record of them."""
    return run_config(record_of(folder, "config.yaml"))


def data_of(folder: Path, info: PipelineInfo, dataset_name: str | Path | None = None) -> Path | str | None:
    """What a model was trained on: the prepared folder or Hub id that is named, else what its run recorded; None for a foreign model.

    Raises InputError where that is not known or not there, and for a Hub id of other data.
    """
    named = dataset_name or training_config(folder).get("dataset_name")
    if named is None and info.data is None:
        return None
    if named is None:
        raise InputError(f"{folder} has no config.yaml that says what it was trained on: name it with --dataset_name")
    if Path(named).is_dir():
        return Path(named)
    asked = dataset_name is not None or read_json(record_of(folder, "environment.json")).get("data_on_hub") == named
    if asked and looks_like_hub_id(str(named)) and info.data and load_info(str(named)).fingerprint == info.data.fingerprint:
        return str(named)  # A folder of this machine that is no longer there looks the same, so its name is not sent to the Hub.
    raise InputError(f"{named}: the data that {folder} was trained on is not there; name it with --dataset_name")


def copy_records(folder: Path, made: Path, names: Sequence[str] = ("config.yaml", "environment.json")) -> None:
    """What a run says of itself, beside the same model saved elsewhere."""
    for name in names:
        if (file := record_of(folder, name) if name != "audit.json" else folder / name).is_file():
            shutil.copyfile(file, made / name)


def training_patients(folder: Path) -> set[str] | None:
    """Patients that a pipeline was trained on; None where that is not known, since its training data is no longer where it was."""
    data = training_config(folder).get("dataset_name")
    try:
        if not data or not Path(data).is_dir():
            return None
        return set(column(training_rows(load_dataset(data, "train"), *trained_on(folder)), "patient_id").to_pylist())
    except (InputError, OSError):
        return None
