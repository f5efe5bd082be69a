"""The forest plot of a study: balanced accuracy of each method with its interval and its seeds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from trainer.svg import BLUE, FONT_PX, GREEN, GREY, INK, MUTED, ORANGE, PAPER, VERMILLION, canvas

if TYPE_CHECKING:
    from tuning.study_table import StudyTable

WIDTH_PX = 760
ROW_PX = 22
FRAME_PX = 90
FIGURES = ("balanced_accuracy", "balanced_accuracy_low", "balanced_accuracy_high")
COLOURS = (GREY, ORANGE, GREEN, BLUE, VERMILLION)
"""Of the kinds of methods, in their order."""


def forest(table: StudyTable, dataset: str) -> str:
    """A picture of its own, as SVG."""
    from matplotlib import rc_context

    from tuning.study_methods import KINDS

    rows = table.rows
    drawing, axes = canvas(WIDTH_PX, FRAME_PX + ROW_PX * len(rows))
    for place, row in enumerate(rows):
        colour = COLOURS[KINDS.index(row["kind"])]
        value, low, high = (100 * row[name] for name in FIGURES)
        axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", zorder=2)
        axes.plot(value, place, "s", color=colour, markersize=6, zorder=4)
        of_seeds = [100 * line["balanced_accuracy"] for line in table.seeds if line["name"] == row["name"]]
        axes.plot(of_seeds, [place] * len(of_seeds), "o", color=PAPER, markersize=4, markeredgecolor=INK, zorder=3)
    baseline = next(row for row in rows if row["description"] == table.baseline)
    axes.axvline(100 * baseline["balanced_accuracy"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(range(len(rows)), [row["description"] for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel("balanced accuracy on test, %; rings are seeds")
    axes.set_title(dataset, loc="left", fontsize=12, color=INK, parse_math=False)
    handles = [axes.plot([], [], "s-", color=colour)[0] for colour in COLOURS]
    present = [i for i, kind in enumerate(KINDS) if any(row["kind"] == kind for row in rows)]
    drawing.legend(
        [handles[i] for i in present],
        [KINDS[i] for i in present],
        loc="outside lower center",
        ncols=len(present),
        fontsize=FONT_PX,
        frameon=False,
    )
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": dataset, "font.family": "sans-serif"}):
        drawing.savefig(buffer, format="svg", facecolor=PAPER, metadata={"Date": None})
    return buffer.getvalue()
