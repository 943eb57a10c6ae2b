"""One fit whose scoring all processes of `accelerate launch` share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from medsd.errors import InputError
from medsd.inference.calibration import Calibration
from medsd.inference.likelihood import NotFinite, Scores
from medsd.inference.plan import Plan

Score = Callable[[torch.Tensor, Plan, str], Scores]
"""Images (places in the calibration set), plan and precision -> all losses."""


def fit_together(fit: Callable[[Score], Calibration], score: Score, accelerator: Accelerator | None = None) -> Calibration:
    """`fit(score)`, on the main process; the others wait for what it wants scored, do their share, and take its result.

    Every process calls this, or none does: an InputError of the fit is raised on all of them.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return fit(score)

    def ask(*request: Any) -> Scores:
        return _share(score, accelerator, *_broadcast(request))

    if accelerator.is_main_process:
        try:
            outcome: Calibration | InputError = fit(ask)
        except InputError as error:
            outcome = error
        _broadcast(outcome)
    else:
        while isinstance(asked := _broadcast(None), tuple):
            # What is not finite reaches the main process, whose fit decides.
            with_errors(_share, score, accelerator, *asked)
        outcome = asked
    if isinstance(outcome, InputError):
        raise outcome
    return outcome


def _broadcast(value: Any) -> Any:
    """The main process's value."""
    return broadcast_object_list([value])[0]


def with_errors(call: Callable[..., Any], *arguments: Any) -> Any:
    """What `call` returns, or the NotFinite that it raises."""
    try:
        return call(*arguments)
    except NotFinite as error:
        return error


def _share(score: Score, accelerator: Accelerator, chosen: torch.Tensor, plan: Plan, precision: str) -> Scores:
    """Scores of `chosen`, of which each process computes every n-th; raises NotFinite on all processes if on one."""
    first, step = accelerator.process_index, accelerator.num_processes
    own = chosen[first::step]
    parts = gather_object([with_errors(score, own, plan, precision) if len(own) else None])
    if failed := [part for part in parts if isinstance(part, NotFinite)]:
        raise NotFinite(str(failed[0]), sorted(image for error in failed for image in error.images))
    some = next(part for part in parts if part is not None)
    losses = np.empty((len(chosen), *some.losses.shape[1:]), np.float32)
    for number, part in enumerate(parts):
        if part is not None:
            losses[number::step] = part.losses
    return Scores(losses, some.places)
