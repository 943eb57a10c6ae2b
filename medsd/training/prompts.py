"""The prompts of a data set's rows, by number: what training conditions on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.prompts import class_token
from medsd.data.transforms import column
from medsd.models.conditioning import replace_tokens


@dataclass(frozen=True)
class PromptTable:
    """The different prompts of some rows, and which one each row has."""

    prompts: list[str]
    """The class prompts in the order of the classes, then the others that occur (sorted), then the empty one."""
    numbers: np.ndarray
    """`(N,)` place of each row's prompt in `prompts`."""


def row_prompts(rows: Any, data: DataInfo) -> PromptTable:
    """Prompts of a split in the words of `data`: with class tokens, with plain words in their place, or all empty without classes."""
    if not data.class_names:
        return PromptTable([""], np.zeros(len(rows), np.int64))
    stored = column(rows, "prompt").dictionary_encode().combine_chunks()
    words = {} if data.class_tokens else {class_token(name): name for name in data.class_names}
    occurring = [replace_tokens(prompt, words) for prompt in stored.dictionary.to_pylist()]
    prompts = [*data.prompts, *sorted(set(occurring) - {*data.prompts, ""}), ""]
    place = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    return PromptTable(prompts, np.array([place[prompt] for prompt in occurring], np.int64)[stored.indices.to_numpy()])
