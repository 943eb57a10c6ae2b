"""What guards and logging cost: the step time of the recipe against the same recipe without any of them.

    python benchmarks/guards.py --work /tmp/guards

Both train the tiny preset on the same small phantom, in turns. *None* takes away: the check of loss and gradient, masks and stopwatch
around the optimizer, the question whether a signal came, metrics.jsonl, status.json and the curves. Looks and checkpoints, whose
cadence the user chooses, are in neither. A line is logged every 10 updates, five times as often as by default. The ratio of a pair is
that of its median step times; the bound is the upper end of a 95 % t interval of the mean ratio.
"""

import argparse
import json
import math
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.training_speed import machine
from medsd.config import FinetuneUNetConfig
from medsd.training.guard import Guard
from medsd.training.loop import Loop
from medsd.training.record import RunRecord
from medsd.training.state import TrainState
from medsd.training.stopwatch import Stopwatch
from recipes import finetune_unet

WARM = 10
"""Updates that are not timed."""
T_QUANTILE = {9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093, 29: 2.045}
"""97.5 % quantile of Student's t by degrees of freedom."""


def bare_learn(self: TrainState, accelerator: Any, loss: torch.Tensor, max_grad_norm: float) -> None:
    """`TrainState.learn` with nothing but what learning needs."""
    self.learning = True
    accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), max_grad_norm)
    self.optimizer.step()
    self.optimizer.zero_grad()


NONE = [
    (TrainState, "learn", bare_learn),
    (Stopwatch, "mark", lambda self, phase: None),
    (Guard, "agreed", lambda self, accelerator: 0),
    (Loop, "_refuse_nonsense", lambda self, step: None),
    (Loop, "_log", lambda self, step, bar: None),
    (RunRecord, "log", lambda self, step, **numbers: None),
]


def step_time(folder: Path, data: Path, updates: int, bare: bool) -> float:
    """Median seconds from the end of an update to the end of the next."""
    times: list[float] = []
    finish = TrainState.finish_update

    def timed(self: TrainState) -> None:
        finish(self)
        times.append(time.perf_counter())

    config = FinetuneUNetConfig(
        dataset_name=str(data),
        output_dir=str(folder),
        max_train_steps=WARM + updates,
        logging_steps=10,
        validation_steps=0,
        checkpointing_steps=0,
        overwrite=True,
    )
    with ExitStack() as stack:
        for place, name, replacement in NONE if bare else ():
            stack.enter_context(patch.object(place, name, replacement))
        stack.enter_context(patch.object(TrainState, "finish_update", timed))
        finetune_unet.main(config)
    return median(after - before for before, after in zip(times[WARM:], times[WARM + 1 :], strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=12, choices=[number + 1 for number in T_QUANTILE])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--dataset_name", type=Path, help="default: the phantom, made in --work")
    options = parser.parse_args()
    data = options.dataset_name or options.work / "runs" / "phantom" / "data"
    if options.dataset_name is None:
        from medsd.data.prepare import prepare_default

        prepare_default(str(data), str(data))
    ratios = []
    for number in range(options.pairs):
        order = (False, True) if number % 2 else (True, False)
        seconds = {bare: step_time(options.work / "run", data, options.updates, bare) for bare in order}
        ratios.append(seconds[False] / seconds[True])
        print(f"pair {number}: {1000 * seconds[True]:.2f} ms bare, {1000 * seconds[False]:.2f} ms guarded: {ratios[-1]:.4f}", flush=True)
    half = T_QUANTILE[len(ratios) - 1] * stdev(ratios) / math.sqrt(len(ratios))
    print(f"RESULT mean ratio {mean(ratios):.4f}, median {median(ratios):.4f}, 95 % interval up to {mean(ratios) + half:.4f}")
    result = {"ratios": ratios, "mean": mean(ratios), "upper": mean(ratios) + half, "updates": options.updates} | machine()
    target = Path(__file__).parent / "results" / "guards_cpu.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
