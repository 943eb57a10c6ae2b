"""Class names <-> class tokens <-> prompts.

A *class token* is the new tokenizer word that stands for a class (`<epidural>`); a *prompt* is the sentence with it.
"""

import re
from collections.abc import Mapping, Sequence

from medsd.data.metadata import PROMPT_METADATA
from medsd.errors import InputError

NO_FINDING = "no finding"
"""Words of a prompt whose image shows none of the findings."""


def class_token(name: str) -> str:
    """`"No Finding"` -> `"<no-finding>"`."""
    word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not word:
        raise InputError(f'class "{name}" has no letter or digit to make a class token of: rename it')
    return f"<{word}>"


def class_words(token: str) -> str:
    """The plain words of a class token: `"<no-finding>"` -> `"no finding"`."""
    return token.strip("<>").replace("-", " ")


def class_tokens(names: Sequence[str]) -> list[str]:
    """One token per class; raises InputError where two classes would share one."""
    tokens = [class_token(name) for name in names]
    doubles = sorted({token for token in tokens if tokens.count(token) > 1})
    if doubles:
        raise InputError(f"several classes share the class token {doubles[0]}: rename them")
    return tokens


def class_prompts(tokens: Sequence[str], template: str) -> list[str]:
    """One prompt per class: the template with its `{label}` replaced."""
    return [template.replace("{label}", token) for token in tokens]


def prompt_of(tokens: Sequence[str], template: str, facts: Mapping[str, str | None] | None = None) -> str:
    """The prompt of one image: all its findings, and what is known of `metadata.PROMPT_METADATA` in that order.

    `["<epidural>", "<subdural>"]`, `"a head CT with {label}"`, `{"age_band": "60-69", "sex": "female"}` ->
    `"a head CT with <epidural> and <subdural>, 60-69 years, female"`; no finding is `"a head CT with no finding"`.
    """
    words = [_fact_words(name, (facts or {}).get(name)) for name in PROMPT_METADATA]
    return ", ".join([template.replace("{label}", listed(tokens)), *filter(None, words)])


def listed(tokens: Sequence[str]) -> str:
    """`"a"`, `"a and b"`, `"a, b and c"`; `NO_FINDING` for none."""
    if len(tokens) < 2:
        return tokens[0] if tokens else NO_FINDING
    return f"{', '.join(tokens[:-1])} and {tokens[-1]}"


def _fact_words(name: str, value: str | None) -> str:
    """What a prompt says for a fact; nothing where it is unknown or says nothing."""
    if value is None or (name == "sex" and value not in {"female", "male"}):
        return ""
    return {"age_band": f"{value} years", "sex": value, "view": f"{value} view", "slice_position": f"{value} slice"}[name]
