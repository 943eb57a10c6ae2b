"""What a run writes about itself: config.yaml, environment.json, status.json, metrics.jsonl and TensorBoard curves."""

import json
import os
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

PACKAGES = ("medsd", "torch", "diffusers", "transformers", "accelerate", "datasets", "peft", "bitsandbytes", "xformers")


class RunRecord:
    """Context manager around a training run in `folder`; every process may hold one, the main process writes.

    `status.json` says `running`, then `finished`, `preempted` (interrupted) or `failed`, with the last step and the reason.
    """

    def __init__(self, folder: Path, config: Any, writes: bool = True, tensorboard: bool = True) -> None:
        self.folder, self.config, self.writes, self.tensorboard = folder, config, writes, tensorboard
        self.step = 0
        self.board: Any = None

    def __enter__(self) -> "RunRecord":
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_yaml(self.folder / "config.yaml", {self.config.section: asdict(self.config)})
            self._status("running")
            if self.tensorboard:
                self.board = _summary_writer(self.folder / "tensorboard")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.board is not None:
            self.board.close()
        if error is None:
            self._status("finished")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self._status("preempted", "interrupted")
        else:
            self._status("failed", f"{type(error).__name__}: {error}")

    def environment(self, **facts: Any) -> None:
        """Write `environment.json`: versions, commit, machine, and `facts` such as the attention kernel."""
        if self.writes:
            record = {
                "packages": _versions(),
                "commit": _commit(),
                "python": platform.python_version(),
                "machine": platform.machine(),
            } | facts
            (self.folder / "environment.json").write_text(json.dumps(record, indent=2) + "\n")

    def log(self, step: int, **numbers: float) -> None:
        """One line of `metrics.jsonl`, and a point on each curve."""
        self.step = step
        if not self.writes:
            return
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "time": round(time.time(), 3)} | numbers) + "\n")
        for name, value in numbers.items() if self.board is not None else ():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """`NAME.png` in the run's folder (the newest), and every one in TensorBoard."""
        if not self.writes:
            return
        image.save(self.folder / f"{name}.png")
        if self.board is not None:
            pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
            self.board.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")

    def _status(self, state: str, reason: str = "") -> None:
        if self.writes:
            partial = self.folder / ".status.json.partial"
            partial.write_text(json.dumps({"state": state, "step": self.step, "reason": reason}) + "\n")
            os.replace(partial, self.folder / "status.json")


def _summary_writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    import yaml

    plain = json.loads(json.dumps(content))
    path.write_text(yaml.safe_dump(plain, sort_keys=False))


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
