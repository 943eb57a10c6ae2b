"""Checkpoints `checkpoint-N/`: everything a run needs to go on after update N, in safetensors and JSON; no pickle is ever read.

A checkpoint is written under a hidden name: tensors and `state.json`, then `manifest.json` with the sha256 of each file; all of them are
flushed to the disk, and then it is renamed. So a folder called `checkpoint-N` is whole, and one that was damaged later is noticed.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medsd.errors import InputError
from medsd.output import replacing

STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
Tensors = dict[str, torch.Tensor]


def save_checkpoint(
    run: Path,
    step: int,
    files: Iterable[tuple[str, Tensors]],
    record: Mapping[str, Any],
    kept: int | None,
    abandoned: Iterable[Path] = (),
) -> Path:
    """Write `run/checkpoint-STEP`, then remove `abandoned` ones, and what is beyond the newest `kept`.

    Raises InputError where it cannot be written; what was there before is then as it was.
    """
    final, before = run / f"checkpoint-{step}", checkpoints(run)
    _clean(run)
    last = "those before it are as they were, go on with --resume_from_checkpoint latest" if before else "there is none before it"
    with replacing(final, last) as made:
        for name, tensors in files:
            path = made / f"{name}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(_apart(tensors), path)
        (made / STATE_FILE).write_text(json.dumps(record))
        _seal(made)
    _prune(run, kept, [path for path in abandoned if path != final])
    return final


def read_record(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def read_tensors(checkpoint: Path, name: str) -> Tensors:
    """One of its files of tensors, on the CPU."""
    return load_file(checkpoint / f"{name}.safetensors")


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first; a damaged one is among them."""
    found = [path for path in run.glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=step_of)


def later(run: Path, step: int) -> list[Path]:
    """A run's checkpoints of more than `step` updates."""
    return [path for path in checkpoints(run) if step_of(path) > step]


def step_of(checkpoint: Path) -> int:
    """Number of updates in its name."""
    return int(checkpoint.name.split("-")[1])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is the one that was written."""
    try:
        text = (checkpoint / MANIFEST_FILE).read_text()
        digests = json.loads(text)["files"]
        if text != _manifest(digests):
            return f"{MANIFEST_FILE} was changed"
        changed = [name for name, digest in digests.items() if _sha256(checkpoint / name) != digest]
    except OSError as error:
        return f"{Path(error.filename or '').name} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} is unreadable"
    return f"{changed[0]} was changed or cut off" if changed else None


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` names, `latest` being the newest whole one; None to start anew.

    Raises InputError for one that is not there or is damaged, and where all of them are damaged.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        return newest_whole(run)
    found = next((path for path in (Path(wanted), run / wanted) if path.is_dir() and path.name.startswith("checkpoint-")), None)
    if found is None:
        raise InputError(f"--resume_from_checkpoint {wanted}: no checkpoint there; {run} has {[path.name for path in checkpoints(run)]}")
    if wrong := damage(found):
        raise InputError(f"{found} is damaged ({wrong}): --resume_from_checkpoint latest takes the newest whole one")
    if ahead := later(found.parent, step_of(found)) if found.parent.resolve() == run.resolve() else []:
        print(f"warning: {', '.join(path.name for path in ahead)} will be removed once a run that goes on from {found.name} saves its own")
    return found


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that is not damaged, a line about each that is; None for a run without any.

    Raises InputError where all are damaged, since starting anew would hide that.
    """
    found = checkpoints(run)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        print(f"warning: {checkpoint} is damaged ({wrong}) and passed over")
    if found:
        raise InputError(f"every checkpoint of {run} is damaged: copy one back, or start anew with --overwrite")
    return None


def check_same(checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool) -> None:
    """Raise InputError where what determines the result is not what the checkpoint was trained with, unless that is allowed."""
    now = json.loads(json.dumps(now))
    changes = [f"{name} {saved.get(name)} -> {now.get(name)}" for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)]
    if changes and not allow_change:
        raise InputError(
            f"{checkpoint} was trained with other settings ({'; '.join(sorted(changes))}): resume with the old ones, or add "
            "--allow_config_change"
        )
    if changes:
        print(f"changed since {checkpoint.name}: {'; '.join(sorted(changes))}")


def _apart(tensors: Tensors) -> Tensors:
    """On the CPU, contiguous, and no two in the same memory, as safetensors wants."""
    seen: set[int] = set()
    made = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        made[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return made


def _seal(folder: Path) -> None:
    """Write the manifest of the folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (folder / MANIFEST_FILE).write_text(_manifest({str(path.relative_to(folder)): _sha256(path) for path in files}))


def _manifest(digests: Mapping[str, str]) -> str:
    """The text of `manifest.json`, in which every character matters."""
    return json.dumps({"files": digests, "sha256": hashlib.sha256(json.dumps(digests).encode()).hexdigest()}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def clear_rests(run: Path, step: int, kept: int | None) -> None:
    """Remove what an interrupted save left, and what it did not come to remove: checkpoints beyond the newest `kept` up to STEP."""
    _clean(run)
    _discard([path for path in checkpoints(run) if step_of(path) <= step][: -kept if kept else 0])


def _prune(run: Path, kept: int | None, abandoned: list[Path]) -> None:
    """Remove those that a resumed run has left behind, and the oldest beyond `kept`."""
    _discard(abandoned)
    _discard(checkpoints(run)[: -kept if kept else 0])


def _discard(unwanted: list[Path]) -> None:
    """All are renamed first, the newest before the others, so that after a kill `latest` is none of them, nor half of one."""
    hidden = {path: path.with_name(f".{path.name}.old") for path in sorted(unwanted, key=step_of, reverse=True)}
    for path, other in hidden.items():
        with contextlib.suppress(OSError):
            os.replace(path, other)
    for other in hidden.values():
        shutil.rmtree(other, ignore_errors=True)


def _clean(run: Path) -> None:
    """Remove what an interrupted save left."""
    for path in (*run.glob(".checkpoint-*.partial"), *run.glob(".checkpoint-*.old")):
        shutil.rmtree(path, ignore_errors=True)
