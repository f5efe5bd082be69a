"""The page of a search: score against each setting, parallel coordinates, best so far against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.heads import FAMILY_NAMES
from trainer.page import Section, document, duration, figure, percent, table, text
from trainer.svg import BLUE, GREY, INK, VERMILLION, canvas, plain_log_axis, to_svg
from tuning.settings import search_space, short_value

if TYPE_CHECKING:
    from tuning.config import Config, Range
    from tuning.trials_table import TrialRow

PARALLEL_PX = 900
CHARACTER_PX = 5.5
LABELS_CHARACTERS = 42
"""So many stand side by side below a small picture."""
STATUS_LOOKS = {"done": (BLUE, "o"), "stopped": (GREY, "X"), "failed": (VERMILLION, "v")}
LOOKS = (
    "<p>Blue dots are trials that were trained to the end, grey crosses those that were stopped early, red triangles "
    "those that failed after they had been judged.</p>"
)


def search_page(config: Config, rows: Sequence[TrialRow], names: Sequence[str]) -> str:
    """The whole page; one self-contained HTML file without scripts.

    Args:
        config: The configuration that was searched around.
        rows: All trials.
        names: The searched settings.
    """
    from tuning.trials_table import best_trial, said_of_luck

    best = best_trial(rows)
    judged = [row for row in rows if row.score is not None]
    metric = config.stage_two.select_by.replace("_", " ")
    lead = (
        f"<p>{len(rows)} trials; {sum(row.status == 'stopped' for row in rows)} were stopped early and "
        f"{sum(row.status == 'failed' for row in rows)} failed. Each is judged by the {text(metric)} on val of the "
        f"best of {config.search.heads} heads on its features. Test was not read. {text(said_of_luck(rows))}</p>"
    )
    headings: list[Any] = ["trial", "status", "epochs", "score", "own classifier", "lower bound", "head"]
    cells = [
        [
            text(row.trial),
            row.status,
            str(row.epochs),
            percent(row.score),
            percent(row.own),
            percent(row.lower_bound),
            text(FAMILY_NAMES.get(row.family or "", row.family or "")),
            *(text(short_value(row.choices.get(name))) for name in names),
        ]
        for row in sorted(rows, key=lambda row: -(row.score or -1.0))
    ]
    place = next(i for i, row in enumerate(sorted(rows, key=lambda row: -(row.score or -1.0))) if row is best)
    listing = table([*headings, *(text(name) for name in names)], cells, "Scores in percent, on val.", place)
    space = {name: search_space(config).get(name) for name in names}
    drawings = "".join(figure(_against(judged, name, metric, wanted), "", 420) for name, wanted in space.items())
    against = f'{LOOKS}<div class="grid">{drawings}</div>'
    together = figure(_parallel(judged, space), "", 920)
    parts = [
        f"<header><h1>Search through both stages</h1>{lead}</header>",
        Section("best", "Best", "Best so far", figure(_best_so_far(judged, metric), "", 520)).markup(),
        Section("settings", "Settings", "Score against each setting", against).markup(),
        Section("together", "Together", "All settings of each trial", together).markup(),
        Section("trials", "Trials", "Trials", listing).markup(),
    ]
    return document(f"Search: {config.data.name}", "\n".join(parts))


@dataclass(frozen=True)
class _Scale:
    """How the values of a setting are placed along an axis: numbers as they are, anything else by its level.

    Attributes:
        levels: Texts of the values, in order; empty for numbers.
        logarithmic: Numbers by their logarithm.
    """

    levels: tuple[str, ...]
    logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[Any], wanted: Range | None) -> _Scale:
        """For these values of a setting that was searched so."""
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return cls((), bool(wanted and wanted.log_uniform))
        return cls(tuple(sorted({short_value(value) for value in values})), False)

    def numbers(self, values: Sequence[Any]) -> np.ndarray:
        """[N], float64."""
        if self.levels:
            return np.array([self.levels.index(short_value(value)) for value in values], dtype=np.float64)
        return np.array(values, dtype=np.float64)

    def shares(self, values: Sequence[Any]) -> np.ndarray:
        """[N], between 0 and 1."""
        numbers = np.log(self.numbers(values)) if self.logarithmic else self.numbers(values)
        return (numbers - numbers.min()) / max(float(np.ptp(numbers)), 1e-12)

    def ticks(self, values: Sequence[Any]) -> list[tuple[float, str]]:
        """Share and text of each level, or of the smallest and the largest number."""
        if self.levels:
            return [(i / max(1, len(self.levels) - 1), level) for i, level in enumerate(self.levels)]
        return [(0.0, short_value(min(values))), (1.0, short_value(max(values)))]


def _against(rows: Sequence[TrialRow], name: str, metric: str, wanted: Range | None) -> str:
    drawing, axes = canvas(310, 210)
    values = [row.choices.get(name) for row in rows]
    scale = _Scale.of(values, wanted)
    numbers, scores = scale.numbers(values), np.array([100 * (row.score or 0.0) for row in rows])
    for status, (colour, marker) in STATUS_LOOKS.items():
        ours = np.array([row.status == status for row in rows], dtype=bool)
        axes.scatter(numbers[ours], scores[ours], s=26, c=colour, marker=marker, alpha=0.7, linewidths=0, zorder=3)
    if scale.levels:
        room = max(6, LABELS_CHARACTERS // len(scale.levels))
        labels = [_cut(level, room) for level in scale.levels]
        axes.set_xticks(range(len(labels)), labels, parse_math=False)
        axes.set_xlim(-0.5, len(scale.levels) - 0.5)
    elif scale.logarithmic:
        plain_log_axis(axes)
    axes.set_xlabel(name, parse_math=False)
    axes.set_ylabel(f"{metric}, %")
    return to_svg(drawing, f"setting-{name.replace('.', '-')}", f"Score on val against {text(name)}")


def _best_so_far(rows: Sequence[TrialRow], metric: str) -> str:
    drawing, axes = canvas(500, 230)
    said = sorted((line["at_s"], line["score"]) for row in rows for line in row.lines if "at_s" in line)
    if said:
        times, scores = np.array(said).T
        axes.plot(times / 60, 100 * scores, "o", color=GREY, markersize=4, alpha=0.6)
        axes.step(times / 60, 100 * np.maximum.accumulate(scores), where="post", color=BLUE, linewidth=2)
        axes.set_xlabel(f"minutes of {duration(float(times.max()))}")
    axes.set_ylabel(f"{metric}, %")
    return to_svg(drawing, "best-so-far", "Best score on val so far against time")


def _parallel(rows: Sequence[TrialRow], space: Mapping[str, Range | None]) -> str:
    """A line a trial through its place on each axis; the better the score the darker the line."""
    drawing, axes = canvas(PARALLEL_PX, 280)
    columns: dict[str, list[Any]] = {name: [row.choices.get(name) for row in rows] for name in space}
    columns["score"] = [row.score for row in rows]
    scales = [_Scale.of(values, space.get(name)) for name, values in columns.items()]
    places = np.stack([scale.shares(values) for scale, values in zip(scales, columns.values(), strict=True)])
    for i in np.argsort(places[-1]):
        strength = places[-1, i]
        axes.plot(places[:, i], color=BLUE, alpha=0.12 + 0.7 * strength**2, linewidth=1 + strength)
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], parse_math=False)
    axes.set_yticks([])
    axes.set_ylim(-0.15, 1.15)
    room = int(PARALLEL_PX / len(columns) / CHARACTER_PX)
    for x, (scale, values) in enumerate(zip(scales, columns.values(), strict=True)):
        for share, said in scale.ticks(values):
            place: dict[str, Any] = {
                "xytext": (4, -10 if share == 0 else 4),
                "textcoords": "offset points",
                "parse_math": False,
            }
            axes.annotate(_cut(said, room), (x, share), color=INK, fontsize=9, **place)
    return to_svg(drawing, "parallel", "All settings and the score of each trial")


def _cut(said: str, length: int) -> str:
    return said if len(said) <= length else f"{said[: max(1, length - 1)]}\N{HORIZONTAL ELLIPSIS}"
