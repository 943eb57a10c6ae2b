"""Decoded images on their way to shards: blocks on disk that survive a kill, in a hidden private folder beside the data.

A *block* is a run of consecutive rows, decoded and written by one worker: an Arrow file that appears under its name only
when it is complete, and beside it a JSON list of the rows that were refused.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medsd.data.dataset import pack
from medsd.data.decode import Decoded, DecodeOptions, decode_row, look_alike
from medsd.data.metadata import FACT_COLUMNS
from medsd.data.rows import Row
from medsd.errors import InputError

if TYPE_CHECKING:
    import pyarrow

DECODERS = ("medsd", "pydicom", "python-gdcm", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "pyjpegls", "nibabel", "pillow", "numpy")
PASSING = ("took longer than", "needs more memory", "ended the decoder", "(OSError: [Errno")
"""Refusals for reasons that need not hold at another time."""
HEAVY = frozenset({"image", "mask", "thumbnail"})
"""Columns that are read only where they are needed."""
BATCH_BYTES = 2**24

Announce = Any


def schema() -> "pyarrow.Schema":
    """Columns of a block."""
    import pyarrow as pa

    array = pa.struct({"bytes": pa.binary(), "shape": pa.list_(pa.int32()), "dtype": pa.string()})
    texts = ("patient", "study", "series", "sop_uid", "modality", *FACT_COLUMNS, "fingerprint", "dtype")
    numbers = {"row": pa.int32(), "frame": pa.int32(), "instance_number": pa.int32(), "channels": pa.int32(), "side": pa.int32()}
    numbers["foreground"] = pa.int32()
    reals = ("position", "height", "low", "high")
    lists = ("spacing", "voi", "ranges", "quantiles", "mask_labels")
    return pa.schema(
        {
            **numbers,
            **dict.fromkeys(texts, pa.string()),
            **dict.fromkeys(reals, pa.float64()),
            **dict.fromkeys(lists, pa.list_(pa.float64())),
            "findings": pa.list_(pa.string()),
            "burned_in": pa.bool_(),
            "hash": pa.binary(64),
            "image": array,
            "mask": array,
            "thumbnail": pa.binary(),
        }
    )


def write_block(path: Path, rows: Sequence[tuple[int, Row]], refused: dict[int, str], options: DecodeOptions, announce: Announce) -> int:
    """Decode numbered rows into a block; returns how many were refused. `refused` holds rows known to break a worker, and why."""
    import pyarrow as pa

    made, quarantine = path.with_suffix(".partial"), []
    with pa.OSFile(str(made), "wb") as stream, pa.ipc.new_file(stream, schema()) as writer:
        waiting: list[dict[str, Any]] = []
        for number, row in rows:
            announce(number)
            start = len(waiting)
            try:
                if number in refused:
                    raise InputError(refused[number])
                for decoded in decode_row(row, options):
                    waiting.append(_columns(number, decoded))
            except InputError as error:
                del waiting[start:]
                quarantine.append({"row": number, "reason": str(error)})
            if sum(len(line["image"]["bytes"]) for line in waiting) > BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema()))
                waiting = []
        if waiting:
            writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema()))
    path.with_suffix(".json").write_text(json.dumps(quarantine))
    settle(made, path)
    return len(quarantine)


def settle(made: Path, path: Path) -> None:
    """Give a finished file its name once its content is on the disk."""
    with made.open("rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(made, path)


def _columns(number: int, decoded: Decoded) -> dict[str, Any]:
    header, image = decoded.header, decoded.image
    small, hashed = look_alike(decoded.content)
    facts = {field.name: getattr(header.facts, field.name) for field in fields(header.facts)}
    return facts | {
        "row": number,
        "frame": decoded.frame,
        "instance_number": header.instance_number,
        "channels": len(image),
        "side": max(decoded.content.shape[1:]),
        "dtype": str(image.dtype),
        "patient": header.patient,
        "study": header.study,
        "series": header.series,
        "sop_uid": header.sop_uid,
        "modality": header.modality,
        "fingerprint": decoded.fingerprint() if image.min() != image.max() else "",
        "position": header.position,
        "height": decoded.height,
        "low": float(image.min()),
        "high": float(image.max()),
        "spacing": decoded.spacing,
        "voi": header.voi,
        "ranges": decoded.ranges,
        "quantiles": decoded.quantiles,
        "foreground": decoded.foreground,
        "mask_labels": decoded.mask_labels,
        "findings": decoded.findings,
        "burned_in": header.burned_in,
        "hash": hashed.tobytes(),
        "image": pack(image),
        "mask": pack(decoded.mask) if decoded.mask is not None else None,
        "thumbnail": small.tobytes(),
    }


class Staging:
    """The folder of blocks of one preparation; another one's blocks are thrown away.

    Args:
        folder: made with mode 0700.
        rows: every row of the collection.
        options: what the blocks depend on besides the files.
        block_rows: rows per block.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], options: DecodeOptions, block_rows: int) -> None:
        self.folder, self.rows, self.options, self.block_rows = folder, rows, options, block_rows
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        wanted, note = self._fingerprint(), folder / "fingerprint"
        if not note.is_file() or note.read_text() != wanted:
            for old in [*folder.glob("block-*"), *folder.glob("shard-*")]:
                old.unlink()
            note.write_text(wanted)
        for block in self.blocks():
            refusals = self.path(block).with_suffix(".json")
            if self.finished(block) and any(reason in refusals.read_text() for reason in PASSING):
                self.path(block).unlink()

    def _fingerprint(self) -> str:
        """sha256 over versions, options and each row's place and files, with their sizes and times."""
        versions = [version(name) for name in DECODERS]
        digest = hashlib.sha256(json.dumps([asdict(self.options), self.block_rows, versions, str(schema())]).encode())
        for row in self.rows:
            files = [*row.files, *([row.mask] if row.mask else [])]
            known = [(str(file), *_stamp(file)) for file in files]
            digest.update(repr((row.name, known, row.array, row.index)).encode())
        return digest.hexdigest()

    def blocks(self) -> range:
        """Numbers of all blocks."""
        return range(-(-len(self.rows) // self.block_rows))

    def path(self, block: int) -> Path:
        """File of a block."""
        return self.folder / f"block-{block:06d}.arrow"

    def rows_of(self, block: int) -> list[tuple[int, Row]]:
        """The numbered rows of a block."""
        first = block * self.block_rows
        return list(enumerate(self.rows[first : first + self.block_rows], start=first))

    def finished(self, block: int) -> bool:
        """Whether the block is on disk."""
        return self.path(block).is_file()

    def refused(self) -> list[tuple[Row, str]]:
        """Rows of the finished blocks that no image came of, and why."""
        finished = [self.path(block) for block in self.blocks() if self.finished(block)]
        noted = [note for path in finished for note in json.loads(path.with_suffix(".json").read_text())]
        return [(self.rows[note["row"]], note["reason"]) for note in noted]

    def table(self) -> "pyarrow.Table":
        """What is known of every image, pixels aside; `block` and `place` say where those are."""
        import pyarrow as pa

        parts = []
        for block in self.blocks():
            part = read_columns(self.path(block), [name for name in schema().names if name not in HEAVY])
            place = pa.array(np.arange(len(part)), pa.int32())
            parts.append(part.append_column("place", place).append_column("block", pa.array(np.full(len(part), block), pa.int32())))
        return pa.concat_tables(parts).combine_chunks()


def read_columns(path: Path, names: Sequence[str]) -> "pyarrow.Table":
    """Some columns of a block; bytes of the others are not touched."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as stream:
        return pa.ipc.open_file(stream).read_all().select(list(names))


def read_places(path: Path, names: Sequence[str], places: Sequence[int]) -> list[dict[str, Any]]:
    """Some columns of some rows of a block, batch by batch, so that no more than one is in memory."""
    import pyarrow as pa

    found, first = {}, 0
    with pa.OSFile(str(path)) as stream:
        reader = pa.ipc.open_file(stream, options=pa.ipc.IpcReadOptions(included_fields=[schema().get_field_index(name) for name in names]))
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            inside = [place for place in places if first <= place < first + len(batch)]
            found |= zip(inside, batch.take([place - first for place in inside]).to_pylist(), strict=True) if inside else ()
            first += len(batch)
    return [found[place] for place in places]


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns
