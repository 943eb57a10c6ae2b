"""Tables and cells of a card."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "| " + " | ".join("---" for _ in head) + " |", *lines]) if lines else ""


def cell(text: str) -> str:
    """Text that stays within its cell, with tokens such as `<tumor>` seen rather than taken for HTML."""
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())
