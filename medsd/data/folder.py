"""The last stage of a preparation: the data folder, and beside it the private one that says what its keys stand for."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.dataset import INFO_FILE, DataInfo, data_features, unpack
from medsd.data.plan import Plan, salted, summarise
from medsd.data.prompts import NO_FINDING
from medsd.data.ranges import is_recorded
from medsd.data.rows import Row
from medsd.data.shards import SHEET_COLUMNS, SHEET_ROWS, contact_sheet, panels_of, rows_per_shard, write_shard
from medsd.data.splits import SPLITS
from medsd.data.staging import Staging, read_places
from medsd.data.workers import Job, WorkerPool
from medsd.errors import InputError
from medsd.output import partial_folder, replace_folder

LEAST_SHOWN = 2
"""Images of a class on the contact sheet, however many panels each has."""
REASONS = (
    "cannot be decoded",
    "needs more memory",
    "took longer than",
    "ended the decoder",
    "no such file",
    "a DICOM object without pixels",
    "pixels that are not finite numbers",
    "the header claims",
)
"""What a quarantine outside the private folder may say."""


PRIVATE_FILES = frozenset({"keys.parquet", "quarantine.jsonl", "salt.json"})
DATA_FILES = frozenset(
    {
        *("data", INFO_FILE, "summary.json", "quarantine.jsonl", "duplicates.jsonl", "contact_sheet.png"),
        "README.md",
    }
)
"""What a data set's folder holds, hidden files aside."""


