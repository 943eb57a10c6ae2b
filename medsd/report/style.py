"""How figures look: one width, two themes, a palette that colour-blind readers can tell apart.

A figure is `WIDTH` inches wide, so that its letters are still 11 pixels tall where a phone shows it 360 pixels wide. It is made, and
saved, within `theme`; nothing here touches pyplot, so figures are closed by being forgotten.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from io import BytesIO
from itertools import islice
from math import log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 4.8
SMALL = 9
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#d5dae0", "muted": "#59636e"},
    "dark": {"paper": "#16191d", "ink": "#e6e9ec", "faint": "#3a4149", "muted": "#a3abb4"},
}
"""Colours of the page as well, see page.css."""
PALETTES = {
    "light": ("#0072b2", "#d55e00", "#009e73", "#b6568f", "#8a6d00", "#3593cf", "#555b62"),
    "dark": ("#56b4e9", "#f08c3a", "#2fc79a", "#e08fbf", "#e9d54a", "#7f9cff", "#c3c9cf"),
}
"""After Okabe and Ito (2008), each of enough contrast with its paper."""
LINES = ("-", "--", ":", "-.")


def theme(name: str = "light") -> AbstractContextManager:
    """Within, figures are made and saved in the colours of `light` or `dark`."""
    from cycler import cycler
    from matplotlib import rc_context

    colours = THEMES[name]
    ink = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    paper = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    faint = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color", "legend.edgecolor")
    return rc_context(
        {
            **dict.fromkeys(ink, colours["ink"]),
            **dict.fromkeys(paper, colours["paper"]),
            **dict.fromkeys(faint, colours["faint"]),
            "axes.prop_cycle": cycler(linestyle=LINES) * cycler(color=PALETTES[name]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.titlelocation": "left",
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 11,
            "legend.fontsize": SMALL,
            "legend.frameon": False,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "lines.linewidth": 1.8,
            "text.parse_math": False,
        }
    )


def canvas(height: float) -> "Figure":
    """An empty figure, `height` inches tall."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def axes_of(height: float, title: str) -> tuple["Figure", "Axes"]:
    """A figure of one plot."""
    figure = canvas(height)
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def series(count: int) -> list[dict[str, Any]]:
    """Colour and line style of `count` classes, models, ...: colours repeat after the palette, with another line."""
    from matplotlib import rcParams

    return list(islice(rcParams["axes.prop_cycle"](), count))


def ink(role: str = "ink") -> str:
    """The present theme's colour of letters (`ink`), of quiet letters (`muted`), of help lines (`faint`) or of the `paper`."""
    from matplotlib import rcParams

    return next(colours[role] for colours in THEMES.values() if colours["paper"] == rcParams["figure.facecolor"])


def readable(colour: Sequence[float]) -> str:
    """Letters on a colour `(r, g, b, ...)` in `[0, 1]`: the present ink or paper, whichever stands out more (WCAG 2.2, contrast ratio)."""
    from matplotlib.colors import to_rgb

    def light(rgb: Sequence[float]) -> float:
        linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb[:3])
        return 0.05 + sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    return max((ink(), ink("paper")), key=lambda letters: abs(log(light(to_rgb(letters)) / light(colour))))


def log_axis(axis: "Axis", between: Sequence[int] = (1, 2, 5)) -> None:
    """A logarithmic axis with plain numbers on it, at these multiples of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=between))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def png(figure: "Figure", dpi: int) -> bytes:
    """The figure as a PNG file, without white around it."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight", pad_inches=0.06)
    return file.getvalue()
