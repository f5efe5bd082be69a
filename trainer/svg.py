"""Matplotlib's drawings as inline SVG in the style of the report's page.

Text stays text (it can be selected, searched and read aloud), and colours become the page's CSS variables, so that one
picture serves light, dark and print. One unit of a picture is one CSS pixel at its natural width.
"""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER, GREY = "#1b1f24", "#5d6670", "#e1e5e9", "#ffffff", "#87909a"
# Okabe and Ito's palette, which colour-blind readers tell apart.
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    PAPER: "paper",
    GREY: "grey",
    BLUE: "blue",
    SKY: "sky",
    GREEN: "green",
    ORANGE: "orange",
    VERMILLION: "vermillion",
    PURPLE: "purple",
}
FONT_PX = 11.0


def canvas(width_px: float, height_px: float, chart: bool = True) -> tuple[Figure, Axes]:
    """A figure of that size and its axes: with two spines and a grid for a chart, bare and unplaced otherwise."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained" if chart else None)
    axes = figure.add_subplot()
    axes.tick_params(colors=MUTED, labelsize=FONT_PX, width=0.8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(chart and side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(MUTED)
        label.set_fontsize(FONT_PX)
    if chart:
        axes.grid(True, color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def percent_axis(axis: Axis) -> None:
    """Shares 0..1 written as percent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")


def plain_log_axis(axes: Axes) -> None:
    """A logarithmic x axis, its steps written as they are spoken; for axes that are drawn already."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,), numticks=6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def to_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as inline SVG that points to nothing outside of itself.

    Args:
        figure: What `canvas` gave.
        name: Prefix of all ids, unique in the page.
        description: For readers who do not see it.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the glyphs, matplotlib need not
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[a-zA-Z][^>]*>", lambda tag: _tag(tag.group(), name), svg)
    return re.sub(r"\n\s*", "\n", svg).replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def css_colour(colour: str) -> str:
    """`#0072b2` -> `var(--blue)`; colours that the page does not know stay as they are."""
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour


def _tag(tag: str, name: str) -> str:
    """One tag of matplotlib's SVG in the page's terms; what stands between tags, such as a class name, stays."""
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        assert box is not None
        return f'<svg {box.group()} xmlns="http://www.w3.org/2000/svg">'
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("xlink:href", "href").replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font: ([\d. ]*px) [^;\"]*", r"font: \1 var(--sans)", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: css_colour(colour.group()), tag)
