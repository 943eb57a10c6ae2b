"""A trained folder -> a model repository on the Hugging Face Hub, through one gate.

Nothing is sent before `audit.json` says of exactly these weights that they copy no training image, and the privacy scan has found nothing
in any file of the parcel. The gate can be passed without an audit (`skip_audit`), which the card then says.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsd.errors import InputError
from medsd.hub.card import Facts, model_card
from medsd.hub.contents import INDEX, INFO, OURS, clean_json, collect, figures_in, kind_of, read_json, run_config, weights_sha256
from medsd.hub.privacy import Content, Secrets, scan
from medsd.hub.standalone import pipeline_source
from medsd.hub.upload import Target, upload

CARD = "README.md"
OWN_CLASS = "MedSDPipeline"
REMEDY = "take it out, or look whether a class, a prompt or a folder's name says whose images these are"


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
    def audit_command(self) -> str:
        """What makes the audit that the gate asks for."""
        if kind_of(self.folder) == "autoencoder":
            return f"python recipes/push.py --pipeline {self.called} --audit_samples 256 with the same flags"
        report = self.called.with_name("report")
        return f"python recipes/evaluate.py --pipeline {self.called} --dataset_name {self.data} --output_dir {report}"

    @property
    def called(self) -> Path:
        """The folder's name in messages."""
        return self.named or self.folder

    def secrets(self) -> Secrets:
        """What may not be named; nothing is known of data that others prepared."""
        if not isinstance(self.data, Path):
            return Secrets()
        record, own = read_json(self.data / INFO), read_json(self.folder / INFO).get("data") or {}
        if record.get("fingerprint") != own.get("fingerprint"):
            raise InputError(f"{self.data} is not the data that {self.called} was trained on: name that with --dataset_name")
        return Secrets.of(self.data, record["class_names"])


def push_model(outgoing: Outgoing, target: Target) -> str:
    """Create or update a model repository, in one commit; returns its address.

    Raises InputError where the gate is closed, and what `upload` raises.
    """
    made = parcel(outgoing, target.name)
    return upload(made, target, lambda path: OURS.fullmatch(path) is not None, "Upload a model trained with medsd")


def parcel(outgoing: Outgoing, name: str) -> dict[str, Content]:
    """All that is sent, once the gate is open: weights, configs, records, figures, and a card with this name."""
    check_base(outgoing)
    check_audit(outgoing)
    found = collect(outgoing.folder) | report_of(outgoing)
    if class_of(outgoing.folder) == OWN_CLASS:
        found |= self_contained(found)
    found[CARD] = model_card(facts_of(outgoing, name, found)).encode()
    scan(found, outgoing.secrets(), REMEDY)
    return found


def card_of(outgoing: Outgoing, name: str) -> str:
    """The card as it would be pushed now, whether or not the gate is open."""
    return model_card(facts_of(outgoing, name, collect(outgoing.folder) | report_of(outgoing)))


def self_contained(found: Mapping[str, bytes]) -> dict[str, Content]:
    """What plain diffusers needs for a pipeline of medsd's own: its sources, and an index that holds `medsd.json`."""
    index = json.loads(found[INDEX]) | {"record": json.loads(found[INFO])}
    return {"pipeline.py": pipeline_source().encode(), INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def check_base(outgoing: Outgoing) -> None:
    """Raise InputError for adapters of a model that nobody else has."""
    base = read_json(outgoing.folder / INFO).get("base")
    if base is not None and base["sha256"] is not None:
        raise InputError(
            f"{outgoing.called} holds LoRA adapters of a model that only this machine has: add --merge_lora (in Python, merge_lora() and "
            "an audit of what comes out)"
        )


def check_audit(outgoing: Outgoing) -> None:
    """Raise InputError where the weights have no audit, with the command that makes one, or have failed it."""
    if outgoing.skip_audit or outgoing.checkpoint is not None:
        return
    folder, audit = outgoing.folder, audit_of(outgoing)
    if audit is None:
        known = "its audit.json is of other weights" if (folder / "audit.json").is_file() else "it has no audit.json"
        raise InputError(f"{outgoing.called} was not audited for copies ({known}); nothing was sent. Type {outgoing.audit_command}")
    if audit["verdict"] != "passed":
        found = f"{audit['copies']} copies, {audit['flagged']} of {audit['samples']} flagged"
        raise InputError(
            f"{outgoing.called} failed its audit ({found}); nothing was sent. Train on more patients, or for fewer updates; "
            "--skip_audit sends it all the same, and the card says so"
        )


def audit_of(outgoing: Outgoing) -> dict[str, Any] | None:
    """The audit of exactly these weights; None where there is none, or where it is not to be looked at."""
    audit = read_json(outgoing.folder / "audit.json")
    skipped = outgoing.skip_audit or outgoing.checkpoint is not None
    return None if skipped or audit.get("weights_sha256") != weights_sha256(outgoing.folder) else audit


def report_of(outgoing: Outgoing) -> dict[str, Content]:
    """Figures and numbers of a report of exactly these weights; nothing where there is no such report."""
    report = outgoing.report
    if report is None or outgoing.checkpoint is not None or not (report / "metrics.json").is_file():
        return {}
    if read_json(report / "metrics.json").get("weights_sha256") != weights_sha256(outgoing.folder):
        print(f"the card is without {report}, which is no report of these weights")
        return {}
    return figures_in(report) | {"metrics.json": clean_json(report / "metrics.json")}


def facts_of(outgoing: Outgoing, name: str, found: dict[str, Content]) -> Facts:
    """What the card says."""
    folder, data = outgoing.folder, outgoing.data
    return Facts(
        name=name,
        kind=kind_of(folder),
        class_name=class_of(folder),
        info=read_json(folder / INFO),
        config=run_config(folder / "config.yaml"),
        summary=read_json(data / "summary.json") if isinstance(data, Path) else {},
        metrics=json.loads(found.get("metrics.json", b"{}")),
        audit=audit_of(outgoing),
        base=base_of(folder),
        licence=outgoing.licence,
        data=None if isinstance(data, Path) else data,
        figures=tuple(path for path in found if path.startswith("figures/")),
        checkpoint=outgoing.checkpoint,
    )


def class_of(folder: Path) -> str:
    """What loads it in plain diffusers: a class, or `lora`."""
    index = {"pipeline": INDEX, "autoencoder": "config.json"}
    kind = kind_of(folder)
    return "lora" if kind == "lora" else read_json(folder / index[kind])["_class_name"]


def base_of(folder: Path) -> str | None:
    """Hub id of the model that training started from; None for random weights and for a model on this machine."""
    base = read_json(folder / INFO).get("base")
    if base is not None:
        return base["name"] if base["sha256"] is None else None
    return read_json(folder / "environment.json").get("base_model")
