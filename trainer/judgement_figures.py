"""The report's pictures of how a model judges: the map of its features, its reliability. SVG markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.calibration import Bins, Calibration
from trainer.page import text
from trainer.projection import EmbeddingMap
from trainer.svg import (
    BLUE,
    FONT_PX,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    canvas,
    css_colour,
    percent_axis,
    to_svg,
)

COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK)
SHAPES = (
    ("●", "M-4,0a4,4 0 1 0 8,0a4,4 0 1 0 -8,0z"),
    ("■", "M-3.5,-3.5h7v7h-7z"),
    ("▲", "M0,-4.4L4.4,3.4H-4.4z"),
    ("◆", "M0,-4.8L4.8,0L0,4.8L-4.8,0z"),
    ("▼", "M0,4.4L4.4,-3.4H-4.4z"),
    ("✚", "M-1.4,-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z"),
)
"""Sign in the legend, outline on the map around (0, 0)."""
MAX_LOOKS = len(COLOURS) * len(SHAPES)
"""7 and 6 have no common factor: so many classes pass before a colour meets the same shape again."""
UNNAMED, UNNAMED_LOOK = -1, (GREY, 0)
HOLLOW = ' class="w"'
MAP_WIDTH_PX, MAP_HEIGHT_PX, MARGIN_PX = 560, 420, 8


def class_looks(classes: Sequence[int]) -> dict[int, tuple[str, int]]:
    """Colour and number of the shape of each class, no two alike; told apart without colour, too."""
    return {
        label: (COLOURS[place % len(COLOURS)], place % len(SHAPES)) for place, label in enumerate(classes[:MAX_LOOKS])
    }


def look_sign(look: tuple[str, int]) -> tuple[str, str]:
    """CSS colour and character of a look, for a legend."""
    return css_colour(look[0]), SHAPES[look[1]][0]


def map_of_features(points: EmbeddingMap, classes: Sequence[str], looks: Mapping[int, tuple[str, int]]) -> str:
    """The map: a mark a test image, hollow where the model is wrong; hovering tells the class.

    Written by hand, since matplotlib gives a mark no title.
    """
    width, height = max(points.x), max(points.y)
    scale = min((MAP_WIDTH_PX - 2 * MARGIN_PX) / max(width, 1e-9), (MAP_HEIGHT_PX - 2 * MARGIN_PX) / max(height, 1e-9))
    left = (MAP_WIDTH_PX - scale * width) / 2
    marks: dict[int, list[str]] = {label: [] for label in (UNNAMED, *looks)}  # what is named lies above the rest
    for x, y, label, predicted in zip(points.x, points.y, points.labels, points.predicted, strict=True):
        wrong = predicted != label
        said = text(classes[label]) + (f", taken for {text(classes[predicted])}" if wrong else "")
        _, shape = looks.get(label, UNNAMED_LOOK)
        marks[label if label in looks else UNNAMED].append(
            f'<use href="#map-{shape}" x="{left + scale * x:.1f}" y="{MARGIN_PX + scale * y:.1f}"'
            f"{HOLLOW if wrong else ''}><title>{said}</title></use>"
        )
    shapes = "".join(f'<path id="map-{number}" d="{outline}"/>' for number, (_, outline) in enumerate(SHAPES))
    groups = []
    for label, drawn in marks.items():
        colour = css_colour(looks.get(label, UNNAMED_LOOK)[0])
        groups.append(f'<g fill="{colour}" stroke="{colour}">{"".join(drawn)}</g>')
    return (
        '<svg role="img" class="map" aria-label="Map of the test images by their features, coloured by class" '
        f'viewBox="0 0 {MAP_WIDTH_PX} {scale * height + 2 * MARGIN_PX:.0f}" xmlns="http://www.w3.org/2000/svg">'
        f"<defs>{shapes}</defs>{''.join(groups)}</svg>"
    )


def reliability_diagram(calibration: Calibration) -> str:
    """Accuracy against confidence, before the temperature (rings) and after it (dots on their intervals)."""
    figure, axes = canvas(360, 300)
    axes.plot([0, 1], [0, 1], ":", color=MUTED, linewidth=1.2)
    axes.text(0.03, 0.09, "as sure as right", color=MUTED, fontsize=FONT_PX - 1, rotation=38, rotation_mode="anchor")
    before, after = calibration.before, calibration.after
    axes.plot(before.confidence, before.accuracy, "-", color=GREY, linewidth=1, alpha=0.6, zorder=2)
    areas = _areas(before)
    axes.scatter(before.confidence, before.accuracy, s=areas, c=PAPER, edgecolors=GREY, linewidths=1.5, zorder=3)
    low, high = ([ends[side] for ends in after.intervals] for side in (0, 1))
    axes.vlines(after.confidence, low, high, colors=BLUE, linewidth=2, alpha=0.45, zorder=4)
    axes.scatter(after.confidence, after.accuracy, s=_areas(after), c=BLUE, linewidths=0, zorder=5)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for axis in (axes.xaxis, axes.yaxis):
        percent_axis(axis)
    axes.set_xlabel("how sure the model is")
    axes.set_ylabel("how often it is right")
    return to_svg(figure, "reliability", "Accuracy against confidence, before and after the temperature")


def _areas(bins: Bins) -> list[float]:
    """Marks as large as their share of the samples, and none too small to be seen."""
    total = max(sum(bins.samples), 1)
    return [18 + 260 * samples / total for samples in bins.samples]
