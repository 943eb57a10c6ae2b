"""What the cards of models and of data have in common: tables, their cells, and the counts of a prepared data set."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CARD = "README.md"
SPLITS = ("train", "validation", "test")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "| " + " | ".join("---" for _ in head) + " |", *lines]) if lines else ""


def cell(text: str) -> str:
    """Text that stays within its cell, with tokens such as `<tumor>` seen rather than taken for HTML."""
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


def counts(summary: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Of `summary.json`, rows of a name and its number in each split: the classes' images, and all images and patients."""
    classes = [[cell(name), *(str(summary["classes"][split].get(name, 0)) for split in SPLITS)] for name in summary["classes"][SPLITS[0]]]
    return classes, [[what, *(str(summary[what][split]) for split in SPLITS)] for what in ("images", "patients")]


def patient_rules(summary: Mapping[str, Any]) -> str:
    """Of `summary.json`: what said who the patient is, and of how many images."""
    return ", ".join(f"{cell(rule)} ({count} images)" for rule, count in summary["patient_rule"].items())
