"""What of a trained folder travels: an allow-list of files, and of what is in them.

A folder is a *pipeline*, the adapters of one (*lora*), or an *autoencoder*. Weights travel as they lie there, safetensors alone; of JSON
and YAML what names places on this machine is left out, and a record with a key that medsd does not write is refused. Checkpoints, curves,
pictures of real images, and everything else stay.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from medsd.errors import InputError
from medsd.hub.privacy import Content, safetensors_header

INFO, INDEX, LORA, EMBEDS = "medsd.json", "model_index.json", "pytorch_lora_weights.safetensors", "learned_embeds"
MODEL = r"(diffusion_pytorch_)?model(\.fp16|\.bf16)?(-\d{5}-of-\d{5})?\.safetensors"
WEIGHTS = (rf"unet/{MODEL}", rf"vae/{MODEL}", rf"text_encoder/{MODEL}", rf"{EMBEDS}/[^/]+\.safetensors", re.escape(LORA), MODEL)
"""In the order in which they are hashed."""
CONFIGS = (
    r"(unet|vae|text_encoder)/(config|generation_config)\.json",
    r"(unet|vae|text_encoder)/(diffusion_pytorch_)?model\.safetensors\.index(\.fp16|\.bf16)?\.json",
    r"tokenizer/(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
    r"tokenizer/merges\.txt",
    r"scheduler/scheduler_config\.json",
    r"config\.json",
    re.escape(INDEX),
)
FEWEST_PATIENTS = 10
"""Of a subgroup whose numbers travel."""
RECORDS = ("config.yaml", "environment.json", "metrics.json", "audit.json", INFO)
FIGURES = (
    "generated",
    "denoising",
    "roc",
    "confusion",
    "reliability",
    "risk_coverage",
    "subgroups",
    "embedding",
    "histograms",
    "loss",
    "data_size",
    "audit_distances",
)
"""Of a report: those that show no real image."""
MADE = ("README.md", "pipeline.py")
OURS = re.compile("|".join((*WEIGHTS, *CONFIGS, *map(re.escape, (*RECORDS, *MADE)), rf"figures/({'|'.join(FIGURES)})\.png")))
PLACES = frozenset(
    {"dataset_name", "output_dir", "pretrained_model_name_or_path", "vae", "perceptual_model", "resume_from_checkpoint", "hub_model_id"}
)
"""Of a run's `config.yaml`: names of folders, and what may be one."""
INFO_KEYS = {
    "data": {
        "class_names",
        "prompts",
        "class_tokens",
        "intensity",
        "resolution",
        "resize",
        "image_channels",
        "unit",
        "fingerprint",
        "multi_label",
        "prompt_template",
    },
    "codec": {"kind", "image_channels", "factor", "mean", "std"},
    "hypotheses": {"sets", "counts", "pooled"},
    "calibration": {
        "temperature",
        "bias",
        "weights",
        "vote",
        "weighting",
        "proposal",
        "pairs",
        "spread",
        "risks",
        "precision",
        "group_unit",
        "group_temperature",
        "group_rule",
        "source",
        "report",
    },
    "base": {"name", "revision", "sha256"},
    "own_vae": set(),
    "reads_prompts": set(),
}
"""Of `medsd.json`, and of what is in it."""

Kind = Literal["pipeline", "lora", "autoencoder"]


