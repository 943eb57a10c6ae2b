"""`report.html`: one page that needs nothing beside it, no network and no script, made from a run's `Material`.

Each figure is in it twice, for light and for dark screens, and a third time as `figures/NAME.png`; print takes the light one.
"""

from base64 import b64encode
from collections.abc import Callable, Iterator
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from string import Template

from PIL import Image

import medsd
from medsd.output import replacing, write_text, writing
from medsd.report import charts
from medsd.report.charts import Chart
from medsd.report.material import Material
from medsd.report.style import png, theme
from medsd.report.tables import Notes, classes_table, facts_table, numbers_table, utility_table

__all__ = ["Material", "write_report"]

Charts = Callable[[Material], Iterator[Chart]]
SECTIONS: dict[str, tuple[str, str, Charts]] = {
    "training": ("Training", "", charts.training),
    "images": ("Images", "", charts.grids),
    "denoising": ("From noise to image", "", charts.denoising),
    "features": ("Real and generated images", "", charts.features),
    "intensities": ("Intensities", "", charts.intensities),
    "classifier": ("Classifier", "", charts.ranking),
    "evidence": ("Evidence", "What speaks for a class is not where a disease is: it is where the two prompts differ.", charts.evidence),
    "subgroups": ("Subgroups", "", charts.subgroups),
    "data-size": ("How many patients it takes", "", charts.data_size),
    "audit": ("Copies of training images", "", charts.audit),
}
"""Anchor -> heading, a sentence beneath it, and its figures, in the page's order; facts and numbers go before, the environment after."""
CHART_DPI, PICTURE_DPI = 200, 300
WIDEST, QUALITY = 1080, 80
"""Pixels and WebP quality of pictures in the page: six classes of the worst of images, noise, stay under 6 MB. PNG files keep more."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="warn"><strong>Not for clinical use.</strong> Research software: no number here says that it is safe for a patient.</p>
<nav aria-label="Contents"><ul>$contents</ul></nav>
</header>
<main>
$sections
</main>
<footer><p>Written by medsd $version. Generated images show nobody. Not for clinical use.</p></footer>
</body>
</html>
""")


def write_report(folder: Path, material: Material) -> Path:
    """Write `folder/figures/NAME.png` and `folder/report.html`, whole or not at all; the page's path.

    Raises InputError where the folder cannot be written to.
    """
    sections, pictures = _sections(material)
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in sections)
    bodies = (f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>' for anchor, heading, body in sections)
    text = PAGE.substitute(
        title=escape(material.title),
        style=(files("medsd.report") / "page.css").read_text(encoding="ascii"),
        contents=links,
        sections="\n".join(bodies),
        version=escape(medsd.__version__),
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "figures") as made:
        for name, content in pictures.items():
            (made / f"{name}.png").write_bytes(content)
    write_text(folder / "report.html", text.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    return folder / "report.html"


def _sections(material: Material) -> tuple[list[tuple[str, str, str]], dict[str, bytes]]:
    """Anchor, heading and HTML of each section that has something in it, and the figures' PNG files by name."""
    notes, found, pictures = Notes(), [("facts", "What was trained on what", facts_table("The run", material.facts))], {}
    found.append(("numbers", "Numbers", _numbers(material, notes)))
    audit = numbers_table("Audit", material.audit, notes) if material.audit else _no_audit(material)
    for anchor, (heading, sentence, make) in SECTIONS.items():
        shown = []
        for chart in make(material):
            pictures[chart.name], figure = _figure(chart)
            shown.append(figure)
        before = audit if anchor == "audit" else ""
        body = before + (f'<div class="figures">{"".join(shown)}</div>' if shown else "")
        found.append((anchor, heading, f"<p>{escape(sentence)}</p>{body}" if sentence and body else body))
    found.append(("environment", "Environment", facts_table("Versions, machine and cost", material.environment)))
    found.append(("notes", "Why numbers are missing", notes.html()))
    return [section for section in found if section[2]], pictures


def _no_audit(material: Material) -> str:
    why = material.metrics.get("reasons", {}).get("audit")
    return f"<p>No audit: {escape(why)}</p>" if why else ""


def _numbers(material: Material, notes: Notes) -> str:
    """All of `metrics.json` that is a number, of the whole and by class."""
    whole = numbers_table("All images", material.metrics, notes)
    classes = classes_table("By class", material.metrics, material.class_names, notes)
    return whole + classes + utility_table("Tested on real images, learnt from", material.metrics, notes)


def _figure(chart: Chart) -> tuple[bytes, str]:
    """The light PNG file, and the HTML of both."""
    drawn = {}
    for name in ("light", "dark"):
        with theme(name):
            drawn[name] = png(chart.draw(), PICTURE_DPI if chart.picture else CHART_DPI)
    (light, width, height), (dark, _, _) = (_embedded(drawn[name], chart.picture) for name in ("light", "dark"))
    image = f'<img src="{light}" alt="{escape(chart.alt)}" width="{width}" height="{height}">'
    source = f'<source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
    kind, caption = "picture" if chart.picture else "chart", escape(chart.caption)
    return drawn["light"], (
        f'<figure id="figure-{chart.name}" class="{kind}"><picture>{source}{image}</picture><figcaption>{caption}</figcaption></figure>'
    )


def _embedded(drawn: bytes, lossy: bool) -> tuple[str, int, int]:
    """A PNG file as the address of a WebP file with the same pixels, or nearly and no more than `WIDEST` across; its width and height."""
    image, file = Image.open(BytesIO(drawn)).convert("RGB"), BytesIO()
    image.thumbnail((WIDEST, image.height), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", lossless=not lossy, quality=QUALITY)
    return f"data:image/webp;base64,{b64encode(file.getvalue()).decode('ascii')}", image.width, image.height
