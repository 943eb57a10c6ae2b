"""What leaves at the end of a run: its card, and where it is wanted the run itself, audited, and its checkpoints."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medsd.data.dataset import DataInfo
from medsd.errors import InputError
from medsd.hub.gate import Outgoing
from medsd.hub.model import card_of, push_model
from medsd.hub.privacy import Secrets
from medsd.hub.upload import Target, check_sign_in
from medsd.inference.auditing import no_audit
from medsd.inference.auditor import audit_folder
from medsd.inference.folder import data_of, read_info
from medsd.output import write_text
from medsd.training.checkpoint import checkpoints, step_of
from medsd.training.loop import Loop


@dataclass(frozen=True)
class Destination:
    """Where a finished run goes, and what goes along."""

    hub_model_id: str
    private: bool = True
    audit_samples: int = 256
    with_checkpoints: bool = False
    seed: int = 0

    @property
    def target(self) -> Target:
        """The repository."""
        return Target(self.hub_model_id, private=self.private)

    @property
    def command(self) -> str:
        """What pushes there a run that has finished, whose flags follow."""
        return f"python recipes/push.py --hub_model_id {self.hub_model_id}{'' if self.private else ' --no_hub_private_repo'}"


def check_destination(destination: Destination, data: DataInfo, dataset_name: str) -> None:
    """Raise InputError, before days of training, for what would refuse a push after them: no sign-in, no audit, no private folder."""
    check_sign_in(destination.target)
    if why := no_audit(data, dataset_name):
        raise InputError(f"--push_to_hub needs an audit, and {dataset_name} allows none: {why}")
    if Path(dataset_name).is_dir():
        Secrets.of(Path(dataset_name), data.class_names)


def write_card(folder: Path, dataset_name: str, report: Path | None = None) -> None:
    """`README.md` of a run: the card as it would be pushed now."""
    write_text(folder / "README.md", card_of(_outgoing(folder, dataset_name, report=report), folder.name))


def _outgoing(folder: Path, dataset_name: str, **options: Any) -> Outgoing:
    return Outgoing(folder, data_of(folder, read_info(folder), dataset_name), **options)


def hand_over(accelerator: Any, loop: Loop, dataset_name: str, destination: Destination | None) -> None:
    """Write the card of a finished run and, where it has a destination, audit it and push it.

    Raises InputError, with the command that pushes it later, where that fails; the run is finished all the same.
    """
    folder = loop.record.folder
    if accelerator.is_main_process:
        write_card(folder, dataset_name)
    if destination is None:
        return
    try:
        if accelerator.is_main_process:
            print(f"auditing {folder} with {destination.audit_samples} images before it is pushed", flush=True)
            audit_folder(folder, dataset_name, destination.audit_samples, accelerator.device, destination.seed)
            print(f"pushed to {push_model(_outgoing(folder, dataset_name), destination.target)}")
        if destination.with_checkpoints:
            push_checkpoints(accelerator, loop, dataset_name, destination.hub_model_id)
    except InputError as error:
        again = f"{destination.command} --pipeline {shlex.quote(str(folder))} --dataset_name {shlex.quote(dataset_name)}"
        stay = " (its checkpoints stay here)" if destination.with_checkpoints else ""
        raise InputError(f"{error}. {folder} is finished; once that is mended: {again}{stay}") from error


def push_checkpoints(accelerator: Any, loop: Loop, dataset_name: str, hub_model_id: str) -> None:
    """Push the model of each checkpoint that a run has kept, to a branch of its name in a private repository."""
    for checkpoint in checkpoints(loop.record.folder):
        with TemporaryDirectory() as work:
            made = Path(work) / checkpoint.name
            loop.rebuild(checkpoint, made)
            if accelerator.is_main_process:
                target = Target(hub_model_id, private=True, revision=checkpoint.name)
                push_model(_outgoing(made, dataset_name, checkpoint=step_of(checkpoint)), target)
                print(f"pushed {target}")
