"""The gate before the Hub: an audit of exactly these weights that passed, a base that others have, data whose names are known.

The audit counts where it looked at enough images (`FEWEST_SAMPLES`; of an autoencoder at most all that were held out) that were drawn in
earnest (`FEWEST_STEPS`), and strictly (`RATE`): an audit of noise finds no copies, nor does one that takes them for false alarms.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medsd.errors import InputError
from medsd.hub.contents import INFO, read_json, record_of, run_config, weights_sha256
from medsd.hub.privacy import Secrets

FEWEST_SAMPLES, FEWEST_STEPS = 64, 20
RATE = 0.01
"""Share of images that are no copies which may be flagged, or the smallest that so few held-out images can vouch for."""
SAID = (
    "weights_sha256",
    "samples",
    "held_out",
    "training_images",
    "flagged",
    "copies",
    "false_positive_rate",
    "verdict",
    "sampling",
    "membership_auroc",
)
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
    confirmed: bool = False
    """Somebody answers for its being public, although nobody audited it."""

    @property
    def called(self) -> Path:
        """The folder's name in messages."""
        return self.named or self.folder

    def audit_command(self, name: str) -> str:
        """What audits it and pushes it then, to the repository of that name where it is one."""
        data = f" --dataset_name {shlex.quote(str(self.data))}" if self.data else ""
        where = f"--hub_model_id {name if '/' in name else 'user/name'}"
        return f"python recipes/push.py --pipeline {shlex.quote(str(self.called))}{data} --audit_samples 256 {where}"

    @cached_property
    def weights_sha256(self) -> str:
        """See `medsd.hub.contents.weights_sha256`; read once, since weights are large."""
        return weights_sha256(self.folder)

    @cached_property
    def audit(self) -> dict[str, Any] | None:
        """The audit of exactly these weights, passed or failed; None where there is none, and of a checkpoint, which has none."""
        audit = read_audit(self.folder)
        return audit if audit and self.checkpoint is None and audit["weights_sha256"] == self.weights_sha256 else None

    def secrets(self) -> Secrets:
        """What may not be named. Nothing is known of data that others prepared; of data that came to the Hub from here, it is."""
        data = self.data if isinstance(self.data, Path) else self._prepared_here()
        if data is None:
            return Secrets()
        record, own = read_json(data / INFO), read_json(self.folder / INFO).get("data") or {}
        if record.get("fingerprint") != own.get("fingerprint"):
            raise InputError(f"{data} is not the data that {self.called} was trained on: name that with --dataset_name")
        return Secrets.of(data, record["class_names"])

    def _prepared_here(self) -> Path | None:
        """The folder of this machine that the training read, where it is still there."""
        named = run_config(record_of(self.folder, "config.yaml")).get("dataset_name")
        return Path(named) if named and (Path(named) / INFO).is_file() else None


def check_gate(outgoing: Outgoing, name: str) -> None:
    """Raise InputError where the model may not leave for the repository of that name, whoever may see that."""
    check_base(outgoing)
    check_audit(outgoing, name)


def check_base(outgoing: Outgoing) -> None:
    """Raise InputError for adapters of a model that nobody else has."""
    base = read_json(outgoing.folder / INFO).get("base")
    if base is not None and base["sha256"] is not None:
        raise InputError(
            f"{outgoing.called} holds LoRA adapters of a model that only this machine has: push it with recipes/push.py --merge_lora (in "
            "Python, merge_lora() and an audit of what comes out)"
        )


def check_public(outgoing: Outgoing) -> None:
    """Raise InputError for a model that nobody audited on its way to everybody."""
    if (outgoing.skip_audit or outgoing.checkpoint is not None) and not outgoing.confirmed:
        raise InputError("a model that nobody audited can show patients: a public repository for it needs --confirm_public_data")


def check_audit(outgoing: Outgoing, name: str) -> None:
    """Raise InputError where the weights have no audit that counts, with the command that makes one and pushes, or have failed it."""
    if outgoing.skip_audit or outgoing.checkpoint is not None:
        return
    audit = outgoing.audit
    if audit is None:
        there = (outgoing.folder / "audit.json").is_file()
        known = "its audit.json is of other weights, or of an older medsd" if there else "it has no audit.json"
        raise InputError(f"{outgoing.called} was not audited for copies ({known}); nothing was sent. Type {outgoing.audit_command(name)}")
    if audit["verdict"] != "passed":
        found = f"{audit['copies']} copies, {audit['flagged']} of {audit['samples']} flagged"
        raise InputError(
            f"{outgoing.called} failed its audit ({found}); nothing was sent. Train on more patients, or for fewer updates; "
            "--skip_audit sends it all the same, and the card says so"
        )
    if not counts(audit):
        steps = audit["sampling"]["num_inference_steps"]
        looked = f"{audit['samples']} images" + (f" of {steps} steps" if steps is not None else "")
        looked += f", at a rate of false alarms of {audit['false_positive_rate']:g}"
        wanted = f"at least {FEWEST_SAMPLES} of {FEWEST_STEPS} steps, at a rate of at most {_strictest(audit):g},"
        raise InputError(
            f"{outgoing.called} was audited with {looked}; {wanted} count. Nothing was sent; type {outgoing.audit_command(name)}"
        )


def counts(audit: Mapping[str, Any]) -> bool:
    """Whether an audit looked, strictly, at enough images that were drawn in earnest; steps are None of images that are not drawn."""
    steps = audit["sampling"]["num_inference_steps"]
    fewest = min(FEWEST_SAMPLES, audit["held_out"]) if steps is None else FEWEST_SAMPLES
    drawn = steps is None or steps >= FEWEST_STEPS
    return drawn and audit["samples"] >= fewest and audit["false_positive_rate"] <= _strictest(audit)


def _strictest(audit: Mapping[str, Any]) -> float:
    """The rate of false alarms that counts: `RATE`, or what so few held-out images can vouch for."""
    return max(RATE, 1 / (audit["held_out"] + 1))


def read_audit(folder: Path) -> dict[str, Any]:
    """`audit.json`; empty where there is none, and for one of an older medsd, which does not say all of `SAID`."""
    audit = read_json(folder / "audit.json")
    return audit if all(name in audit for name in SAID) and isinstance(audit["sampling"], dict) else {}
