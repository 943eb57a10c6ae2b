"""What leaves at the end of a run: its card, and where it is wanted the run itself, audited, and its checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from medsd.hub.model import Outgoing, card_of, push_model
from medsd.hub.upload import Target
from medsd.inference.auditor import audit_folder
from medsd.inference.folder import data_of, read_info
from medsd.output import write_text
from medsd.training.checkpoint import checkpoints, step_of
from medsd.training.loop import Loop


def write_card(folder: Path, dataset_name: str, report: Path | None = None) -> None:
    """`README.md` of a run: the card as it would be pushed now."""
    write_text(folder / "README.md", card_of(Outgoing(folder, data_of(folder, read_info(folder), dataset_name), report), folder.name))


@dataclass(frozen=True)
class Destination:
    """Where a finished run goes, and what goes along."""

    hub_model_id: str
    private: bool = True
    audit_samples: int = 256
    with_checkpoints: bool = False
    seed: int = 0


def hand_over(accelerator: Any, loop: Loop, dataset_name: str, destination: Destination | None) -> None:
    """Write the card of a finished run and, where it has a destination, audit it and push it."""
    folder = loop.record.folder
    if accelerator.is_main_process:
        write_card(folder, dataset_name)
        if destination is not None:
            print(f"auditing {folder} with {destination.audit_samples} images before it is pushed", flush=True)
            audit_folder(folder, dataset_name, destination.audit_samples, accelerator.device, destination.seed)
            target = Target(destination.hub_model_id, private=destination.private)
            print(f"pushed to {push_model(Outgoing(folder, data_of(folder, read_info(folder), dataset_name)), target)}")
    if destination is not None and destination.with_checkpoints:
        push_checkpoints(accelerator, loop, dataset_name, destination.hub_model_id)


def push_checkpoints(accelerator: Any, loop: Loop, dataset_name: str, hub_model_id: str) -> None:
    """Push the model of each checkpoint that a run has kept, to a branch of its name in a private repository."""
    for checkpoint in checkpoints(loop.record.folder):
        with TemporaryDirectory() as work:
            made = Path(work) / checkpoint.name
            loop.rebuild(checkpoint, made)
            if accelerator.is_main_process:
                target = Target(hub_model_id, private=True, revision=checkpoint.name)
                push_model(Outgoing(made, data_of(made, read_info(made), dataset_name), checkpoint=step_of(checkpoint)), target)
                print(f"pushed {target}")
