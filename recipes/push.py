"""Push a finished model to the Hugging Face Hub: private unless said otherwise, audited, and without a name of a patient.

    python recipes/push.py
    python recipes/push.py --hub_model_id user/name
    python recipes/push.py --pipeline runs/phantom/lora --merge_lora --audit_samples 256 --hub_model_id user/name

The first says what would be sent, and sends nothing.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from medsd.commandline import run
from medsd.config import PushConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    from medsd.hub.gate import Outgoing


def main(config: PushConfig) -> None:
    """Look whether it may leave, and send it."""
    from medsd.hub.model import push_model
    from medsd.hub.upload import Target, check_sign_in
    from medsd.runtime import quiet_libraries

    quiet_libraries()
    if config.dry_run or config.hub_model_id is None:
        return say(prepare(config), config.hub_model_id)
    target = Target(config.hub_model_id, private=config.hub_private_repo, revision=config.revision)
    check_sign_in(target)
    print(f"pushed to {push_model(prepare(config), target)}, which is {'private' if config.hub_private_repo else 'public'}")


def prepare(config: PushConfig) -> "Outgoing":
    """What is to be pushed: merged and audited first where that is asked for."""
    from medsd.hub.contents import kind_of
    from medsd.hub.gate import Outgoing
    from medsd.inference.auditor import audit_folder
    from medsd.inference.folder import data_of, read_info
    from medsd.runtime import start_processes

    folder = Path(config.pipeline)
    kind_of(folder)
    data = data_of(folder, read_info(folder), config.dataset_name)
    if config.merge_lora:
        folder = merged(folder)
    if config.audit_samples is not None:
        print(f"auditing {folder} with {config.audit_samples} images", flush=True)
        audit_folder(folder, str(data), config.audit_samples, start_processes().device)
    report = Path(config.report) if config.report else folder.with_name("report")
    return Outgoing(folder, data, report, config.license, config.skip_audit, confirmed=config.confirm_public_data)


def merged(folder: Path) -> Path:
    """`FOLDER_merged`: the LoRA run as a whole pipeline, with the records of its training."""
    from medsd.hub.contents import known_sha256
    from medsd.inference.folder import copy_records
    from medsd.inference.pipeline import MedSDPipeline

    pipe = MedSDPipeline.from_pretrained(folder)
    if pipe.info.base is None:
        raise InputError(f"--merge_lora: {folder} is no LoRA run; leave the flag away")
    pipe.merge_lora()
    made = folder.with_name(f"{folder.name}_merged")
    with TemporaryDirectory() as work:
        pipe.save_pretrained(Path(work) / made.name)
        there = known_sha256(made)
        if made.exists() and there != known_sha256(Path(work) / made.name):
            raise InputError(f"--merge_lora: {made} holds something else already; move it away")
    if not made.exists():
        pipe.save_pretrained(made)
        copy_records(folder, made)
        print(f"merged into {made}")
    return made


def say(outgoing: "Outgoing", hub_model_id: str | None) -> None:
    """Files, sizes, and where the card can be read."""
    from medsd.hub.model import parcel

    found = parcel(outgoing, hub_model_id or outgoing.folder.name)
    for path, content in found.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"{size:>14,}  {path}")
    where = "" if hub_model_id else " with --hub_model_id user/name"
    print(f"{len(found)} files would be sent{where}; the card:\n\n{found['README.md'].decode()}")


if __name__ == "__main__":
    run(main, PushConfig)
