"""Class names <-> class tokens <-> prompts.

A *class token* is the new tokenizer word that stands for a class (`<epidural>`); a *prompt* is the sentence with it.
"""

import re
from collections.abc import Sequence

from medsd.errors import InputError


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
