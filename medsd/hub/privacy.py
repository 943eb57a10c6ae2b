"""What may not travel: ids and names that only `DATA.private` holds, tokens, and paths of this machine.

A *parcel* is what a push sends: path in the repository -> file on this machine, or content made for it. Every text of a parcel is looked
at: strings and keys of JSON, text columns, names and metadata of Parquet, headers of safetensors, text chunks of PNGs, and lines of
anything else. Pixels and weights are not: that they copy nobody is what the audit is for.
"""

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medsd.errors import InputError

if TYPE_CHECKING:
    import pyarrow

Content = Path | bytes
Parcel = Mapping[str, Content]
Stamps = Mapping[str, tuple[int, int, int]]

HASH = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
"""A key, an id or a digest: compared as a whole, since a short number is part of some hash by chance."""
SHARD = re.compile(r"(train|validation|test)-\d{5}-of-\d{5}\.parquet")
SHORTEST = 4
"""Characters; ids and names below this are in every text by chance, so they are not searched for."""
ANYWHERE = 8
"""Characters from which on a match inside a longer word counts too."""
TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
PLACE = re.compile(
    r"(?<![\w./])~?/(?=[\w .-]*\w)[\w.-][\w .-]*/[^\s/]"  # /home/doe, ~/scans/x
    r"|(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}\w|\\\\\w+\\\w"  # C:\scans, D:/scans, \\server\share
    r"|\b(?:file|s3|gs|smb|nfs)://|(?<![\w.])\.\.[\\/]\w"  # file:///data, ../../data
)
"""A path on this machine or its network: absolute ones of two parts or more, addresses of files, ways out of a folder."""
PUBLIC_VOCABULARY = 10_000
"""Words; a tokenizer that has more is one that others made of public text, in which every surname stands."""


@dataclass(frozen=True)
class Secrets:
    """What may not travel, in lower case, and what it is; by length, so that a text is searched for all of it at once."""

    by_length: dict[int, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, class_names: Iterable[str]) -> "Secrets":
        """Of a prepared data folder; raises InputError where its private folder is not beside it."""
        private = folder.with_name(folder.name + ".private")
        if not (private / "keys.parquet").is_file():
            raise InputError(
                f"{private}/keys.parquet is not there, so nobody can tell whether a patient is named: nothing was sent; bring that folder "
                f"back beside {folder}"
            )
        return cls.read(private / "keys.parquet", class_names)

    @classmethod
    def read(cls, keys: Path, class_names: Iterable[str]) -> "Secrets":
        """From `keys.parquet`. Names of files and folders that several patients share, and those of classes, name nobody."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(keys, columns=["file", "patient", "sop_uid"]).to_pydict()
        named = {name.casefold() for name in class_names}
        owners = defaultdict(set)
        for file, patient in set(zip(table["file"], table["patient"], strict=True)):
            for name in (file, *_names(file)):
                owners[name.casefold()].add(patient)
        found = {name: "name of a file or folder" for name, patients in owners.items() if len(patients) == 1 and name not in named}
        found |= {value.casefold(): "SOP instance UID" for value in set(table["sop_uid"]) if value}
        found |= {value.casefold(): "patient's id" for value in set(table["patient"]) if value}
        by_length = defaultdict(dict)
        for value, kind in found.items():
            if len(value) >= SHORTEST:
                by_length[len(value)][value] = kind
        return cls(dict(by_length))

    def kind_in(self, text: str, prose: bool = False) -> str | None:
        """What the first secret in a text is; None where there is none. In prose a short number is a number and nobody's id."""
        if HASH.fullmatch(text) or SHARD.fullmatch(text):
            return self.by_length.get(len(text), {}).get(text)
        low = text.casefold()
        for length, values in self.by_length.items():
            for start in range(len(low) - length + 1):
                value = low[start : start + length]
                kind = values.get(value)
                if kind is None or (prose and length < ANYWHERE and value.isdigit()):
                    continue
                if length >= ANYWHERE or _is_word(low, start, start + length):
                    return kind
        return None


def scan(parcel: Parcel, secrets: Secrets, remedy: str) -> None:
    """Raise InputError, which ends with `remedy`, where a parcel names a patient or a file, or holds a token or a path of this machine."""
    for path, content in parcel.items():
        prose = path.endswith((".md", ".txt"))
        for place, text in texts_of(path, content):
            kind = secrets.kind_in(text, prose) or _kind_of_machine(text)
            if kind is not None:
                raise InputError(f"{place} in {path} holds a {kind}: nothing was sent; {remedy}")


def scan_tokens(parcel: Parcel) -> None:
    """Raise InputError for a token in a parcel of sources, which speak of places for good reasons."""
    for path, content in parcel.items():
        if any(TOKEN.search(text) for _, text in texts_of(path, content)):
            raise InputError(f"{path} holds a token of the Hub: take it out; nothing was sent")


