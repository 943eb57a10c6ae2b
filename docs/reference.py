"""The pages that are written when the site is built: the flags of each recipe, and the YAML files under recipes/configs.

A hook of mkdocs (`hooks:` in mkdocs.yml). A flag's meaning is the string literal below its field, as `--help` shows it.
"""

import ast
import html
import inspect
import re
import sys
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "recipes" / "configs"
CONFIG_LINK = re.compile(r"\((?:\.\./)+recipes/configs/([\w./]+)\)")
sys.path.insert(0, str(REPOSITORY))

from medsd.config import RECIPES, RecipeConfig  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for each recipe to the section Reference."""
    reference = next(section["Reference"] for section in config.nav if "Reference" in section)
    reference[:0] = [{f"{recipe.section}.py": page_of(recipe)} for recipe in RECIPES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Write the pages."""
    for recipe in RECIPES:
        files.append(File.generated(config, page_of(recipe), content=flag_page(recipe)))
    files.append(File.generated(config, "reference/configs.md", content=configs_page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to a YAML of the repository, which is not part of the site, to its place on the page of them all."""
    up = "../" * page.file.src_uri.count("/")
    return CONFIG_LINK.sub(lambda link: f"({up}reference/configs.md#{anchor_of(link[1])})", markdown)


def page_of(recipe: type[RecipeConfig]) -> str:
    """Where a recipe's page lies below docs."""
    return f"reference/{recipe.section}.md"


def flag_page(recipe: type[RecipeConfig]) -> str:
    """What the recipe does, the commands of its docstring, and a table of its flags."""
    script = (REPOSITORY / "recipes" / f"{recipe.section}.py").read_text()
    _, _, usage = ast.get_docstring(ast.parse(script)).partition("\n\n")
    commands = [line.strip() for line in usage.splitlines() if "recipes/" in line]
    meaning = meanings(recipe)
    rows = [
        f"| `--{field.name}` | {type_of(field.type)} | {default_of(field.default)} | {cell(meaning[field.name])} |"
        for field in fields(recipe)
    ]
    return "\n".join(
        [
            f"# {recipe.section}.py",
            "",
            f"{recipe.__doc__} Flags may stand in a YAML as well: `--config FILE.yaml` fills them from its section `{recipe.section}:`,",
            "and what is typed wins. A bare `--flag` is true, `--no_flag` false; several values follow a flag one after the other.",
            "`{name}` is the name of the YAML without its suffix, and `phantom` without one.",
            "",
            *(["```bash", *commands, "```", ""] if commands else []),
            "| flag | type | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


@cache
def meanings(recipe: type[RecipeConfig]) -> dict[str, str]:
    """The string literal below each field, of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(recipe.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for field, below in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def type_of(kind: Any) -> str:
    """A field's type in words: `str`, `one or more str`, the choices; without `or None`, which its default says."""
    named = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    if "Literal" in named:
        choices = re.findall(r"'?([\w.]+)'?", re.search(r"Literal\[([^\]]*)\]", named)[1])
        return ("several of " if "tuple" in named else "") + ", ".join(f"`{choice}`" for choice in choices)
    named = re.sub(r"tuple\[(\w+), \.\.\.\]", r"one or more \1", named.replace(" | None", ""))
    named = re.sub(r"tuple\[(\w+), \w+, \w+\]", r"three \1", named)
    return "switch" if named == "bool" else named


def default_of(value: Any) -> str:
    """A default as it is typed."""
    if value is MISSING:
        return "needed"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def cell(text: str) -> str:
    """Text that stays within its cell, with `<epidural>` seen rather than taken for HTML."""
    return html.escape(text, quote=False).replace("|", "\\|")


def configs_page() -> str:
    """Every YAML under recipes/configs, as it is."""
    paths = sorted(CONFIGS.glob("*.yaml")) + sorted(path for path in (CONFIGS / "accelerate").iterdir() if path.is_file())
    blocks = []
    for path in paths:
        name = path.relative_to(CONFIGS).as_posix()
        kind = "yaml" if path.suffix == ".yaml" else "bash"
        blocks += [f'<a id="{anchor_of(name)}"></a>', "", f"## {name}", "", f"```{kind}", path.read_text().rstrip(), "```", ""]
    head = "One YAML per documented result, as it lies in `recipes/configs`; its head says where to put the files and what to type."
    return "\n".join(["# Configs", "", head, "Those of `accelerate/` are ways to launch.", "", *blocks])


def anchor_of(name: str) -> str:
    """`accelerate/ddp.yaml` -> `config-accelerate-ddp-yaml`."""
    return "config-" + re.sub(r"\W+", "-", name)
