"""A prepared data folder -> a data set repository on the Hugging Face Hub.

Only files that medsd wrote travel, and only after none of the ids and names that `DATA.private` holds was found in them. All
of it becomes visible in one commit, so a repository is never half a data set. *Sent*: shards, `medsd.json`, `summary.json`,
`duplicates.jsonl`, `quarantine.jsonl` and a card. The contact sheet stays: it is for whoever decides whether to send.
"""

import json
from pathlib import Path, PurePath
from typing import Any

from medsd.errors import InputError
from medsd.hub.contents import read_json
from medsd.hub.markdown import CARD, SPLITS, cell, counts, patient_rules, table
from medsd.hub.privacy import Parcel, Secrets, scan, stamps
from medsd.hub.upload import Target, upload

TEXTS = ("medsd.json", "summary.json", "duplicates.jsonl", "quarantine.jsonl")
STAYS = "contact_sheet.png"
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


def push_dataset(folder: Path, hub_dataset_id: str, private: bool = True, confirm_public_data: bool = False) -> str:
    """Create or update the data set repository `user/name`, and return its URL.

    Raises InputError for a folder that prepare did not write or that holds other files, for an id or a name of `DATA.private`
    in what would be sent, for a public repository where a private one is wanted or nobody confirmed it, and where the Hub refuses.
    """
    check_public(private, confirm_public_data)
    parcel = parcel_of(folder, hub_dataset_id)
    before = stamps(parcel)
    check_privacy(folder, parcel)
    target = Target(hub_dataset_id, "--hub_dataset_id", "dataset", private)
    return upload(parcel, target, lambda path: path.startswith("data/"), "Upload data prepared by medsd", before)


def check_public(private: bool, confirmed: bool) -> None:
    """Raise InputError for data of patients on its way to everybody, unless somebody answers for it."""
    if not private and not confirmed:
        raise InputError("a public data set needs --confirm_public_data: look at contact_sheet.png and summary.json first")


def parcel_of(folder: Path, hub_dataset_id: str) -> Parcel:
    """What is sent of a prepared folder, and its card."""
    return {path: folder / path for path in files_to_send(folder)} | {CARD: dataset_card(folder, hub_dataset_id).encode()}


def check_privacy(folder: Path, parcel: Parcel) -> None:
    """Raise InputError where a file to be sent holds what only `DATA.private` may hold; see `medsd.hub.privacy`."""
    secrets = Secrets.of(folder, read_json(folder / "medsd.json")["class_names"])
    scan(parcel, secrets, "look whether a label, a prompt or a class names patients or files, and prepare the data again")


def files_to_send(folder: Path) -> list[str]:
    """Paths below the folder that travel: shards first. Hidden files stay; anything else that medsd did not write is refused."""
    missing = next((name for name in TEXTS if not (folder / name).is_file()), None)
    if missing is not None:
        raise InputError(f"{folder} has no {missing}: name a folder that prepare_data.py wrote")
    shards = [f"data/{name}" for name in sorted(read_json(folder / "summary.json")["shards"])]
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()}
    visible = {path for path in found if not any(part.startswith(".") for part in PurePath(path).parts)}
    foreign = sorted(visible - {*shards, *TEXTS, STAYS})
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]}, which medsd did not write: move it away; nothing was sent")
    lost = next((path for path in shards if path not in found), None)
    if lost is not None:
        raise InputError(f"{folder} has no {lost}, which its summary.json names: prepare the data again")
    return [*shards, *TEXTS]


def dataset_card(folder: Path, hub_dataset_id: str) -> str:
    """`README.md` of the repository: what it is, how it was split, how to load it."""
    info, summary = read_json(folder / "medsd.json"), read_json(folder / "summary.json")
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
    prompts = {cell(name): cell(prompt) for name, prompt in zip(info["class_names"], info["prompts"], strict=True)}
    classes, totals = counts(summary)
    rows = [[name, prompts.get(name, ""), *numbers] for name, *numbers in classes] + [[name, "", *numbers] for name, *numbers in totals]
    several = "\n\nSeveral findings, or none, can hold in one image." if info["multi_label"] else ""
    return table(["class", "prompt", *SPLITS], rows) + several


def _how(info: dict[str, Any], summary: dict[str, Any]) -> str:
    pairs = sum(summary["duplicates"].values())
    lines = [
        "Prepared by medsd: longer side shrunk by area averaging, never enlarged; no intensity was clipped or rescaled.",
        f"Made square by `{info['resize']}`.",
        f"Split by patient: no patient is in two splits. Patients are known from: {patient_rules(summary)}.",
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
