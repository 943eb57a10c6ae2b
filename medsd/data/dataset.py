"""A prepared data folder: its columns, its `medsd.json`, and how both are read back.

An image is stored as a struct of bytes, shape and dtype, because that keeps the source's own integers and reads fast.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.intensity import IntensityMap, intensity_from_dict
from medsd.data.metadata import FACT_COLUMNS
from medsd.data.splits import SPLITS
from medsd.errors import InputError

INFO_FILE = "medsd.json"
STREAM_BATCH = 64


@dataclass(frozen=True)
class DataInfo:
    """What a model must know of the data it was trained on: `medsd.json`."""

    class_names: list[str]
    prompts: list[str]
    """One prompt per class."""
    class_tokens: list[str]
    """New tokenizer words in the prompts, one per class; empty where classes are plain words."""
    intensity: dict[str, Any]
    resolution: int
    resize: str
    image_channels: int
    """Channels of the stored image, before the intensity map."""
    unit: str
    """Unit of stored values: HU or grey value."""
    fingerprint: str
    """sha256 over keys, labels, splits and pixels."""
    multi_label: bool = False
    """Whether several of the classes, or none, can hold in one image: then they are findings."""
    prompt_template: str | None = None
    """The prompt with `{label}` in place of what an image shows; None in data that was prepared before it was kept."""

    @property
    def intensity_map(self) -> IntensityMap:
        """The recorded map between the stored unit and `[-1, 1]`."""
        return intensity_from_dict(self.intensity)

    @property
    def channels(self) -> int:
        """Channels of an image in `[-1, 1]`."""
        return self.intensity_map.channels(self.image_channels)

    def with_words(self) -> "DataInfo":
        """The same data with plain words in place of class tokens, if there are any."""
        if not self.class_tokens:
            return self
        prompts = [
            prompt.replace(token, name) for prompt, token, name in zip(self.prompts, self.class_tokens, self.class_names, strict=True)
        ]
        return replace(self, prompts=prompts, class_tokens=[])

    def without_classes(self) -> "DataInfo":
        """The same data for an unconditional model."""
        return replace(self, class_names=[], prompts=[], class_tokens=[])

    def settings(self) -> dict[str, Any]:
        """What a training sees of the data: a run that is resumed has to see the same."""
        names = ("intensity", "image_channels", "resolution", "prompts")
        return {"data": self.fingerprint} | {f"data's {name}": getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def pack(image: np.ndarray) -> dict[str, Any]:
    """Array `(C, H, W)` -> the stored struct."""
    return {"bytes": np.ascontiguousarray(image).tobytes(), "shape": list(image.shape), "dtype": str(image.dtype)}


def unpack(stored: dict[str, Any]) -> np.ndarray:
    """The stored struct -> array `(C, H, W)`."""
    return np.frombuffer(stored["bytes"], dtype=stored["dtype"]).reshape(stored["shape"])


def data_features(class_names: list[str], multi_label: bool, with_mask: bool, with_range: bool) -> Any:
    """`datasets.Features` of a prepared folder.

    `labels` of 0 and 1 stand in place of `label` where several findings can hold; `intensity_range` `(C, 2)` is there where
    the intensity map is recorded per image.
    """
    from datasets import ClassLabel, Features, Image, List, Value

    array = {"bytes": Value("binary"), "shape": List(Value("int32")), "dtype": Value("string")}
    columns = {
        "key": Value("string"),
        "image": array,
        "preview": Image(),
        **({"labels": List(Value("int8"))} if multi_label else {"label": ClassLabel(names=class_names)}),
        "prompt": Value("string"),
        "patient_id": Value("string"),
        "series_id": Value("string"),
        "slice_index": Value("int32"),
        "pixel_spacing": List(Value("float32")),
        **{name: Value("string") for name in FACT_COLUMNS},
    }
    columns |= {"intensity_range": List(List(Value("float32")))} if with_range else {}
    return Features(columns | ({"mask": array} if with_mask else {}))


def load_info(folder_or_hub_id: str | Path) -> DataInfo:
    """`medsd.json` of a prepared folder or Hub data set."""
    path = Path(folder_or_hub_id) / INFO_FILE
    if not path.is_file():
        path = _download_info(str(folder_or_hub_id))
    try:
        return DataInfo(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder_or_hub_id} is no data folder (or a damaged one): name one that prepare_data.py wrote") from error


def load_dataset(folder_or_hub_id: str | Path, split: str | None = None, streaming: bool = False) -> Any:
    """Prepared data as `datasets` gives it, with `image` (and `mask`) decoded to arrays `(C, H, W)` in the source's unit.

    With `streaming`, an `IterableDataset` that reads shard after shard, from a folder or from the Hub, and keeps nothing; it has
    no `features`, so the class names are those of `load_info`.
    Raises InputError where the folder is not a prepared one, is damaged, or has no such split.
    """
    import datasets

    splits = available_splits(folder_or_hub_id)
    if split in SPLITS and split not in splits:
        hint = "prepare it with other --split_fractions, or with images for that split"
        raise InputError(f"{folder_or_hub_id} has no {split} split, only {', '.join(splits)}: {hint}")
    with _undamaged(folder_or_hub_id):
        loaded = datasets.load_dataset(str(folder_or_hub_id), split=split, streaming=streaming)
    return loaded.map(_decode, batched=True, batch_size=STREAM_BATCH) if streaming else loaded.with_transform(_decode)


def available_splits(folder_or_hub_id: str | Path) -> list[str]:
    """Splits the data has, in the order train, validation, test."""
    import datasets

    load_info(folder_or_hub_id)
    with _undamaged(folder_or_hub_id):
        names = datasets.get_dataset_split_names(str(folder_or_hub_id))
    return [split for split in SPLITS if split in names]


@contextmanager
def _undamaged(folder_or_hub_id: str | Path) -> Iterator[None]:
    """Turn what `datasets` raises for shards that it cannot read into an InputError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder_or_hub_id} cannot be read ({reason}): prepare it anew with --overwrite, or download it again") from error


def _decode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    there = [column for column in ("image", "mask") if column in batch]
    decoded = {column: [None if stored is None else unpack(stored) for stored in batch[column]] for column in there}
    return batch | decoded


def looks_like_hub_id(name: str) -> bool:
    """Whether `name` can be a Hub repository (`user/name`) rather than a path: its first part is no folder here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name.split("/")[0]).is_dir()


def _download_info(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    missing = f"{hub_id}: no prepared data there; make it with recipes/prepare_data.py (--config or --source, and --output_dir {hub_id})"
    if Path(hub_id).exists() or not looks_like_hub_id(hub_id):
        raise InputError(missing)
    try:
        return Path(hf_hub_download(hub_id, INFO_FILE, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(missing) from error
