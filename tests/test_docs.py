"""Every command line that stands in the README, the docs, a YAML's head or a recipe's docstring parses."""

import ast
import os
import re
import shlex

import pytest

from medsd.commandline import parse
from medsd.config import RECIPES
from tests.conftest import REPOSITORY

SECTIONS = {recipe.section: recipe for recipe in RECIPES}
YAMLS = sorted((REPOSITORY / "recipes" / "configs").glob("*.yaml"))
SOURCES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")), *YAMLS, *sorted((REPOSITORY / "recipes").glob("*.py"))]


def commands():
    for source in SOURCES:
        text = ast.get_docstring(ast.parse(source.read_text())) if source.suffix == ".py" else source.read_text()
        text = re.sub(r"\\\n\s*#?", " ", text)
        for line in re.findall(r"(?:accelerate launch|python) (?:\S+/)?recipes/\w+\.py[^\n`&|]*", text):
            line = line.split("   ")[0]
            yield pytest.param(line, id=f"{source.name}: {line[:60]}")


@pytest.mark.parametrize("line", list(commands()))
def test_a_documented_command_parses(line, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line, comments=True)
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    assert (REPOSITORY / words[script]).is_file()
    parse(SECTIONS[words[script].split("/")[-1].removesuffix(".py")], words[script + 1 :])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_yaml_parses_in_every_recipe(path):
    for recipe in RECIPES:
        parse(recipe, ["--config", str(path)])


def test_the_readme_holds_the_two_commands():
    text = (REPOSITORY / "README.md").read_text()
    assert "pip install -c constraints.txt -e . && accelerate launch recipes/finetune_unet.py" in text
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in text


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (REPOSITORY / "README.md").read_text())
    assert pictures and all(os.path.isfile(REPOSITORY / picture) for picture in pictures)


def test_every_recipe_has_a_section():
    assert set(SECTIONS) == {path.stem for path in (REPOSITORY / "recipes").glob("*.py")}


def test_a_foreign_unet_classifies_as_the_docs_say():
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "classifier.md").read_text(), re.DOTALL)
    names = {}
    exec(next(block for block in blocks if "def predict" in block), names)
    assert names["probabilities"].shape == (12, 3)
    assert names["probabilities"].sum(1) == pytest.approx(1)