def kind_of(folder: Path) -> Kind:
    """What a trained folder holds; raises InputError for another one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that a training has finished")
    if (folder / INDEX).is_file():
        return "pipeline"
    if (folder / LORA).is_file():
        return "lora"
    if (folder / "config.json").is_file():
        return "autoencoder"
    raise InputError(f"{folder} holds neither a pipeline nor an autoencoder: name a folder that a training has finished")


def weight_files(folder: Path) -> list[Path]:
    """Of a trained folder, part by part; raises InputError where there is none, and for a link, which may lead anywhere."""
    found = [path for pattern in WEIGHTS for path in _matching(folder, pattern)]
    if not found:
        raise InputError(f"{folder} holds no safetensors weights: name a folder that a training has finished")
    return found


def weights_sha256(folder: Path) -> str:
    """sha256 over all weights of a trained folder."""
    return files_sha256(weight_files(folder))


def known_sha256(folder: Path) -> str | None:
    """The same, of a folder that can be pushed; None of anything else, such as a model of others."""
    try:
        return weights_sha256(folder)
    except InputError:
        return None


def files_sha256(files: Iterable[Path]) -> str:
    """sha256 over files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _matching(folder: Path, pattern: str) -> list[Path]:
    found = sorted(path for path in folder.glob("*/*" if "/" in pattern else "*") if re.fullmatch(pattern, _name(folder, path)))
    for path in found:
        if path.is_symlink() or path.parent.is_symlink():
            raise InputError(f"{path} is a link: put the file itself there")
    return found


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def collect(folder: Path) -> dict[str, Content]:
    """Weights, configs and records of a trained folder, by their path; what names places is left out of the latter."""
    weights = weight_files(folder)
    for file in weights:
        safetensors_header(file)
    check_embeddings(folder)
    found: dict[str, Content] = {_name(folder, file): file for file in weights}
    for file in [path for pattern in CONFIGS for path in _matching(folder, pattern)]:
        found[_name(folder, file)] = clean_json(file) if file.suffix == ".json" else file
    for name, clean in {"config.yaml": _clean_yaml, "environment.json": clean_json}.items():
        if (file := record_of(folder, name)).is_file():
            found[name] = clean(file)
    if (folder / INFO).is_file():
        check_info(read_json(folder / INFO), folder)
        found[INFO] = clean_json(folder / INFO)
    return found


def shareable_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics.json` without subgroups of few patients, whom facts such as age and sex could tell."""
    rows = metrics.get("subgroups")
    return dict(metrics) | ({} if rows is None else {"subgroups": [row for row in rows if row["patients"] >= FEWEST_PATIENTS]})


def shareable_audit(audit: Mapping[str, Any]) -> dict[str, Any]:
    """`audit.json` without what would lead to the suspicious images, and to the training images that they are near to."""
    return {name: value for name, value in audit.items() if name != "flagged_samples"}


def as_json(content: Mapping[str, Any]) -> bytes:
    """A record as it travels: without the places that diffusers and transformers loaded a part from."""
    return (json.dumps(_nameless(content), indent=2, ensure_ascii=False) + "\n").encode()


def figures_in(report: Path) -> dict[str, Content]:
    """Figures of a report that show no real image."""
    files = (report / "figures" / f"{name}.png" for name in FIGURES)
    return {f"figures/{file.name}": file for file in files if file.is_file() and not file.is_symlink()}


def check_info(record: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError for a key of `medsd.json` that medsd does not write."""
    foreign = [key for key in record if key not in INFO_KEYS]
    foreign += [f"{part}.{key}" for part, keys in INFO_KEYS.items() for key in (record.get(part) or {} if keys else {}) if key not in keys]
    if foreign:
        raise InputError(f"{folder / INFO} holds {foreign[0]}, which medsd did not write: take it out; nothing was sent")


def check_embeddings(folder: Path) -> None:
    """Raise InputError for a token's embedding that `medsd.json` knows no token for: its name could say anything."""
    tokens = (read_json(folder / INFO).get("data") or {}).get("class_tokens", ())
    known = {f"{token.strip('<>')}.safetensors" for token in tokens}
    if foreign := [file.name for file in sorted((folder / EMBEDS).glob("*.safetensors")) if file.name not in known]:
        raise InputError(f"{folder / EMBEDS} holds {foreign[0]}, which is of none of its class tokens: take it out; nothing was sent")


def record_of(folder: Path, name: str) -> Path:
    """A record of the run: of its best model too, which lies in the run's folder."""
    return (folder.parent if folder.name == "best" else folder) / name


def read_json(file: Path) -> dict[str, Any]:
    """A record; empty where there is none. Raises InputError for a damaged one."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: make it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no record of names and values: make it again")
    return content


def run_config(file: Path) -> dict[str, Any]:
    """The flags in a run's `config.yaml`; empty where there is no such file."""
    return next(iter(_sections(file).values()), None) or {}


def _sections(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged: make it again") from error
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise InputError(f"{file} has no section with flags: make it again")
    return content


def clean_json(file: Path) -> bytes:
    """`as_json` of a file."""
    return as_json(read_json(file))


def _nameless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _nameless(value) for key, value in content.items() if key not in {"_name_or_path", "name_or_path"}}
    return [_nameless(value) for value in content] if isinstance(content, list) else content


def _clean_yaml(file: Path) -> bytes:
    import yaml

    flags = {name: value for name, value in run_config(file).items() if name not in PLACES and not _is_place(value)}
    return yaml.safe_dump({next(iter(_sections(file)), "flags"): flags}, sort_keys=False).encode()


def _is_place(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)
