"""The command `medsd`, or `python -m medsd`: the recipes for people who installed medsd without a checkout.

A wheel carries them in `medsd/_recipes`; an editable install has the repository's.
"""

import argparse
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from medsd import __version__
from medsd.commandline import USER_ERROR, or_exit
from medsd.errors import InputError

CARRIED = Path(__file__).with_name("_recipes")
CHECKOUT = Path(__file__).parents[1]
DOCUMENTED = Path("recipes")
"""The folder that documentation and messages name."""


def main(argv: Sequence[str] | None = None) -> None:
    """Do what the command line says; `argv` is without the program's name."""
    parser = argparse.ArgumentParser(prog="medsd", description="Fine-tune diffusion models on medical images, and classify with them.")
    parser.add_argument("--version", action="version", version=f"medsd {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    recipes = commands.add_parser("recipes", help="copy the recipes and their configs into a folder", description=copy_recipes.__doc__)
    recipes.add_argument("folder", metavar="DIR", type=Path, nargs="?", default=DOCUMENTED, help="absent or empty (default: %(default)s)")
    folder = parser.parse_args(argv).folder
    or_exit(lambda: copy_recipes(folder), USER_ERROR)


def copy_recipes(folder: Path) -> None:
    """Copy the recipes, their configs and the tested versions of what they need (constraints.txt), to be run and edited."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder: name one that is empty or not there yet")
    source, constraints = (CARRIED, CARRIED) if CARRIED.is_dir() else (CHECKOUT / "recipes", CHECKOUT)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, folder, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True)
    shutil.copyfile(constraints / "constraints.txt", folder / "constraints.txt")
    print(f"recipes in {folder}, and in {folder / 'configs'} what they were run with")
    if folder != DOCUMENTED:
        print(f"where a page or a message says recipes/, type {shlex.quote(str(folder))}/")
    print(f"next: accelerate launch {shlex.quote(str(folder / 'finetune_unet.py'))}")


if __name__ == "__main__":
    main()
