"""What a run writes about itself: config.yaml, environment.json, status.json, metrics.jsonl and TensorBoard curves."""

import contextlib
import json
import math
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from PIL import Image

from medsd.data.dataset import looks_like_hub_id
from medsd.errors import InputError
from medsd.output import clear_folder, recover_folder, write_text, writing

PACKAGES = ("medsd", "torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "xformers")
AGAIN = "start again with --resume_from_checkpoint latest"
"""What to do where something could not be written; without a checkpoint that starts anew."""


class RunRecord:
    """Context manager around a training run in `folder`; every process may hold one, the main process writes.

    `status.json` says `running`, then `finished`, `preempted` (stopped by a signal) or `failed`, with the last step and the reason.
    Nothing is removed before `begin`, and nothing is written unless a run that nobody has finished is stopped or fails for a reason that
    is not the user's.
    """

    def __init__(self, folder: Path, config: Any, writes: bool = True, tensorboard: bool = True) -> None:
        self.folder, self.config, self.writes, self.tensorboard = folder, config, writes, tensorboard
        self.step, self.reason, self.begun = 0, "", False
        self.board: Any = None
        self.earlier = _read(folder / "status.json")

    def __enter__(self) -> "RunRecord":
        return self

    def begin(self, step: int, owes_look: bool, **facts: Any) -> None:
        """Go on after update `step`, and before its look where that is still owed: what was recorded of later ones is dropped.

        `facts`, such as the attention kernel, go to `environment.json`.
        """
        self.step, self.begun = step, True
        if self.writes:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                clear_folder(self.folder) if self.config.overwrite else recover_folder(self.folder / "best")
            self._status("running")
            write_text(self.folder / "config.yaml", _yaml({self.config.section: asdict(self.config)}))
            _drop_later(self.folder / "metrics.jsonl", step, step - owes_look)
            asked = {"base_model": self.config.pretrained_model_name_or_path, "data_on_hub": self.config.dataset_name}
            self.environment(**{name: _on_hub(value) for name, value in asked.items()}, **facts)
            if self.tensorboard:
                self.board = _summary_writer(self.folder / "tensorboard", step + 1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.board is not None:
            self.board.close()
        if not self.begun:
            if self.config.overwrite or self.finished is not None or isinstance(error, InputError):
                return
            self.step = self.earlier.get("step", 0)
        if error is None:
            self._status("finished", self.reason)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self._status("preempted", str(error) or "interrupted")
        else:
            with contextlib.suppress(OSError, InputError):  # The disk may be full, which then is the error.
                self._status("failed", f"{type(error).__name__}: {error}")

    @property
    def finished(self) -> int | None:
        """Last update of this run where an earlier start has finished it."""
        return self.earlier["step"] if self.earlier.get("state") == "finished" and not self.config.overwrite else None

    def environment(self, **facts: Any) -> None:
        """Write `environment.json`: versions, commit, machine, and `facts`, beside those told before, also by an earlier start."""
        if self.writes:
            file = self.folder / "environment.json"
            record = {
                "packages": _versions(),
                "commit": _commit(),
                "python": platform.python_version(),
                "machine": platform.machine(),
            }
            write_text(file, json.dumps(_read(file) | record | facts, indent=2) + "\n")

    def log(self, step: int, **numbers: float | None) -> None:
        """One line of `metrics.jsonl` (null for what is not finite), and a point on each curve."""
        if not self.writes:
            return
        file = self.folder / "metrics.jsonl"
        numbers = {name: None if value is None or not math.isfinite(value) else value for name, value in numbers.items()}
        with writing(file, AGAIN), file.open("a") as stream:
            stream.write(json.dumps({"step": step, "time": round(time.time(), 3)} | numbers) + "\n")
        self._status("running")
        for name, value in numbers.items() if self.board is not None else ():
            self.board.add_scalar(name, math.nan if value is None else value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """`NAME.png` in the run's folder (the newest), and every one in TensorBoard."""
        if not self.writes:
            return
        file = self.folder / f"{name}.png"
        with writing(file, AGAIN):
            image.save(file)
        if self.board is not None:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            self.board.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")

    def _status(self, state: str, reason: str = "") -> None:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "status.json", json.dumps({"state": state, "step": self.step, "reason": reason}) + "\n")


def _on_hub(name: str | None) -> str | None:
    """A Hub id, which may be told; None for a place on this machine."""
    return name if name is not None and not Path(name).exists() and looks_like_hub_id(name) else None


def _read(file: Path) -> dict[str, Any]:
    """A JSON file that is there and whole; else nothing."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _summary_writer(folder: Path, first: int) -> Any:
    """Points of earlier runs from step `first` on are not shown."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first)


def _drop_later(path: Path, step: int, looked: int) -> None:
    """Keep the lines up to `step`, those of looks up to `looked`; a half-written one is none."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            numbers = json.loads(line)
            kept += [line] if numbers["step"] <= (step if "loss" in numbers else looked) else []
    write_text(path, "".join(kept))


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    here = Path(__file__).parent
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
