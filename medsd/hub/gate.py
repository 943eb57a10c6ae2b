"""The gate before the Hub: an audit of exactly these weights that passed, a base that others have, data whose names are known.

The audit counts where it looked at enough images (`FEWEST_SAMPLES`, or all that were held out) that were drawn in earnest
(`FEWEST_STEPS`): an audit of noise finds no copies.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsd.errors import InputError
from medsd.hub.contents import INFO, read_json, weights_sha256
from medsd.hub.privacy import Secrets

FEWEST_SAMPLES, FEWEST_STEPS = 64, 20
SAID = ("samples", "held_out", "training_images", "flagged", "copies", "false_positive_rate", "verdict", "sampling", "membership_auroc")
"""Of `audit.json`; one of an older medsd does not say all of it."""


@dataclass(frozen=True)
class Outgoing:
    """A trained folder that is to be pushed, and where its records are."""

    folder: Path
    data: Path | str | None = None
    """What it was trained on: a prepared folder, a Hub id, or None for a foreign model, which saw none of ours."""
    report: Path | None = None
    """Folder of evaluate.py."""
    licence: str | None = None
    skip_audit: bool = False
    checkpoint: int | None = None
    """Updates, of a model that had not finished its training."""
    named: Path | None = None
    """What to call the folder in messages, where `folder` is a copy."""

    @property
    def called(self) -> Path:
        """The folder's name in messages."""
        return self.named or self.folder

    @property
    def audit_command(self) -> str:
        """What audits it and pushes it then."""
        data = f" --dataset_name {shlex.quote(str(self.data))}" if self.data else ""
        return f"python recipes/push.py --pipeline {shlex.quote(str(self.called))}{data} --audit_samples 256 --hub_model_id user/name"

    def secrets(self) -> Secrets:
        """What may not be named; nothing is known of data that others prepared."""
        if not isinstance(self.data, Path):
            return Secrets()
        record, own = read_json(self.data / INFO), read_json(self.folder / INFO).get("data") or {}
        if record.get("fingerprint") != own.get("fingerprint"):
            raise InputError(f"{self.data} is not the data that {self.called} was trained on: name that with --dataset_name")
        return Secrets.of(self.data, record["class_names"])

    def audit(self) -> dict[str, Any] | None:
        """The audit of exactly these weights, passed or failed; None where there is none, and of a checkpoint, which has none."""
        audit = read_json(self.folder / "audit.json")
        own = self.checkpoint is None and audit.get("weights_sha256") == weights_sha256(self.folder)
        return audit if own and all(name in audit for name in SAID) else None


def check_base(outgoing: Outgoing) -> None:
    """Raise InputError for adapters of a model that nobody else has."""
    base = read_json(outgoing.folder / INFO).get("base")
    if base is not None and base["sha256"] is not None:
        raise InputError(
            f"{outgoing.called} holds LoRA adapters of a model that only this machine has: push it with recipes/push.py --merge_lora (in "
            "Python, merge_lora() and an audit of what comes out)"
        )


def check_audit(outgoing: Outgoing) -> None:
    """Raise InputError where the weights have no audit that counts, with the command that makes one, or have failed it."""
    if outgoing.skip_audit or outgoing.checkpoint is not None:
        return
    audit = outgoing.audit()
    if audit is None:
        there = (outgoing.folder / "audit.json").is_file()
        known = "its audit.json is of other weights, or of an older medsd" if there else "it has no audit.json"
        raise InputError(f"{outgoing.called} was not audited for copies ({known}); nothing was sent. Type {outgoing.audit_command}")
    if audit["verdict"] != "passed":
        found = f"{audit['copies']} copies, {audit['flagged']} of {audit['samples']} flagged"
        raise InputError(
            f"{outgoing.called} failed its audit ({found}); nothing was sent. Train on more patients, or for fewer updates; "
            "--skip_audit sends it all the same, and the card says so"
        )
    if not counts(audit):
        steps = audit["sampling"]["num_inference_steps"]
        looked = f"{audit['samples']} images" + (f" of {steps} steps" if steps is not None else "")
        wanted = f"{FEWEST_SAMPLES} of {FEWEST_STEPS} steps at least"
        raise InputError(f"{outgoing.called} was audited with {looked}; {wanted} count. Nothing was sent; type {outgoing.audit_command}")


def counts(audit: Mapping[str, Any]) -> bool:
    """Whether an audit looked at enough images that were drawn in earnest; steps are None of images that are not drawn."""
    steps = (audit.get("sampling") or {}).get("num_inference_steps", 0)
    return audit["samples"] >= min(FEWEST_SAMPLES, audit["held_out"]) and (steps is None or steps >= FEWEST_STEPS)
