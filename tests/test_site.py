"""The site builds without a warning, loads nothing from elsewhere, and leads nowhere that is not there."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from medsd.config import RECIPES
from tests.conftest import REPOSITORY

PAGES = sorted((REPOSITORY / "docs").rglob("*.md"))


class Page(HTMLParser):
    """What a page loads by itself, where it leads, and the places in it that can be led to."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.links, self.places = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        address = values.get("src") or values.get("href")
        if address and tag == "a":
            self.links.append(address)
        elif address and values.get("rel") != "canonical":
            self.loaded.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(REPOSITORY / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert {path.relative_to(REPOSITORY / "docs").with_suffix(".html").as_posix() for path in PAGES} < found.keys()
    return found


def html(site):
    return {name: Page(path.read_text()) for name, path in site.items() if name.endswith(".html") and name != "404.html"}


def test_nothing_is_loaded_from_elsewhere(site):
    for name, page in html(site).items():
        for address in page.loaded:
            parts = urlsplit(address)
            assert not parts.scheme and not parts.netloc, f"{name} loads {address}"
            assert (site[name].parent / unquote(parts.path)).is_file(), f"{name} loads {address}, which is not there"
    for name, path in site.items():
        if name.endswith(".css"):
            assert not re.search(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", path.read_text()), name


def test_every_link_leads_somewhere(site):
    pages = html(site)
    for name, page in pages.items():
        for address in page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (site[name].parent / unquote(parts.path)).resolve() if parts.path else site[name].resolve()
            found = next((other for other, path in site.items() if path.resolve() == target), None)
            assert found, f"{name} leads to {address}"
            assert not parts.fragment or unquote(parts.fragment) in pages[found].places, f"{name} leads to {address}"


def test_every_flag_is_in_the_reference(site):
    from dataclasses import fields

    for recipe in RECIPES:
        text = site[f"reference/{recipe.section}.html"].read_text()
        rows = re.findall(r"<td><code>--(\w+)</code></td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", text, re.DOTALL)
        assert [row[0] for row in rows] == [field.name for field in fields(recipe)]
        assert all(kind and meaning for _, kind, _, meaning in rows)


def test_the_python_reference_has_what_it_names(site):
    text = site["python.html"].read_text()
    for name in ("classify", "calibrate", "evidence", "counterfactual", "from_pretrained", "save_pretrained", "push_to_hub"):
        assert f'id="medsd.inference.pipeline.MedSDPipeline.{name}"' in text, name
    for name in ("load_dataset", "read_image", "ClassifyOutput", "denoising_error"):
        assert re.search(rf'id="medsd\.[\w.]+\.{name}"', text), name


@pytest.mark.parametrize("path", [REPOSITORY / "README.md", *PAGES], ids=lambda path: path.name)
def test_python_in_the_docs_compiles(path):
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE):
        compile(block, path.name, "exec")
