"""The files beside the code name the version and the tools that are really used."""

import re

import yaml

from medsd import __version__
from tests.conftest import REPOSITORY


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", "Apache-2.0")
    assert citation["version"] == __version__


def test_the_changelog_tells_of_this_version():
    versions = re.findall(r"^## \[(.+?)\] - (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0][0] == __version__


def test_hooks_run_the_tested_linter():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pinned = re.search(r"^ruff==.+$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[0]
    assert [hook["additional_dependencies"] for hook in hooks if "ruff" in hook["id"]] == [[pinned], [pinned]]


def test_links_and_tests_that_are_named_are_there():
    for page in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (REPOSITORY / page).read_text()
        named = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r"`(tests/\w+\.py)`", text)
        assert all((REPOSITORY / name).is_file() for name in named)
