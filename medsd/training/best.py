"""The best look so far: whether another one is better, and whether it is time to give up."""

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medsd.errors import InputError

NO_LOOK = torch.tensor([math.nan, 0.0, 0.0], dtype=torch.float64)
"""`Best.state` before there is one."""
BEST_FILE = "best.json"
"""In the folder of the best model: of which look it is."""


class Best:
    """Of a number that a look measures: its best value, and how many looks ago that was. `state` is all that a checkpoint has to keep.

    Args:
        name: of the number.
        higher: whether more is better.
        patience: looks without a better one before the run is to stop; None for never.
    """

    def __init__(self, name: str, higher: bool, patience: int | None) -> None:
        self.name, self.higher, self.patience = name, higher, patience
        self.state = NO_LOOK.clone()
        """Value, its step, and looks since."""

    def check(self, names: Sequence[str]) -> None:
        """Raise InputError where somebody counts on this number, and a look measures only `names`."""
        if self.name not in names and (self.patience is not None or self.higher):
            flag = "--early_stopping" if self.patience is not None else "--best_metric"
            measured = f"looks at these data measure only {', '.join(names)}" if names else "these data have no validation split"
            raise InputError(f"{flag} goes by {self.name.replace('_', ' ')}, but {measured}: leave it away")

    @property
    def step(self) -> int:
        """Of the best look; 0 before there is one."""
        return int(self.state[1])

    def improved(self, step: int, numbers: dict[str, float]) -> bool:
        """Take note of a look; whether it is the best one so far. Without the number there is none; NaN and infinity never are."""
        value, best = numbers.get(self.name, math.nan), self.state[0].item()
        better = math.isnan(best) or (value > best if self.higher else value < best)
        if better and math.isfinite(value):
            self.state.copy_(torch.tensor([value, step, 0.0], dtype=torch.float64))
            return True
        self.state[2] += 1
        return False

    def sign(self, folder: Path) -> None:
        """Write into the best model's folder of which look it is."""
        (folder / BEST_FILE).write_text(json.dumps(self._signature()) + "\n")

    def compare(self, folder: Path) -> None:
        """Begin anew where `folder` holds the model of another look: of updates that this run has still to make, or never made."""
        said = None
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((folder / BEST_FILE).read_text())
        if folder.is_dir() and said != self._signature():
            self.state.copy_(NO_LOOK)

    def _signature(self) -> dict[str, Any]:
        return {"step": self.step, "metric": self.name, "value": self.state[0].item()}

    @property
    def hopeless(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.state[2].item() >= self.patience

    @property
    def verdict(self) -> str:
        """Why it is time to give up."""
        name, value = self.name.replace("_", " "), self.state[0].item()
        best = f"{name} was never finite" if math.isnan(value) else f"the best one was {name} {value:.4f} at step {self.step}"
        return f"no better look in {self.patience}: {best}"
