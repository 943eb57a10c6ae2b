"""Folders of models that others made: nothing in them is executed, and nothing outside them is read.

Weights are safetensors, parts are classes of diffusers and transformers, and every file that a name leads to lies in the folder. (In the
Hub's cache a file is a link into the `blobs` beside the snapshots, which counts as in the folder.)
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from medsd.errors import InputError, first_line

LIBRARIES = frozenset({"diffusers", "transformers"})
PARTS = ("unet", "vae", "vqvae", "text_encoder", "tokenizer", "scheduler", "learned_embeds", "models", "configs")
WEIGHTS = ("unet", "vae", "text_encoder")
CODE = frozenset({"auto_map", "attn_implementation", "_attn_implementation", "quantization_config"})
"""Keys of a config behind which transformers fetches code, or packages that run it."""
VOCABULARY = ("vocab_file", "merges_file", "tokenizer_file")
"""Keys of a tokenizer's config that some versions of transformers follow to a file anywhere."""
REMEDY = "take the model from another place"
CONVERT = "if you trust it, convert it with diffusers' save_pretrained"


def trusted_folder(name: str) -> Path:
    """The folder of one model, or a copy of its Hub repository's configs and safetensors; raises InputError as `check_trust` does."""
    folder = Path(name) if Path(name).exists() else _downloaded(name)
    check_trust(folder)
    return folder


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no folder here, nor a model on the Hub that can be reached ({first_line(error)})") from error


def check_trust(folder: Path) -> None:
    """Raise InputError, which names the file, for a folder whose models would run code or reach outside it."""
    parts = [folder / name for name in PARTS if (folder / name).is_dir()]
    files = [path for place in (folder, *parts) for path in place.glob("*") if path.is_file()]
    for path in (*parts, *files):
        if path.is_symlink() and not _inside(path, folder):
            raise InputError(f"{folder}: {_shown(path, folder)} is a link to a place outside the folder: {REMEDY}")
    _check_index(folder)
    for file in files:
        if problem := _problem(file, folder):
            raise InputError(f"{folder}: {_shown(file, folder)} {problem}: {REMEDY}")


def _problem(file: Path, folder: Path) -> str | None:
    """What is wrong with a part's record of names and values."""
    if file.name == "adapter_config.json":
        return "leads to a model outside the folder"
    if file.match("*.index.*json"):
        names = _strings_in(_read(file, folder).get("weight_map"))
        return "names a file outside its folder" if any(PurePath(name).name != name or name in {"..", "."} for name in names) else None
    if not file.name.endswith("config.json"):
        return None
    config = _read(file, folder)
    if key := next((key for key, _ in _entries(config) if key in CODE), None):
        return f"asks for code of its own ({key}), which is never run"
    named = [file.parent / value for key, value in _entries(config) if key in VOCABULARY and isinstance(value, str)]
    return "names a file outside its folder" if any(path.exists() and not _inside(path, folder) for path in named) else None


def _check_index(folder: Path) -> None:
    index = _read(folder / "model_index.json", folder) if (folder / "model_index.json").is_file() else {}
    if not isinstance(index.get("_class_name", ""), str):
        raise InputError(f"{folder}: model_index.json asks for a pipeline's own code, which is never run: {REMEDY}")
    for part, named in index.items():
        of_library = isinstance(named, list) and len(named) == 2 and named[0] is not None
        if of_library and (named[0] not in LIBRARIES | {"stable_diffusion"} or not str(named[1]).isidentifier()):
            raise InputError(f"{folder}: model_index.json takes {part} from {named[0]}, not diffusers or transformers: {REMEDY}")
    for part in WEIGHTS:
        there = [file.suffix for file in (folder / part).glob("*") if file.is_file()]
        if index.get(part, [None])[0] and ".safetensors" not in there and {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack"} & set(there):
            raise InputError(f"{folder}: {part}/ holds pickled weights and no safetensors, and a pickle can run code: {CONVERT}")


def _inside(path: Path, folder: Path) -> bool:
    target = path.resolve()
    return any(target.is_relative_to(root) for root in (folder.resolve(), *_blobs(folder)))


def _blobs(folder: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of a snapshot."""
    absolute = folder.absolute()
    return [absolute.parent.parent.resolve() / "blobs"] if absolute.parent.name == "snapshots" else []


def _shown(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values, however deep they lie: a part's config can hold those of its own parts."""
    waiting = [config]
    while waiting:
        content = waiting.pop()
        if isinstance(content, dict):
            yield from content.items()
        waiting += content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()


def _strings_in(weight_map: Any) -> list[str]:
    return [str(value) for value in weight_map.values()] if isinstance(weight_map, dict) else [".."]


def _read(file: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{folder}: {_shown(file, folder)} is damaged: copy the folder again") from error
    if not isinstance(content, dict):
        raise InputError(f"{folder}: {_shown(file, folder)} is no record of names and values: {REMEDY}")
    return content
