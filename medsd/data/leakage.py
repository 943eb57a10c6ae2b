"""Images that show the same in two splits: found, and refused, dropped or kept."""

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.duplicates import THUMBNAIL_SIDE, find_near_duplicates
from medsd.data.plan import Plan
from medsd.data.splits import SPLITS, drop_duplicates, find_duplicates
from medsd.data.staging import Staging, read_columns
from medsd.errors import InputError


@dataclass(frozen=True)
class Hit:
    """Two images of different splits that show the same, by their index in the plan."""

    first: int
    second: int
    kind: str
    """`identical`, `near` or `mirrored`."""
    correlation: float


def deduplicate(plan: Plan, staging: Staging, rule: str) -> tuple[Plan, list[dict[str, Any]], int]:
    """Find what is the same across splits, and refuse it, drop it or keep it; returns the report by key."""
    if len(set(plan.splits)) < 2:
        return plan, [], 0
    hits = _hits(plan, staging)
    if hits and rule == "refuse":
        raise InputError(_refusal(plan, hits, staging.folder / "duplicates.csv"))
    report = [
        {
            "keys": [plan.keys[hit.first], plan.keys[hit.second]],
            "splits": [plan.splits[hit.first], plan.splits[hit.second]],
            "kind": hit.kind,
            "correlation": round(hit.correlation, 4),
        }
        for hit in hits
    ]
    gone = drop_duplicates([(hit.first, hit.second) for hit in hits], plan.splits) if rule == "drop" else set()
    return (plan.keep([i for i in range(len(plan.rows)) if i not in gone]) if gone else plan), report, len(gone)


def _refusal(plan: Plan, hits: list[Hit], listed: Path) -> str:
    """What to say of duplicates; all of them are listed in a file."""
    names = plan.names()
    lines = [("first", "split", "second", "split", "kind", "correlation")]
    for hit in hits:
        pair = (names[hit.first], plan.splits[hit.first], names[hit.second], plan.splits[hit.second])
        lines.append((*pair, hit.kind, f"{hit.correlation:.4f}"))
    with listed.open("w", newline="", encoding="utf-8", errors="replace") as stream:
        csv.writer(stream).writerows(lines)
    first, split, second, other, kind, _ = lines[1]
    return (
        f"{len(hits)} pairs of images in different splits show the same ({first} in {split} and {second} in {other}, {kind}; all are in "
        f"{listed}): add --duplicates drop, or keep if that is meant; what has been read is not read again"
    )


def _hits(plan: Plan, staging: Staging) -> list[Hit]:
    """Pairs of equal pixels by their fingerprints, then pairs that look alike by `find_near_duplicates`."""
    prints = plan.column("fingerprint")
    hits = {(hit.first, hit.second): hit for hit in _identical(plan, prints)}
    hashed = np.frombuffer(b"".join(plan.column("hash")), np.uint64).reshape(-1, 2, 4)
    groups = np.array([SPLITS.index(split) for split in plan.splits])
    thumbnails = _Thumbnails(staging.folder, np.array(plan.column("block")), np.array(plan.column("place")))
    for near in find_near_duplicates(thumbnails, groups, hashed=(hashed[:, 0], hashed[:, 1])):
        same = prints[near.first] == prints[near.second]
        kind = "identical" if same else "mirrored" if near.mirrored else "near"
        hits.setdefault((near.first, near.second), Hit(near.first, near.second, kind, near.correlation))
    return [hits[pair] for pair in sorted(hits)]


def _identical(plan: Plan, prints: Sequence[str]) -> list[Hit]:
    """Each image of a group of equal ones, beside one of the group that stays: in test if there is one there, else in validation."""
    found = []
    for group in find_duplicates(prints, plan.splits):
        if not prints[group[0]]:
            continue  # Constant images, which say nothing.
        kept = max(group, key=lambda index: SPLITS.index(plan.splits[index]))
        others = [index for index in group if plan.splits[index] != plan.splits[kept]]
        found += [Hit(min(index, kept), max(index, kept), "identical", 1.0) for index in others]
    return found


@dataclass(frozen=True)
class _Thumbnails:
    """Thumbnails of a plan's images, read from their blocks when they are asked for: `thumbnails[indices]` is `(M, 64, 64)` uint8."""

    folder: Path
    blocks: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        found = np.empty((len(indices), THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)
        for block in np.unique(self.blocks[indices]).tolist():
            column = read_columns(self.folder / f"block-{block:06d}.arrow", ["thumbnail"])["thumbnail"]
            for index in np.flatnonzero(self.blocks[indices] == block).tolist():
                content = column[int(self.places[indices[index]])].as_buffer()
                found[index] = np.frombuffer(content, np.uint8).reshape(THUMBNAIL_SIDE, THUMBNAIL_SIDE)
        return found


def count_kinds(hits: list[dict[str, Any]]) -> dict[str, int]:
    """Pairs of each kind."""
    kinds = Counter(hit["kind"] for hit in hits)
    return {kind: kinds[kind] for kind in ("identical", "near", "mirrored")}
