"""CLIP's tokenizer without a download.

`clip_merges.txt.gz` holds the 48,894 byte-pair merges of OpenAI's CLIP, one a line, taken from its `bpe_simple_vocab_16e6.txt.gz`
(https://github.com/openai/CLIP, MIT licence, Copyright (c) 2021 OpenAI; the licence's text is in the NOTICE file).
"""

import gzip
from functools import cache
from importlib.resources import files

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 77
VOCABULARY_SIZE = 49408


@cache
def _merges() -> tuple[tuple[str, str], ...]:
    packed = (files("medsd.models") / "clip_merges.txt.gz").read_bytes()
    return tuple(tuple(line.split(" ")) for line in gzip.decompress(packed).decode().splitlines())


def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer of 77 tokens, padding with `pad_token`: Stable Diffusion 1.x pads with the end, 2.x with "!"."""
    letters = list(bytes_to_unicode().values())
    merges = list(_merges())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad_token, model_max_length=MAX_TOKENS)
