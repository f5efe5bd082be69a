"""The page of a search: score against each setting, parallel coordinates, best so far against time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.heads import FAMILY_NAMES
from trainer.page import Section, document, duration, figure, percent, table, text
from trainer.svg import BLUE, GREY, INK, MUTED, VERMILLION, canvas, to_svg

if TYPE_CHECKING:
    from tuning.config import Config
    from tuning.trials_table import TrialRow

STATUS_LOOKS = {"done": (BLUE, "o"), "stopped": (GREY, "X"), "failed": (VERMILLION, "v")}


def search_page(config: Config, rows: Sequence[TrialRow], names: Sequence[str]) -> str:
    """The whole page; one self-contained HTML file without scripts.

    Args:
        config: The configuration that was searched around.
        rows: All trials.
        names: The searched settings.
    """
    from tuning.trials_table import best_trial

    best = best_trial(rows)
    judged = [row for row in rows if row.score is not None]
    metric = config.stage_two.select_by.replace("_", " ")
    lead = (
        f"<p>{len(rows)} trials; {sum(row.status == 'stopped' for row in rows)} were stopped early and "
        f"{sum(row.status == 'failed' for row in rows)} failed. Each is judged by the {text(metric)} on val of the "
        f"best of {config.search.heads} heads on its features. Test was not read.</p>"
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
            *(text(_short(row.choices.get(name))) for name in names),
        ]
        for row in sorted(rows, key=lambda row: -(row.score or -1.0))
    ]
    place = next(i for i, row in enumerate(sorted(rows, key=lambda row: -(row.score or -1.0))) if row is best)
    listing = table([*headings, *(text(name) for name in names)], cells, "Scores in percent, on val.", place)
    drawings = "".join(figure(_against(judged, name, metric), "", 420) for name in names if _numbers(judged, name))
    parts = [
        f"<header><h1>Search through both stages</h1>{lead}</header>",
        Section("best", "Best", "Best so far", figure(_best_so_far(judged, metric), "", 520)).markup(),
        Section("settings", "Settings", "Score against each setting", f'<div class="grid">{drawings}</div>').markup(),
        Section(
            "together", "Together", "All settings of each trial", figure(_parallel(judged, names), "", 720)
        ).markup(),
        Section("trials", "Trials", "Trials", listing).markup(),
    ]
    return document(f"Search: {config.data.name}", "\n".join(parts))


def _against(rows: Sequence[TrialRow], name: str, metric: str) -> str:
    drawing, axes = canvas(310, 210)
    values = _numbers(rows, name)
    for status, (colour, marker) in STATUS_LOOKS.items():
        points = [(x, 100 * (row.score or 0)) for row, x in zip(rows, values, strict=True) if row.status == status]
        x, y = np.array(points).reshape(-1, 2).T
        axes.scatter(x, y, s=26, c=colour, marker=marker, alpha=0.7, linewidths=0, zorder=3)
    if min(values) > 0 and max(values) / min(values) > 20:
        axes.set_xscale("log")
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


def _parallel(rows: Sequence[TrialRow], names: Sequence[str]) -> str:
    """A line a trial through its place on each axis; the better the score the darker the line."""
    drawing, axes = canvas(700, 260)
    columns = {name: _places([row.choices.get(name) for row in rows]) for name in names}
    columns["score"] = _places([row.score for row in rows])
    order = np.argsort(columns["score"][0])
    for i in order:
        strength = columns["score"][0][i]
        heights = [places[i] for places, _, _ in columns.values()]
        axes.plot(range(len(heights)), heights, color=BLUE, alpha=0.12 + 0.7 * strength**2, linewidth=1 + strength)
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], parse_math=False)
    axes.set_yticks([])
    for x, (_, low, high) in enumerate(columns.values()):
        axes.annotate(low, (x, 0), xytext=(4, -2), textcoords="offset points", color=MUTED, fontsize=9, va="top")
        axes.annotate(high, (x, 1), xytext=(4, 2), textcoords="offset points", color=INK, fontsize=9, va="bottom")
    axes.set_ylim(-0.12, 1.12)
    return to_svg(drawing, "parallel", "All settings and the score of each trial")


def _places(values: list[Any]) -> tuple[np.ndarray, str, str]:
    """Where each value stands on its axis, 0..1, by the logarithm where it spans much; and the axis's ends."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, dtype=np.float64)
        ends = _short(float(numbers.min())), _short(float(numbers.max()))
        if numbers.min() > 0 and numbers.max() / numbers.min() > 20:
            numbers = np.log(numbers)
        return (numbers - numbers.min()) / max(float(np.ptp(numbers)), 1e-12), *ends
    kinds = sorted({str(value) for value in values})
    places = np.array([kinds.index(str(value)) for value in values]) / max(1, len(kinds) - 1)
    return places, kinds[0], kinds[-1]


def _numbers(rows: Sequence[TrialRow], name: str) -> list[float]:
    """A setting's values; empty where they are no numbers."""
    values = [row.choices.get(name) for row in rows]
    return values if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) else []  # type: ignore[return-value]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
