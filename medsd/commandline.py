"""A recipe's command line: `--config FILE.yaml` first and the flags after it, so flags win; errors as one line and an exit code.

The parser is imported here and nowhere else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TypeVar, get_type_hints

from medsd.config import PHANTOM, RECIPES, RULES_WAIT, RecipeConfig
from medsd.errors import InputError
from medsd.runtime import follow_launcher

USER_ERROR = 1
USAGE_ERROR = 2
INTERRUPTED = 130

Result = TypeVar("Result")
Config = TypeVar("Config", bound=RecipeConfig)


def parse(recipe: type[Config], argv: Sequence[str]) -> Config:
    """Recipe config from `--config FILE.yaml` and flags.

    Raises InputError for a mistake in the YAML or between fields; the parser itself exits with 2 for a flag it cannot read.
    """
    import tyro

    flags, path = _split_config_flag(argv)
    default = object.__new__(recipe)
    # Not initialised, since rules between fields hold for the YAML and the flags together, not for the YAML alone.
    default.__dict__.update(_defaults(recipe, path) | _section(recipe, path))
    if hasattr(recipe, "config"):
        default.config = str(path) if path else None
    description = f"{recipe.__doc__} --config FILE.yaml fills these fields from its section `{recipe.section}`; flags win."
    waiting = RULES_WAIT.set(True)
    try:
        config = tyro.cli(recipe, args=flags, default=default, description=description, use_underscores=True)
    finally:
        RULES_WAIT.reset(waiting)
    config.check()
    return config


def run(main: Callable[[Config], None], recipe: type[Config]) -> None:
    """Parse the command line and call `main`; end with one line and the contract's exit code where something is wrong."""
    follow_launcher()
    config = or_exit(lambda: parse(recipe, sys.argv[1:]), USAGE_ERROR)
    or_exit(lambda: main(config), USER_ERROR)


def or_exit(step: Callable[[], Result], code: int) -> Result:
    """What `step` gives; where a user can mend what went wrong, one line and an exit with `code`."""
    try:
        return step()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (InputError, OSError) as error:
        if os.environ.get("MEDSD_DEBUG") == "1":
            raise
        from tqdm import tqdm

        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)  # On a line of its own, not behind a bar.
        sys.exit(code)


def _split_config_flag(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config", type=Path)
    known, rest = flags.parse_known_args(argv)
    return rest, known.config


def _defaults(recipe: type[RecipeConfig], path: Path | None) -> dict[str, object]:
    """The fields' defaults, with the run's name in its folders."""
    name = path.stem if path else PHANTOM
    return {f.name: f.default.replace("{name}", name) if isinstance(f.default, str) else f.default for f in fields(recipe)}


def _section(recipe: type[RecipeConfig], path: Path | None) -> dict[str, object]:
    """The YAML's section of this recipe, checked field by field."""
    import yaml

    if path is None:
        return {}
    if not path.is_file():
        raise InputError(f"--config {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {error}") from error
    known = {config.section for config in RECIPES}
    if not isinstance(content, dict) or not content.keys() <= known:
        unknown = sorted(map(str, content.keys() - known)) if isinstance(content, dict) else content
        raise InputError(f"--config {path}: unknown section {unknown}; sections are {sorted(known)}")
    section = content.get(recipe.section) or {}
    if not isinstance(section, dict):
        raise InputError(f"--config {path}, section {recipe.section}: fields with values are expected")
    return {key: _checked(recipe, key, value, path) for key, value in section.items()}


def _checked(recipe: type[RecipeConfig], key: str, value: object, path: Path) -> object:
    """The YAML's value in the type of its field."""
    from pydantic import TypeAdapter, ValidationError

    types = get_type_hints(recipe)
    if isinstance(value, str) and "tuple" in str(types.get(key)):
        value = [value]
    if value == [] and "None" in str(types.get(key)):
        value = None  # Nothing is named, while the bare flag --prompt_metadata names everything.
    if key not in {field.name for field in fields(recipe)}:
        raise InputError(f"--config {path}, section {recipe.section}: unknown field {key}; --help lists them")
    try:
        return TypeAdapter(types[key]).validate_python(value)
    except ValidationError as error:
        raise InputError(f"--config {path}, section {recipe.section}, {key}: {error.errors()[0]['msg']}") from error
