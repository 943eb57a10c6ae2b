"""Pieces of a page that runs: an image that was generated, an image's answer, what a model is. HTML that needs `app.css` around it.

Pictures are in the page itself, so that none is left in a file.
"""

import re
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

import medsd
from medsd.data.export import Origin, png_texts
from medsd.data.intensity import IntensityMap, Range, Recorded, Windows
from medsd.inference.evidence import Evidence
from medsd.inference.pictures import overlay, picture
from medsd.inference.pipeline import MedSDPipeline
from medsd.inference.scoring import ClassifyOutput
from medsd.models.codec import PixelCodec
from medsd.report.tables import facts_table

MOMENTS = 8
"""Of the way from noise to image."""
THUMBNAIL = 160
"""Pixels of a moment's side, at most."""
SETTLED, NEARLY = 0.01, 0.1
"""Probabilities that endless pairs would put another class first, below which an answer is called so."""
VISIBLE = 0.01
"""Width of an interval that is drawn."""
LONGEST_NAME = 40
"""Letters of a class or a prompt in the name of a file."""
NOTHING = "none of the findings"
EXPLANATION = (
    "A diffusion model that draws images, and tells classes apart by which one's prompt lets it predict noise best "
    "(the Diffusion Classifier, Li et al., ICCV 2023). What it draws is synthetic and shows nobody. Dropped files are read in a process "
    "of their own, and deleted."
)
WARNING = '<p class="medsd-warning" role="note"><strong>Not for clinical use.</strong> Research software.</p>'


def stylesheet() -> str:
    """`app.css`."""
    return (files("medsd.report") / "app.css").read_text(encoding="ascii")


def alert(words: str) -> str:
    """What went wrong, as text."""
    return f'<p class="medsd-alert" role="alert">{escape(words)}</p>'


def address(view: Image.Image, **options: Any) -> str:
    """A picture as the address of a PNG file within the page."""
    file = BytesIO()
    view.save(file, "PNG", **options)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode('ascii')}"


