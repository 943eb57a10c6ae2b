"""The prompts of a data set's rows, by number: what training conditions on, and which stand against each other."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.hypotheses import Hypotheses
from medsd.data.prompts import class_token
from medsd.data.transforms import column, row_labels
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


def rival_prompts(rows: Any, table: PromptTable, data: DataInfo, hypotheses: Hypotheses) -> tuple[PromptTable, np.ndarray]:
    """The prompts that stand against each: those of the other hypotheses, with the same facts of the image.

    Returns the table with what prompts it lacked, before the empty one, and `(P, H - 1)` numbers; -1 where a prompt is of no hypothesis.
    """
    texts, numbers = hypotheses.prompts(data), hypotheses.numbers(row_labels(rows))
    first = dict(zip(*np.unique(table.numbers, return_index=True), strict=True))
    against: dict[str, list[str]] = {}
    for number, row in first.items():
        own, prompt = numbers[row], table.prompts[number]
        if own >= 0 and prompt.startswith(texts[own]):
            facts = prompt.removeprefix(texts[own])
            against[prompt] = [text + facts for other, text in enumerate(texts) if other != own]
    missing = sorted({rival for rivals in against.values() for rival in rivals} - set(table.prompts))
    prompts = [*table.prompts[:-1], *missing, ""]
    place = {prompt: number for number, prompt in reversed(list(enumerate(prompts)))}
    rivals = np.full((len(prompts), max(1, len(texts) - 1)), -1)
    for prompt, others in against.items():
        rivals[place[prompt]] = [place[other] for other in others]
    moved = np.array([place[prompt] for prompt in table.prompts])
    return replace(table, prompts=prompts, numbers=moved[table.numbers]), rivals