def stamps(parcel: Parcel) -> Stamps:
    """What changes where a file of the parcel does: inode, size, and time of its last change."""
    found = {path: content.stat() for path, content in parcel.items() if isinstance(content, Path) and content.is_file()}
    return {path: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def _kind_of_machine(text: str) -> str | None:
    if TOKEN.search(text):
        return "token of the Hub"
    return "path of this machine" if PLACE.search(text) else None


def _names(file: str) -> tuple[str, ...]:
    """A file's name, the same without its suffix, and the folders it lies in."""
    *folders, name = PurePath(file).parts
    return name, PurePath(name.removesuffix(".gz")).stem, *folders


def _is_word(text: str, start: int, stop: int) -> bool:
    return not text[max(0, start - 1) : start].isalnum() and not text[stop : stop + 1].isalnum()


def texts_of(path: str, content: Content) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that can be read in a file that is sent."""
    suffix = PurePath(path).suffix
    if suffix == ".parquet":
        yield from _shard_texts(content)
    elif suffix == ".safetensors":
        yield from (("the header", text) for text in _strings(safetensors_header(content)))
    elif suffix == ".png":
        yield from (("a text chunk", f"{key} {value}") for key, value in _png_texts(content).items())
    elif suffix == ".json":
        yield from (("a text", text) for text in _strings(_without_vocabulary(_parsed(_text(content), path))))
    elif suffix == ".gz":
        return  # A public vocabulary.
    elif suffix == ".yaml":
        yield from (("a value", text) for flags in _yaml(content).values() for text in _strings(list(flags.values())))
    elif suffix == ".jsonl":
        yield from (("a text", text) for line in _text(content).splitlines() for text in _strings(_parsed(line, path)))
    else:
        yield from (("a line", line) for line in _text(content).splitlines())


def safetensors_header(content: Content) -> dict[str, Any]:
    """Names and metadata of a file of safetensors; raises InputError for another file."""
    with _opened(content) as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            return json.loads(stream.read(length) if length < 100_000_000 else b"")
        except ValueError as error:
            raise InputError(f"{content if isinstance(content, Path) else 'a file'} holds no safetensors: save the model again") from error


def _png_texts(content: Content) -> dict[str, Any]:
    from PIL import Image

    with _opened(content) as stream, Image.open(stream) as image:
        return dict(getattr(image, "text", {}))


def _opened(content: Content) -> io.BufferedIOBase:
    return content.open("rb") if isinstance(content, Path) else io.BytesIO(content)


def _text(content: Content) -> str:
    try:
        return content.read_text() if isinstance(content, Path) else content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{content if isinstance(content, Path) else 'a file'} is no text, as it should be: make it again") from error


def _yaml(content: Content) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(_text(content)) or {}


def _without_vocabulary(record: Any) -> Any:
    """A tokenizer's record without the words and merges of a public vocabulary; words that were added to it stay."""
    model = record.get("model") if isinstance(record, dict) else None
    if not isinstance(model, dict) or len(model.get("vocab", ())) <= PUBLIC_VOCABULARY:
        return record
    return record | {"model": {key: value for key, value in model.items() if key not in {"vocab", "merges"}}}


def _shard_texts(content: Content) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    with _opened(content) as stream, pyarrow.parquet.ParquetFile(stream) as shard:
        leaves = [shard.schema.column(index) for index in range(len(shard.schema))]
        yield from (("a column's name", leaf.path) for leaf in leaves)
        for key, value in (shard.metadata.metadata or {}).items():
            if key != b"ARROW:schema":  # Names and metadata once more, in base64.
                yield from (("the metadata", text) for text in _metadata_texts(key, value))
        texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        for group in range(shard.num_row_groups):
            table = shard.read_row_group(group, columns=texts)
            for name in table.column_names:
                yield from ((f"column {name}", text) for text in _column_texts(table[name]))


def _metadata_texts(key: bytes, value: bytes) -> Iterator[str]:
    yield key.decode(errors="replace")
    text = value.decode(errors="replace")
    try:
        yield from _strings(json.loads(text))
    except ValueError:
        yield text


def _column_texts(column: "pyarrow.ChunkedArray") -> Iterator[str]:
    """Every different string of a column, however deep it lies."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_struct(kind):
        for part in kind:
            yield from _column_texts(pyarrow.compute.struct_field(column, part.name))
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        yield from _column_texts(pyarrow.compute.list_flatten(column))
    else:
        yield from (str(value) for value in pyarrow.compute.unique(column).to_pylist() if value is not None)


def _strings(content: Any) -> Iterator[str]:
    """Every key and every string of parsed JSON, and every number that is long enough to be somebody's and no count."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, int) and len(str(content)) >= ANYWHERE:
        yield str(content)
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _parsed(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is damaged: make it again") from error
