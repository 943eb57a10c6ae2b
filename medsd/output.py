"""Output folders: free or allowed to be replaced, held by one run, and never seen half-written.

A folder *belongs to medsd* when it holds one of the files that medsd writes; no other folder is ever replaced.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from medsd.errors import InputError

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

    It must be empty or absent, or with `overwrite` belong to medsd and hold none of the run's `inputs`. What is `COSTLY`, and a training
    that has not come to its end, is replaced only by the `recipe` that makes it.
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
        hint = "go on with --resume_from_checkpoint latest, " if any(folder.glob("checkpoint-*")) else ""
        raise InputError(f"{folder} is not empty: {hint}choose another --output_dir or add --overwrite")
    if not any((folder / mark).exists() for mark in MARKS):
        raise InputError(f"{folder} is not the folder of one run of medsd, so --overwrite leaves it alone: choose another --output_dir")
    for mark, (what, owner) in COSTLY.items():
        if (folder / mark).exists() and recipe != owner:
            raise InputError(f"{folder} is {what}, which only {owner} replaces: choose another --output_dir")
    config = folder / "config.yaml"
    if config.is_file() and not config.read_text().startswith(f"{Path(recipe).stem}:"):
        raise InputError(f"{folder} is a training of another recipe, see its config.yaml: choose another --output_dir")
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
    """Within, no other process can enter the same folder, there or not; raises InputError where one has.

    By a lock on a hidden file beside it, since a network disk keeps locks on folders to each machine. A disk that knows no locks at all
    goes without.
    """
    file = folder.resolve().parent / f".{folder.resolve().name}.lock"
    handle = None
    with contextlib.suppress(OSError):
        handle = _lock(file)
    try:
        yield
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)
            os.close(handle)


def _lock(file: Path) -> int:
    """Handle of a file that this process has locked."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            folder = file.with_name(file.name[1 : -len(".lock")])
            raise InputError(f"another run is writing to {folder}: wait until it has ended, or choose another --output_dir") from None
        except OSError:
            os.close(handle)
            raise
        with contextlib.suppress(FileNotFoundError):  # The one before may have removed it meanwhile.
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        os.close(handle)


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder that `check_output` allowed to overwrite; where that is cut off, it allows it again."""
    rest = folder / ".overwritten"
    shutil.rmtree(rest, ignore_errors=True)
    rest.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in (rest.name, *MARKS):
            os.replace(path, rest / path.name)
    shutil.rmtree(rest, ignore_errors=True)
    for mark in MARKS:
        (folder / mark).unlink(missing_ok=True)


def unfinished(folder: Path) -> bool:
    """Whether a training began in `folder` and left no model there."""
    began = (folder / "status.json").is_file() or (folder / "environment.json").is_file()
    return began and not any((folder / mark).exists() for mark in COSTLY)


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
    """A hidden folder to fill, which at the end is flushed to the disk and takes the place of `final`.

    Raises InputError where it cannot be written, saying `otherwise`; then `final` is as it was.
    """
    made = final.with_name(f".{final.name}.partial")
    try:
        with writing(final, otherwise):
            yield partial_folder(final)
            for path in (*made.rglob("*"), made):
                flush(path)
            replace_folder(made, final)
            flush(final.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
