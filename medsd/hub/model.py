"""A trained folder -> a model repository on the Hugging Face Hub, through one gate.

Nothing is sent before `audit.json` says of exactly these weights that they copy no training image, and the privacy scan has found nothing
in any file of the parcel. The gate can be passed without an audit (`skip_audit`), which the card then says.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from medsd.hub.card import model_card
from medsd.hub.contents import (
    INDEX,
    INFO,
    OURS,
    as_json,
    collect,
    figures_in,
    kind_of,
    read_json,
    record_of,
    shareable_audit,
    shareable_metrics,
)
from medsd.hub.facts import Facts
from medsd.hub.gate import Outgoing, check_gate, check_public
from medsd.hub.markdown import CARD
from medsd.hub.privacy import Content, scan, stamps
from medsd.hub.standalone import pipeline_source
from medsd.hub.upload import Target, stated_licence, upload

OWN_CLASS = "MedSDPipeline"
REMEDY = "take it out, or look whether a class, a prompt or a folder's name says whose images these are"


def push_model(outgoing: Outgoing, target: Target) -> str:
    """Create or update a model repository, in one commit; returns its address.

    Without a licence, the one that the repository states already stays. Raises InputError where the gate is closed, and as `upload` does.
    """
    before = stamps(collect(outgoing.folder) | (figures_in(outgoing.report) if outgoing.report else {}))
    check_gate(outgoing, target.name)
    if not target.private:
        check_public(outgoing)
    licence = outgoing.licence or stated_licence(target)
    made = parcel(outgoing, target.name, target.revision, licence)
    return upload(made, target, lambda path: OURS.fullmatch(path) is not None, "Upload a model trained with medsd", before)


def parcel(outgoing: Outgoing, name: str, revision: str | None = None, licence: str | None = None) -> dict[str, Content]:
    """All that is sent, once the gate is open: weights, configs, records, figures, and a card with this name and licence."""
    check_gate(outgoing, name)
    found = contents(outgoing)
    facts = replace(facts_of(outgoing, name, found), revision=revision, licence=licence or outgoing.licence)
    # The card says nothing but these facts; its own words, and those of medsd's sources, are the same for everybody.
    scan(found | {"facts.json": json.dumps(asdict(facts)).encode()}, outgoing.secrets(), REMEDY)
    if class_of(outgoing.folder) == OWN_CLASS:
        found |= self_contained(found)
    return found | {CARD: model_card(facts).encode()}


def card_of(outgoing: Outgoing, name: str) -> str:
    """The card as it would be pushed now, whether or not the gate is open."""
    return model_card(facts_of(outgoing, name, contents(outgoing)))


def contents(outgoing: Outgoing) -> dict[str, Content]:
    """Everything but the card."""
    audit = outgoing.audit
    checked = {} if audit is None else {"audit.json": as_json(shareable_audit(audit))}
    return collect(outgoing.folder) | checked | report_of(outgoing)


def self_contained(found: Mapping[str, bytes]) -> dict[str, Content]:
    """What plain diffusers needs for a pipeline of medsd's own: its sources, and an index that holds `medsd.json`."""
    index = json.loads(found[INDEX]) | {"record": json.loads(found[INFO])}
    return {"pipeline.py": pipeline_source().encode(), INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def report_of(outgoing: Outgoing) -> dict[str, Content]:
    """Numbers of exactly these weights, and of a report the figures; nothing where there are none. An autoencoder has its own numbers."""
    report = outgoing.folder if kind_of(outgoing.folder) == "autoencoder" else outgoing.report
    if report is None or outgoing.checkpoint is not None or not (report / "metrics.json").is_file():
        return {}
    metrics = read_json(report / "metrics.json")
    if metrics.get("weights_sha256") != outgoing.weights_sha256:
        print(f"the card is without {report}/metrics.json, which is of other weights")
        return {}
    return figures_in(report) | {"metrics.json": as_json(shareable_metrics(metrics))}


def facts_of(outgoing: Outgoing, name: str, found: dict[str, Content]) -> Facts:
    """What the card says."""
    folder, data, info = outgoing.folder, outgoing.data, read_json(outgoing.folder / INFO)
    summary = read_json(data / "summary.json") if isinstance(data, Path) else {}
    ours = summary.get("fingerprint") == (info.get("data") or {}).get("fingerprint")
    return Facts(
        name=name,
        kind=kind_of(folder),
        class_name=class_of(folder),
        info=info,
        config=yaml_flags(found),
        summary=summary if ours else {},
        metrics=json.loads(found.get("metrics.json", b"{}")),
        audit=outgoing.audit,
        base=base_of(folder),
        licence=outgoing.licence,
        data=None if isinstance(data, Path) else data,
        figures=tuple(path for path in found if path.startswith("figures/")),
        checkpoint=outgoing.checkpoint,
    )


def yaml_flags(found: Mapping[str, bytes]) -> dict[str, Any]:
    """The flags that travel."""
    import yaml

    return next(iter(yaml.safe_load(found.get("config.yaml", b"{}")).values()), {})


def class_of(folder: Path) -> str:
    """What loads it in plain diffusers: a class, or `lora`."""
    index = {"pipeline": INDEX, "autoencoder": "config.json"}
    kind = kind_of(folder)
    return "lora" if kind == "lora" else read_json(folder / index[kind])["_class_name"]


def base_of(folder: Path) -> tuple[str, str | None] | None:
    """Hub id and revision of the model that training started from; None for random weights and for a model on this machine."""
    base = read_json(folder / INFO).get("base")
    if base is not None:
        return (base["name"], base["revision"]) if base["sha256"] is None else None
    name = read_json(record_of(folder, "environment.json")).get("base_model")
    return None if name is None else (name, None)