def shown(view: Image.Image, alt: str, caption: str) -> str:
    """A picture over its caption, which is HTML; small pictures are enlarged."""
    return (
        f'<figure class="medsd-picture"><img src="{address(view)}" alt="{escape(alt)}" style="aspect-ratio: {view.width} / {view.height}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def generated(unit: torch.Tensor, frames: torch.Tensor, origin: Origin) -> str:
    """An image `(C, H, W)` in `[-1, 1]` with the file to save, and moments of its way from noise, of frames `(F, C, H, W)`."""
    view, named = picture(unit), re.sub(r"\W+", "_", origin.class_name or "image")[:LONGEST_NAME]
    file = address(view, pnginfo=png_texts(origin.texts()))
    link = f'<a download="{named}_seed{origin.seed}.png" href="{file}">Save as PNG</a>'
    caption = f"Synthetic, it shows nobody: {escape(origin.described())}. {link}"
    return shown(view, f"Synthetic image, {origin.described()}", caption) + strip(frames)


def strip(frames: torch.Tensor) -> str:
    """Moments of frames `(F, C, H, W)` in `[-1, 1]`, side by side."""
    places = np.unique(np.linspace(0, len(frames) - 1, MOMENTS).round().astype(int)).tolist()
    moments = [picture(frames[place]) for place in places]
    for moment in moments:
        moment.thumbnail((THUMBNAIL * moment.width // moment.height, THUMBNAIL))
    named = ["noise", *map(str, range(2, len(moments))), "image"][-len(moments) :]
    tiles = (
        f'<li><img src="{address(moment)}" alt="moment {number} of {len(moments)}"><span>{name}</span></li>'
        for number, (moment, name) in enumerate(zip(moments, named, strict=True), 1)
    )
    return f'<h3 class="medsd-heading">From noise to image</h3><ol class="medsd-strip">{"".join(tiles)}</ol>'


def in_words(name: str) -> str:
    """A class, or a set of findings."""
    return name.replace("|", " and ") or NOTHING


def rivals(output: ClassifyOutput) -> tuple[str, str]:
    """Names of the two most probable hypotheses of the first image."""
    first, second = output.posterior.probabilities[0].argsort()[::-1][:2]
    return output.hypotheses[first], output.hypotheses[second]


def answer(output: ClassifyOutput, names: Sequence[str], evidence: Evidence, before: str, remarks: Sequence[str], most_rows: int) -> str:
    """What is said of the first image: its class, each class's probability with its interval, where that comes from, and how sure it is.

    `names` of K classes, or of prompts; `before` says which image it is.
    """
    verdict = f'<p class="medsd-verdict">{escape(before)} <strong>{escape(in_words(output.predictions[0]))}</strong></p>'
    trust = [calibration_in_words(output.calibrated), stability_in_words(float(output.p_flip[0]))]
    cost = f"{output.rows[0]:,} of at most {most_rows:,} rows (a row is one class and one timestep with its noise through the UNet)."
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*trust, *remarks, cost])
    return f'{verdict}{bars(names, output.probabilities[0], output.intervals[0])}<ul class="medsd-lines">{lines}</ul>{witness(evidence)}'


def bars(names: Sequence[str], probabilities: np.ndarray, intervals: np.ndarray) -> str:
    """Probabilities `(K,)` as bars, the largest first, with lines for their intervals `(K, 2)`."""
    lines = []
    for place in np.argsort(-probabilities, kind="stable"):
        value, (low, high) = float(probabilities[place]), intervals[place].tolist()
        whisker = f'<b style="left: {low:.2%}; width: {high - low:.2%}"></b>' if high - low > VISIBLE else ""
        told = f"<span>{value:.3f} <small>[{low:.3f}, {high:.3f}]</small></span>"
        lines.append(
            f'<li><span>{escape(names[place])}</span>{told}<div aria-hidden="true"><i style="width: {value:.2%}"></i>{whisker}</div></li>'
        )
    note = "Lines: where endless computing would put the probability, in 95 of 100 cases; not whether the model is right."
    return f'<ul class="medsd-bars">{"".join(lines)}</ul><p class="medsd-note">{note}</p>'


def calibration_in_words(calibrated: bool) -> str:
    """What the probabilities are worth."""
    if calibrated:
        return "Calibrated on validation images: of images like those, about 80 of 100 answers that were given 0.8 are right."
    return "Not calibrated: take the order of the classes, not their numbers, which are far too sure."


def stability_in_words(p_flip: float) -> str:
    """What more computing would change."""
    share = f"{100 * p_flip:.0f} %" if p_flip >= SETTLED else "less than 1 %"
    what = f"with probability {share} endless computing would put another class first"
    if p_flip < SETTLED:
        return f"The answer is settled: {what}."
    return f"The answer is {'nearly settled' if p_flip < NEARLY else 'not settled'}: {what}."


def witness(evidence: Evidence) -> str:
    """The image under its evidence map."""
    own, other = in_words(evidence.class_name), in_words(evidence.against)
    view, words = overlay(evidence.image, evidence.map), f"Red speaks for {own}, blue for {other}"
    caption = f"{escape(words)}: {evidence.map.sum():.3g} nats in all. It is where the two prompts differ, not where a disease is."
    return shown(view, f"Evidence map. {words}.", caption)


def seen(pipe: MedSDPipeline, image: np.ndarray, ranges: np.ndarray | None, caption: str) -> str:
    """An image `(C, R, R)` in the source's unit as the model sees it."""
    return shown(picture(torch.from_numpy(pipe.unit_image(image, ranges))), "The image as the model sees it", escape(caption))


def about(pipe: MedSDPipeline) -> str:
    """What the model is."""
    data, kept = pipe.data, pipe.info.calibration
    kind = "findings, of which several or none can hold" if data.multi_label else "classes"
    channels = "1 channel" if data.image_channels == 1 else f"{data.image_channels} channels"
    facts = {
        kind.capitalize(): ", ".join(data.class_names) or "none: it takes prompts",
        "Image": f"{data.resolution} x {data.resolution} px, {channels}, in {data.unit}",
        "Brightness": brightness(data.intensity_map),
        "Data": f"fingerprint {data.fingerprint[:12]}" if data.fingerprint else "not prepared by medsd",
        "Learnt from": f"{sum(pipe.info.hypotheses.counts):,} training images" if pipe.info.hypotheses else "unknown",
        "Diffuses": "pixels" if isinstance(pipe.codec, PixelCodec) else f"latents of {type(pipe.vae).__name__}",
        "Parameters of the UNet": sum(weight.numel() for weight in pipe.unet.parameters()),
        "Probabilities": f"calibrated, {kept.source}" if kept else "not calibrated",
        "Software": f"medsd {medsd.__version__}",
    }
    return f'<div class="medsd-facts"><p>{EXPLANATION}</p>{facts_table("The model", facts)}</div>'


def brightness(intensity: IntensityMap) -> str:
    """What the model sees of an image's values."""
    match intensity:
        case Windows():
            return "windows " + ", ".join(f"{centre:g}/{width:g}" for centre, width in intensity.windows) + " (centre/width, HU)"
        case Range():
            return f"{intensity.low:g} to {intensity.high:g}"
        case Recorded():
            return "by the window in each header" if intensity.rule == "voi" else "by percentiles of each series or volume"
    return "by channel"
