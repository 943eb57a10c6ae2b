"""What every recipe needs of its process: an output folder that is free, all cores, and quiet libraries.

A folder *belongs to medsd* when it holds one of the files that medsd writes; no other folder is ever replaced.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from medsd.errors import InputError

LONGEST_WAIT = timedelta(hours=12)
"""For another process, which may look at held-out images or encode a whole data set meanwhile."""
DIE_WITH_PARENT = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Environment variables of which accelerate's or torch's launcher sets one."""

MARKS = ("medsd.json", "status.json", "metrics.json", "manifest.jsonl")
COSTLY = {
    "data": ("a prepared data set", "prepare_data.py"),
    "config.json": ("a trained autoencoder", "finetune_vae.py"),
    "model_index.json": ("a trained pipeline", "finetune_unet.py"),
    "pytorch_lora_weights.safetensors": ("a trained LoRA run", "finetune_unet.py"),
}
"""What can have cost a night: the file or folder that shows it -> what it is, and the one recipe that may replace it."""


def check_output(folder: Path, overwrite: bool, inputs: Sequence[str | Path | None] = (), recipe: str = "") -> None:
    """Raise InputError where a run may not write to `folder`; nothing is touched.

    It must be empty or absent, or with `overwrite` belong to medsd and hold none of the run's `inputs`. What is `COSTLY` is replaced
    only by the `recipe` that makes it.
    """
    if not folder.name:
        raise InputError(f"--output_dir {folder}: name a folder of its own, such as runs/mine")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = f"a link to {folder.readlink()}: name that" if folder.is_symlink() else "a file: choose another"
        raise InputError(f"--output_dir {folder} is {what}")
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        hint = ", or go on with --resume_from_checkpoint latest" if any(folder.glob("checkpoint-*")) else ""
        raise InputError(f"{folder} is not empty: choose another --output_dir or add --overwrite{hint}")
    if not any((folder / mark).exists() for mark in MARKS):
        raise InputError(f"{folder} is not the folder of one run of medsd, so --overwrite leaves it alone: choose another --output_dir")
    for mark, (what, owner) in COSTLY.items():
        if (folder / mark).exists() and recipe != owner:
            raise InputError(f"{folder} is {what}, which only {owner} replaces: choose another --output_dir")
    for source in inputs:
        if source is not None and Path(source).resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{source} is read by this run, and --overwrite would replace {folder}: choose another --output_dir")


def check_writable(folder: Path) -> None:
    """Raise InputError where `folder`, there or not, could not be written to."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to ({nearest} is no folder that you may write to): choose another --output_dir")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within, nobody else can enter the same folder; raises InputError where somebody has. A disk that knows no locks goes without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another run is writing to {folder}: wait until it has ended, or choose another --output_dir") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder that `check_output` allowed to overwrite."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def unfinished(folder: Path) -> bool:
    """Whether a training began in `folder` and left no model there."""
    return (folder / "environment.json").is_file() and not any((folder / mark).exists() for mark in COSTLY)


def replace_folder(made: Path, final: Path) -> None:
    """Put the finished folder `made` in the place of `final`, which is whole at every moment but between two renames."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(made, final)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def replacing(final: Path, otherwise: str = "") -> Iterator[Path]:
    """A hidden folder to fill, which takes the place of `final` at the end.

    Raises InputError where it cannot be written, saying `otherwise`; then `final` is as it was.
    """
    made = final.with_name(f".{final.name}.partial")
    try:
        with writing(final, otherwise):
            yield partial_folder(final)
            replace_folder(made, final)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path, otherwise: str = "") -> Iterator[None]:
    """Within, a full disk and the like become an InputError that names `path`, and says `otherwise`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        hint = f"; {otherwise}" if otherwise else ""
        raise InputError(f"{path} could not be written ({error}): make room there, or the right to write{hint}") from error


def recover_folder(final: Path) -> None:
    """Undo what a kill left of `replacing`: the old folder comes back where the new one has not taken its place."""
    old = final.with_name(f".{final.name}.old")
    if old.is_dir() and not final.exists():
        os.replace(old, final)
    for rest in (old, final.with_name(f".{final.name}.partial")):
        shutil.rmtree(rest, ignore_errors=True)


def cache_folder(kind: str) -> Path:
    """Where what can be computed again is kept between runs: below `HF_HOME`, beside the cache of data sets."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "medsd" / kind


def partial_folder(final: Path) -> Path:
    """A fresh hidden folder beside `final`, to be filled and then put in its place."""
    made = final.with_name(f".{final.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never seen half-written; raises InputError where it cannot be."""
    made = path.with_name(f".{path.name}.partial")
    with writing(path):
        made.write_text(text)
        os.replace(made, path)


def follow_launcher() -> None:
    """Let the launcher's death reach this process as SIGTERM: `accelerate launch` is killed without a word to its child.

    A process that was not launched stays alive when its shell goes. Exits where the launcher is dead already.
    """
    if not any(name in os.environ for name in LAUNCHED):
        return
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return
    if not any(word in parent for word in (b"python", b"accelerate", b"torchrun")):
        print(f"error: the launcher that set {' or '.join(LAUNCHED)} is gone; unset them to train without one", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def to_device(value: Any, device: Any) -> Any:
    """A tensor of the CPU there, without waiting: a GPU takes what lies in pinned memory while it computes."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def use_all_cores(accelerator: Any) -> None:
    """On a CPU, share the cores among the processes, unless OMP_NUM_THREADS says otherwise.

    `accelerate launch` sets that to 1 by itself, so under it the variable does not count.
    """
    import torch

    chosen = "OMP_NUM_THREADS" in os.environ and not any(name in os.environ for name in LAUNCHED)
    if accelerator.device.type == "cpu" and not chosen:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // accelerator.num_processes))


def quiet_libraries() -> None:
    """Keep libraries' progress bars and notices from the user; medsd says what is going on."""
    import datasets
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    datasets.disable_progress_bars()
    for library in (datasets, diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
