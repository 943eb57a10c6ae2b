"""One fit whose scoring all processes of `accelerate launch` share."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from medsd.errors import InputError
from medsd.inference.calibration import Calibration
from medsd.inference.fitting import Score
from medsd.inference.likelihood import NotFinite, Scores
from medsd.inference.plan import Plan

Value = TypeVar("Value")


def from_main(value: Value) -> Value:
    """The main process's value, on all processes; every one calls this."""
    return broadcast_object_list([value])[0]


def fit_together(fit: Callable[[Score], Calibration], score: Score, accelerator: Accelerator | None = None) -> Calibration:
    """`fit(score)`, on the main process; the others wait for what it wants scored, do their share, and take its result.

    Every process calls this, or none does: an InputError of the fit is raised on all of them.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return fit(score)

    def ask(*request: Any) -> Scores:
        return _share(score, accelerator, *from_main(request))

    if accelerator.is_main_process:
        try:
            outcome: Calibration | InputError = fit(ask)
        except InputError as error:
            outcome = error
        from_main(outcome)
    else:
        while isinstance(asked := from_main(None), tuple):
            # What is not finite reaches the main process, whose fit decides.
            _or_not_finite(_share, score, accelerator, *asked)
        outcome = asked
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def _share(score: Score, accelerator: Accelerator, chosen: torch.Tensor, plan: Plan, precision: str) -> Scores:
    """Scores of `chosen`, of which each process computes every n-th; raises NotFinite on all processes if on one."""
    own = chosen[accelerator.process_index :: accelerator.num_processes]
    parts = gather_object([_or_not_finite(score, own, plan, precision) if len(own) else None])
    if failed := [part for part in parts if isinstance(part, NotFinite)]:
        raise NotFinite(str(failed[0]), sorted(image for error in failed for image in error.images))
    some = next(part for part in parts if part is not None)
    losses = np.empty((len(chosen), *some.losses.shape[1:]), np.float32)
    for number, part in enumerate(parts):
        if part is not None:
            losses[number :: accelerator.num_processes] = part.losses
    return Scores(losses, some.places)


def _or_not_finite(call: Callable[..., Scores], *arguments: Any) -> Scores | NotFinite:
    try:
        return call(*arguments)
    except NotFinite as error:
        return error
