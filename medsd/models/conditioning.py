"""Prompts -> condition `(B, tokens, dim)`; class tokens added to a tokenizer and a text encoder."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AddedToken, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from medsd.errors import InputError
from medsd.models.presets import Preset
from medsd.randomness import Randomness, uniform

WHOLE_TABLE = 32
"""So many prompts are all encoded, whichever of them a batch needs; of more, those of the batch."""
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(texts: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """A small real CLIPTokenizer: every byte, and every word of `texts` as one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = dict.fromkeys(letters + [letter + "</w>" for letter in letters])
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for text in texts for word in text.lower().split()}):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for length in range(2, len(pieces) + 1):
            merges[("".join(pieces[: length - 1]), pieces[length - 1])] = None
            vocabulary["".join(pieces[:length])] = None
    tokens = [*vocabulary, START, END]
    return CLIPTokenizer({token: index for index, token in enumerate(tokens)}, list(merges), model_max_length=max_tokens)


def plain_words(texts: Sequence[str]) -> list[str]:
    """The different words of `texts` without digits and punctuation, which CLIP's tokenizer splits off words."""
    return sorted({word for text in texts for word in re.findall(r"[^\W\d_]+", text.lower())})


def replace_tokens(prompt: str, words: Mapping[str, str]) -> str:
    """The prompt with a word (or words) in place of each token of `words`."""
    for token, word in words.items():
        prompt = prompt.replace(token, word)
    return prompt


def longest(tokenizer: CLIPTokenizer, prompts: Sequence[str], tokens: Sequence[str]) -> int:
    """Tokens of the longest prompt, start and end included, once each of `tokens` is one token."""
    single = [replace_tokens(prompt, dict.fromkeys(tokens, "x")) for prompt in prompts]
    return max(len(ids) for ids in tokenizer(["", *single]).input_ids)


def build_text_encoder(preset: Preset, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIPTextModel of the preset's size with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.text_width,
        intermediate_size=4 * preset.text_width,
        num_hidden_layers=preset.text_layers,
        num_attention_heads=preset.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=1.0,
    )
    return CLIPTextModel(config)


def add_class_tokens(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, words: dict[str, str]) -> None:
    """Add each token of `words` (token -> its plain words) that is not there yet; its embedding starts as its words' mean."""
    new = [token for token in words if token not in tokenizer.get_vocab()]
    if not new:
        return
    table = text_encoder.get_input_embeddings().weight
    starts = [table[tokenizer(words[token], add_special_tokens=False).input_ids].mean(0).detach() for token in new]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in new])
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    set_embeddings(tokenizer, text_encoder, dict(zip(new, starts, strict=True)))


def set_embeddings(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, embeddings: dict[str, torch.Tensor]) -> None:
    """Write the embedding `(dim,)` of each token."""
    with torch.no_grad():
        for token, embedding in embeddings.items():
            text_encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)] = embedding


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids `(B, max_tokens)`, padded; raises InputError where a prompt is longer than the text encoder reads."""
    ids, most = tokenizer(list(prompts), padding="max_length", truncation=False).input_ids, tokenizer.model_max_length
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > most:
            shorter = "prepare the data with a shorter --prompt_template, or less in --prompt_metadata"
            raise InputError(f'the prompt "{prompt}" is {len(row)} tokens long, the text encoder reads {most}: {shorter}')
    return torch.tensor(ids)


def encode(text_encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    """Token ids `(B, tokens)` -> condition `(B, tokens, dim)`."""
    return text_encoder(ids)[0]


def encode_chosen(text_encoder: Any, table: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Condition `(B, tokens, dim)` of the prompts `chosen` `(B,)` from a table of token ids `(P, tokens)`.

    Where the table is long, only the prompts that occur are encoded, each once.
    """
    if len(table) <= max(WHOLE_TABLE, len(chosen)):
        return _pick(encode(text_encoder, table), chosen)
    occurring, place = chosen.unique(return_inverse=True)
    return _pick(encode(text_encoder, table[occurring]), place)


def _pick(conditions: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """`conditions[chosen]`, whose gradients are added in one order: those of plain indexing are added as its threads happen to come."""
    return torch.nn.functional.embedding(chosen, conditions.flatten(1)).unflatten(1, conditions.shape[1:])


def drop_prompts(prompts: torch.Tensor, empty: int, proportion: float, draws: Randomness) -> torch.Tensor:
    """Prompt numbers `(B,)`, `proportion` of them replaced by the `empty` one (Ho & Salimans, 2022)."""
    dropped = uniform(prompts.shape, draws) < proportion
    return torch.where(dropped, empty, prompts)


def train_only_tokens(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, tokens: Sequence[str]) -> None:
    """Freeze the text encoder but for the embeddings of `tokens`, if there are any.

    The table's attribute `learns` `(V, 1)` is 1 for their rows: the trainer multiplies its gradient by that.
    """
    text_encoder.requires_grad_(False)
    if tokens:
        weight = text_encoder.get_input_embeddings().weight.requires_grad_(True)
        weight.learns = torch.zeros(len(weight), 1)
        weight.learns[tokenizer.convert_tokens_to_ids(list(tokens))] = 1


@torch.no_grad()
def adopt_words(text_encoder: CLIPTextModel, old_tokenizer: CLIPTokenizer, new_tokenizer: CLIPTokenizer) -> None:
    """Give a text encoder the words of another tokenizer, all of which read as the empty prompt at first.

    Each token's embedding but the start's is the end's, which also pads: `encode` gives every prompt, bit for bit, what it gave the
    empty one before, and each token learns on its own from there. Embeddings of start and end go to the ids that the new tokenizer
    has for them; its longest prompt becomes the old one's, which is what the text encoder reads. Raises InputError where one of them
    pads with another token than the end.
    """
    check_padding(old_tokenizer)
    check_padding(new_tokenizer)
    table = text_encoder.get_input_embeddings().weight
    start, end = table[old_tokenizer.bos_token_id].clone(), table[old_tokenizer.eos_token_id].clone()
    table = text_encoder.resize_token_embeddings(len(new_tokenizer), mean_resizing=False).weight
    table.copy_(end)
    table[new_tokenizer.bos_token_id] = start
    new_tokenizer.model_max_length = old_tokenizer.model_max_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_encoder.config, name, getattr(new_tokenizer, name))
    text_encoder.eos_token_id = new_tokenizer.eos_token_id


def check_padding(tokenizer: CLIPTokenizer) -> None:
    """Raise InputError where the empty prompt is not a start and ends alone."""
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        raise InputError(
            f"this tokenizer pads with {tokenizer.pad_token} and ends with {tokenizer.eos_token}, so longer prompts cannot read as "
            "the empty one: start from a model that pads with its end token, as Stable Diffusion 1.x and the presets do"
        )