@dataclass
class DataFolder:
    """A prepared folder and its private one in the making; both appear under their names only when they are complete."""

    output_dir: Path
    plan: Plan
    info: DataInfo
    columns: dict[str, list[Any]]
    hits: list[dict[str, Any]]
    refused: list[tuple[Row, str]]
    salt: bytes
    salt_name: str

    def write(self, staging: Staging, pool: WorkerPool, counts: dict[str, Any]) -> dict[str, Any]:
        """Write shards, then what describes them, then the private folder; only then do both get their names."""
        made = self._folder(staging)
        shards = self._write_shards(made / "data", staging, pool)
        summary = summarise(self.plan, self.info) | counts | {"shards": shards}
        _write_json(made / INFO_FILE, self.info.to_dict())
        _write_json(made / "summary.json", summary)
        quarantine = [{"key": salted(self.salt, row.name), "stage": "decode", "reason": _nameless(reason)} for row, reason in self.refused]
        _write_lines(made / "quarantine.jsonl", quarantine)
        _write_lines(made / "duplicates.jsonl", self.hits)
        self._sheet(staging).save(made / "contact_sheet.png")
        private = self.output_dir.with_name(self.output_dir.name + ".private")
        made_private = self._private(private)
        shutil.rmtree(staging.folder)  # Before the end, so that no kill leaves source ids behind a finished folder.
        (made / "plan").unlink()
        replace_folder(made_private, private)
        replace_folder(made, self.output_dir)
        return summary

    def _folder(self, staging: Staging) -> Path:
        """The hidden folder that becomes the data set; what an earlier run of this very plan left there stays."""
        made = self.output_dir.with_name(f".{self.output_dir.name}.partial")
        digest = hashlib.sha256(f"{(staging.folder / 'fingerprint').read_text()} {self.info}".encode())
        for name, values in self.columns.items():
            digest.update(f"{name} {values}".encode())
        wanted = digest.hexdigest()
        if not (made / "plan").is_file() or (made / "plan").read_text() != wanted:
            made = partial_folder(self.output_dir)
            (made / "plan").write_text(wanted)
        (made / "data").mkdir(exist_ok=True)
        return made

    def _write_shards(self, folder: Path, staging: Staging, pool: WorkerPool) -> dict[str, str]:
        """sha256 of each shard, by name."""
        import pyarrow
        from tqdm import tqdm

        with_mask = any(row.mask for row in self.plan.rows) and not staging.options.mask_channel
        features = data_features(self.info.class_names, self.info.multi_label, with_mask, is_recorded(self.info.intensity))
        rows = pyarrow.table({name: _typed(values, features.arrow_schema, name) for name, values in self.columns.items()})
        shards = {}
        largest_first = sorted(self._parts(folder, rows), key=lambda shard: -len(shard[1]))  # So that all workers end together.
        for path, part in largest_first:
            if path.is_file():
                shards[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                arguments = (path, staging.folder, part, features.arrow_schema, self.info.intensity_map, self.info.image_channels)
                pool.submit(Job(write_shard, arguments))
        with tqdm(total=len(pool.waiting), desc="writing", unit="shard") as bar:
            for outcome in pool.outcomes():
                if outcome.failure is not None:
                    raise InputError(f"a worker {outcome.failure} while it wrote {outcome.job.arguments[0].name}: is there memory left?")
                shards[outcome.job.arguments[0].name] = outcome.result
                bar.update()
        return dict(sorted(shards.items()))

    def _parts(self, folder: Path, rows: Any) -> Iterator[tuple[Path, Any]]:
        """Every shard's path and rows."""
        per_shard = self._per_shard()
        for split in SPLITS:
            members = [index for index, owner in enumerate(self.plan.splits) if owner == split]
            shards = -(-len(members) // per_shard)
            for shard in range(shards):
                path = folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet"
                yield path, rows.take(members[shard * per_shard : (shard + 1) * per_shard])

    def _per_shard(self) -> int:
        widest = max(np.dtype(kind).itemsize for kind in set(self.plan.column("dtype")))
        return rows_per_shard(self.info.image_channels * self.info.resolution**2 * widest)

    def _sheet(self, staging: Staging) -> Any:
        """Panels of a few images of each of the first `SHEET_ROWS` classes, evenly picked from the first split."""
        classes: dict[str, list[int]] = {}
        split = next(split for split in SPLITS if split in self.plan.splits)
        for index, owner in enumerate(self.plan.splits):
            for name in (self.plan.findings[index] or (NO_FINDING,)) if owner == split else ():
                classes.setdefault(name, []).append(index)
        rows = []
        for name in sorted(classes)[:SHEET_ROWS]:
            members = classes[name]
            panels = self._panels(staging, members[0])
            count = min(max(LEAST_SHOWN, SHEET_COLUMNS // len(panels)), len(members))
            picked = ((np.arange(count) + 0.5) * len(members) / count).astype(int)
            rows.append((f"{name}: {len(members)} in {split}", [panel for at in picked for panel in self._panels(staging, members[at])]))
        return contact_sheet(rows)

    def _panels(self, staging: Staging, index: int) -> list[bytes]:
        ranges = self.columns["intensity_range"][index] if "intensity_range" in self.columns else None
        (stored,) = read_places(staging.path(self.columns["block"][index]), ["image", "mask"], [self.columns["place"][index]])
        mask = unpack(stored["mask"]) if stored["mask"] else None
        return panels_of(unpack(stored["image"]), mask, self.info.intensity_map, np.array(ranges) if ranges else None)

    def _private(self, private: Path) -> Path:
        import pyarrow
        import pyarrow.parquet

        made = partial_folder(private)
        made.chmod(0o700)
        columns = {
            "key": self.plan.keys,
            "file": [_readable(str(row.file)) for row in self.plan.rows],
            "frame": [
                row.index if row.index is not None else frame for row, frame in zip(self.plan.rows, self.plan.column("frame"), strict=True)
            ],
            "patient": [_readable(patient) for patient in self.plan.source_patients],
            "sop_uid": self.plan.column("sop_uid"),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), made / "keys.parquet", compression="zstd")
        lines = [{"name": row.name, "stage": "decode", "reason": reason} for row, reason in self.refused]
        _write_lines(made / "quarantine.jsonl", lines)
        _write_json(made / "salt.json", {"name": self.salt_name})
        return made


def check_folders(output_dir: Path, overwrite: bool) -> None:
    """Raise InputError for what a new data set would replace and must not: others' files, and keys that no `overwrite` gives up."""
    private = output_dir.with_name(output_dir.name + ".private")
    for folder, own in ((output_dir, DATA_FILES), (private, PRIVATE_FILES)):
        foreign = sorted(file.name for file in folder.glob("[!.]*") if file.name not in own) if folder.is_dir() else []
        if foreign:
            raise InputError(f"{folder} holds {foreign[0]}, which is not of a data set: move it away, or choose another --output_dir")
    unfinished = output_dir.with_name(f".{output_dir.name}.partial").is_dir()
    if private.is_dir() and any(private.iterdir()) and not (overwrite or output_dir.is_dir() or unfinished):
        raise InputError(f"{private} has the keys of a data set that is elsewhere: move it there, or give it up with --overwrite")


def _readable(name: str) -> str:
    """A name whose bytes need not be UTF-8, as text."""
    return name.encode(errors="replace").decode()


def _typed(values: list[Any], schema: Any, name: str) -> Any:
    import pyarrow

    place = schema.get_field_index(name)
    return pyarrow.array(values, schema.field(place).type if place >= 0 else pyarrow.int32())


def _nameless(reason: str) -> str:
    """The kind of a refusal, without anything that a file or its name says."""
    words = reason.split(": ", 1)[-1].split(" (")[0]
    return next((kind for kind in REASONS if words.startswith(kind)), "cannot be used")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
