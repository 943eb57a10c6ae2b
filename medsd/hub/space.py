"""The page of `recipes/app.py` as a Space of the Hugging Face Hub, with medsd's own sources beside it.

A Space installs `requirements.txt`, in the versions that are installed here, and starts `app.py`, which finds the pipeline in a variable.
"""

import shutil
import subprocess
from importlib.metadata import requires, version
from pathlib import Path

import medsd
from medsd.errors import InputError
from medsd.hub.privacy import Content, scan_tokens
from medsd.hub.upload import Target, upload

PACKAGE = Path(medsd.__file__).parent
VOCABULARY = "models/clip_merges.txt.gz"
CARD = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
license: apache-2.0
models:
- {pipeline}
tags:
- medical
- medsd
---

# {title}

Generates images with [{pipeline}](https://huggingface.co/{pipeline}), and classifies dropped ones.

**Not for clinical use.** Do not drop images of patients here: they would leave your machine.
"""


def push_space(app: Path, pipeline: str, space: str, private: bool = True) -> str:
    """Create or update the Space `user/name` that serves the page `app` for the Hub's `pipeline`; returns its address.

    A private pipeline asks for a secret `HF_TOKEN` that may read it, which its owner sets in the Space's settings. Raises InputError for a
    pipeline that lies on this machine, and what `upload` raises.
    """
    if Path(pipeline).exists() or pipeline.count("/") != 1:
        raise InputError(
            f"--pipeline {pipeline}: a Space takes its pipeline from the Hub; push it with recipes/push.py, and name user/name"
        )
    target = Target(space, "--push_space", "space", private, variables={"MEDSD_PIPELINE": pipeline})
    parcel = space_parcel(app, pipeline, space)
    scan_tokens(parcel)
    return upload(parcel, target, lambda path: path.startswith("medsd/"), "Upload a page of medsd")


def space_parcel(app: Path, pipeline: str, space: str) -> dict[str, Content]:
    """What a Space holds."""
    card = CARD.format(title=space.split("/")[-1], gradio=version("gradio"), pipeline=pipeline)
    return {
        **{f"medsd/{path.relative_to(PACKAGE).as_posix()}": path for path in (*sources(), PACKAGE / VOCABULARY)},
        "requirements.txt": "\n".join([*needed(), ""]).encode(),
        "app.py": app,
        "README.md": card.encode(),
    }


def sources() -> list[Path]:
    """medsd's own; in a checkout those that git knows, and not what else lies there."""
    found = sorted(path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".css"} and not path.is_symlink())
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PACKAGE, capture_output=True, text=True).stdout if shutil.which("git") else ""
    known = {PACKAGE / name for name in listed.split("\0") if name}
    return [path for path in found if path in known] if known else found


def needed() -> list[str]:
    """What medsd itself needs, in the versions that are installed here."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("medsd") or ()]
    own = [requirement.name for requirement in wanted if requirement.marker is None]
    return [f"{name}=={version(name).partition('+')[0]}" for name in own]
