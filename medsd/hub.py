"""A prepared data folder -> a data set repository on the Hugging Face Hub.

Only files that medsd wrote travel, and only after none of the ids and names that `DATA.private` holds was found in them. All
of it becomes visible in one commit, so a repository is never half a data set. *Sent*: shards, `medsd.json`, `summary.json`,
`duplicates.jsonl`, `quarantine.jsonl` and a card. The contact sheet stays: it is for whoever decides whether to send.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from medsd.errors import InputError

if TYPE_CHECKING:
    import pyarrow

TEXTS = ("medsd.json", "summary.json", "duplicates.jsonl", "quarantine.jsonl")
STAYS = "contact_sheet.png"
CARD = "README.md"
SPLITS = ("train", "validation", "test")
SHARD = re.compile(r"(train|validation|test)-\d{5}-of-\d{5}\.parquet")
HASH = re.compile(r"[0-9a-f]{16}|[0-9a-f]{64}")
"""A key, an id or a digest: compared as a whole, since a short number is part of some hash by chance."""
SHORTEST = 4
"""Characters; ids and names below this are in every text by chance, so they are not searched for."""
ANYWHERE = 8
"""Characters from which on a match inside a longer word counts too."""
COLUMNS = {
    "key": "salted hash that stands for the image",
    "image": "struct of `bytes`, `shape` = [C, H, W] and `dtype`: the source's own numbers, resized, never clipped",
    "preview": "8-bit thumbnail",
    "label": "class",
    "labels": "0 or 1 for each finding",
    "prompt": "sentence with the class token",
    "patient_id": "salted hash; splits are made by it",
    "series_id": "salted hash",
    "slice_index": "place in the series, volume or file",
    "pixel_spacing": "(row, column) in mm after resizing",
    "age_band": "ten years; 90 and above are one band",
    "sex": "as recorded",
    "scanner": "maker, if it is a well-known one",
    "view": "projection or plane",
    "intensity_range": "(low, high) of each channel, for the intensity map",
    "mask": "struct as `image`: labels",
}


def push_dataset(folder: Path, hub_dataset_id: str, private: bool = True) -> str:
    """Create or update the data set repository `user/name`, and return its URL.

    Raises InputError for a folder that prepare did not write or that holds other files, for an id or a name of `DATA.private`
    in what would be sent, for a public repository where a private one is wanted, and where the Hub refuses.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    files = files_to_send(folder)
    check_privacy(folder, files)
    card = dataset_card(folder, hub_dataset_id)
    try:
        return _commit(HfApi(), folder, files, card, hub_dataset_id, private)
    except HFValidationError as error:
        raise InputError(f"--hub_dataset_id {hub_dataset_id} is no repository name: user/name is expected") from error
    except (HTTPError, OSError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--hub_dataset_id {hub_dataset_id}: the Hub took nothing ({said}); `hf auth login` signs in") from error


def _commit(api: Any, folder: Path, files: list[str], card: str, hub_dataset_id: str, private: bool) -> str:
    """One commit of everything, in which shards of an earlier push go."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    where = {"repo_id": hub_dataset_id, "repo_type": "dataset"}
    url = api.create_repo(**where, private=private, exist_ok=True)
    if private and not api.dataset_info(hub_dataset_id).private:
        raise InputError(f"{hub_dataset_id} exists and is public: make it private, or choose another --hub_dataset_id; nothing was sent")
    old = [path for path in api.list_repo_files(**where) if path.startswith("data/") and path not in files]
    operations = [
        *(CommitOperationDelete(path) for path in old),
        *(CommitOperationAdd(path, str(folder / path)) for path in files),
        CommitOperationAdd(CARD, card.encode()),
    ]
    api.create_commit(**where, operations=operations, commit_message="Upload data prepared by medsd")
    return str(url)


def files_to_send(folder: Path) -> list[str]:
    """Paths below the folder that travel: shards first. Hidden files stay; anything else that medsd did not write is refused."""
    missing = next((name for name in TEXTS if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{folder} has no {missing}: name a folder that prepare_data.py wrote")
    shards = [f"data/{name}" for name in sorted(_read_json(folder / "summary.json")["shards"])]
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()}
    visible = {path for path in found if not any(part.startswith(".") for part in PurePath(path).parts)}
    foreign = sorted(visible - {*shards, *TEXTS, STAYS})
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]}, which medsd did not write: move it away; nothing was sent")
    lost = next((path for path in shards if path not in found), None)
    if lost is not None:
        raise InputError(f"{folder} has no {lost}, which its summary.json names: prepare the data again")
    return [*shards, *TEXTS]


def check_privacy(folder: Path, files: Iterable[str]) -> None:
    """Raise InputError where a file to be sent holds what only `DATA.private` may hold.

    Looked at: every text column of a shard, its columns' names and its metadata, and every text in the other files. Pixels
    and previews are not.
    """
    private = folder.with_name(folder.name + ".private")
    if not (private / "keys.parquet").is_file():
        raise InputError(f"{private}/keys.parquet is not there, so nobody can tell whether {folder} names a patient: nothing was sent")
    secrets = Secrets.read(private / "keys.parquet", _read_json(folder / "medsd.json")["class_names"])
    for path in files:
        for place, text in _texts_of(folder / path):
            kind = secrets.kind_in(text)
            if kind is not None:
                raise InputError(
                    f"{place} in {path} holds a {kind} of {private.name}: nothing was sent; look whether a label, a prompt or a class"
                    " names patients or files, and prepare the data again"
                )


@dataclass(frozen=True)
class Secrets:
    """What may not travel, in lower case, and what it is; by length, so that a text is searched for all of it at once."""

    by_length: dict[int, dict[str, str]]

    @classmethod
    def read(cls, keys: Path, class_names: Iterable[str]) -> "Secrets":
        """From `keys.parquet`. File names that several patients share, and those of classes, name nobody."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(keys, columns=["file", "patient", "sop_uid"]).to_pydict()
        named = {name.casefold() for name in class_names}
        owners = defaultdict(set)
        for file, patient in set(zip(table["file"], table["patient"], strict=True)):
            for name in (file, *_names(file)):
                owners[name.casefold()].add(patient)
        found = {name: "file name" for name, patients in owners.items() if len(patients) == 1 and name not in named}
        found |= {value.casefold(): "SOP instance UID" for value in set(table["sop_uid"]) if value}
        found |= {value.casefold(): "patient's id" for value in set(table["patient"]) if value}
        by_length = defaultdict(dict)
        for value, kind in found.items():
            if len(value) >= SHORTEST:
                by_length[len(value)][value] = kind
        return cls(dict(by_length))

    def kind_in(self, text: str) -> str | None:
        """What the first secret in a text is; None where there is none."""
        if HASH.fullmatch(text) or SHARD.fullmatch(text):
            return self.by_length.get(len(text), {}).get(text)
        low = text.casefold()
        for length, values in self.by_length.items():
            for start in range(len(low) - length + 1):
                kind = values.get(low[start : start + length])
                if kind is not None and (length >= ANYWHERE or _is_word(low, start, start + length)):
                    return kind
        return None


def _names(file: str) -> tuple[str, str]:
    """A file's name, and the same without its suffix."""
    name = PurePath(file).name
    return name, PurePath(name.removesuffix(".gz")).stem


def _is_word(text: str, start: int, stop: int) -> bool:
    return not text[max(0, start - 1) : start].isalnum() and not text[stop : stop + 1].isalnum()


def _texts_of(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of everything that can be read in a file that is sent."""
    if path.suffix == ".parquet":
        yield from _shard_texts(path)
        return
    for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
        yield from (("a text", text) for text in _strings(_parsed(line, path)))


def _shard_texts(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as shard:
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
        for field in kind:
            yield from _column_texts(pyarrow.compute.struct_field(column, field.name))
    elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        yield from _column_texts(pyarrow.compute.list_flatten(column))
    else:
        yield from (str(value) for value in pyarrow.compute.unique(column).to_pylist() if value is not None)


def _strings(content: Any) -> Iterator[str]:
    """Every key and every string of parsed JSON."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from _strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value)


def _read_json(path: Path) -> dict[str, Any]:
    return _parsed(path.read_text(), path)


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is damaged: prepare the data again") from error


def dataset_card(folder: Path, hub_dataset_id: str) -> str:
    """`README.md` of the repository: what it is, how it was split, how to load it."""
    info, summary = _read_json(folder / "medsd.json"), _read_json(folder / "summary.json")
    return f"""---
{_front_matter(summary, hub_dataset_id)}---

# {hub_dataset_id.split("/")[-1]}

{_what(info, summary)}

**Not for clinical use.** For research on generative models and classifiers; no diagnosis may rest on it.

## Classes

{_counts(info, summary)}

## How it was made

{_how(info, summary)}

## Columns

{_columns(folder, summary)}

## Loading

```python
from medsd import load_dataset
train = load_dataset("{hub_dataset_id}", split="train")    # `image` is an array (C, H, W) in the source's unit

import datasets
train = datasets.load_dataset("{hub_dataset_id}", split="train")    # `image` is bytes, shape and dtype
```

With `streaming=True` both read as they go. `python recipes/finetune_unet.py --dataset_name {hub_dataset_id}` trains on it.
"""


def _front_matter(summary: dict[str, Any], hub_dataset_id: str) -> str:
    import yaml

    total = sum(summary["images"].values())
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    content = {
        "pretty_name": hub_dataset_id.split("/")[-1],
        "tags": ["medical", "medsd"],
        "task_categories": ["image-classification", "text-to-image"],
        "size_categories": [next((name for most, name in sizes.items() if total < most), "n>1M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in SPLITS if summary["images"][split]],
            }
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _what(info: dict[str, Any], summary: dict[str, Any]) -> str:
    images, patients = (sum(summary[name].values()) for name in ("images", "patients"))
    unit = "HU (CT)" if info["unit"] == "HU" else info["unit"]
    return (
        f"{images} medical images of {patients} patients, {info['resolution']} x {info['resolution']} px, {info['image_channels']}"
        f" channel(s), stored in the source's own unit: {unit}. For training they are mapped to [-1, 1] by the recorded intensity map:"
        f" `{json.dumps(info['intensity'])}`."
    )


def _counts(info: dict[str, Any], summary: dict[str, Any]) -> str:
    """A line per class, a column per split."""
    prompts = dict(zip(info["class_names"], info["prompts"], strict=True))
    names = list(next(iter(summary["classes"].values())))
    lines = [f"| class | prompt | {' | '.join(SPLITS)} |", "| --- | --- |" + " --- |" * len(SPLITS)]
    for name in names:
        counts = " | ".join(str(summary["classes"][split][name]) for split in SPLITS)
        lines.append(f"| {_cell(name)} | {_cell(prompts.get(name, ''))} | {counts} |")
    lines += [f"| {what} | | {' | '.join(str(summary[what][split]) for split in SPLITS)} |" for what in ("images", "patients")]
    several = "\n\nSeveral findings, or none, can hold in one image." if info["multi_label"] else ""
    return "\n".join(lines) + several


def _cell(text: str) -> str:
    """Text that stays within its cell, with tokens such as `<tumor>` seen rather than taken for HTML."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def _how(info: dict[str, Any], summary: dict[str, Any]) -> str:
    rules = ", ".join(f"{_cell(rule)} ({count} images)" for rule, count in summary["patient_rule"].items())
    pairs = sum(summary["duplicates"].values())
    lines = [
        "Prepared by medsd: longer side shrunk by area averaging, never enlarged; no intensity was clipped or rescaled.",
        f"Made square by `{info['resize']}`.",
        f"Split by patient: no patient is in two splits. Patients are known from: {rules}.",
        f"Pairs that look the same in two splits: {pairs}; images dropped for it: {summary['duplicates_dropped']}.",
        f"Files that could not be read: {summary['quarantined']}.",
        "Ids are salted hashes; of headers only age band, sex, scanner's maker and view were kept. Images that may have text burned"
        f" in, by what their headers say: {summary['burned_in_text_possible']}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _columns(folder: Path, summary: dict[str, Any]) -> str:
    import pyarrow.parquet

    first = next(iter(summary["shards"]))
    names = pyarrow.parquet.read_schema(folder / "data" / first).names
    return "\n".join(f"- `{name}`: {COLUMNS[name]}" if name in COLUMNS else f"- `{name}`" for name in names)
