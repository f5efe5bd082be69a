"""The report's charts, each a function from plain values to SVG markup. C classes, shares in 0..1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.findings import is_number
from trainer.svg import (
    BLUE,
    FONT_PX,
    GREEN,
    GREY,
    INK,
    LINE,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    SKY,
    VERMILLION,
    canvas,
    css_colour,
    percent_axis,
    plain_log_axis,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS_AS_SHAPES = 1200  # beyond, a scatter becomes a small picture inside the SVG: the page stays light
MAX_LABEL = 20
FAINTEST_CELL, FULLEST_CELL = 0.06, 0.55
"""Opacity of a confusion's cells: the ink on the fullest has a contrast of 4.5, in light and in dark."""

# Colour and marker of a head family: told apart without colour, too. A family of no look gets one of the spare ones.
FAMILY_LOOKS = {
    "own": (GREY, "P"),
    "crt": (BLUE, "o"),
    "balanced_softmax": (GREEN, "s"),
    "logit_adjustment": (ORANGE, "^"),
    "tau_norm": (VERMILLION, "D"),
    "nearest_class_mean": (PURPLE, "v"),
    "progressive": (SKY, "o"),
    "reweighted": (ORANGE, "s"),
    "logit_adjusted": (BLUE, "^"),
    "label_aware_smoothing": (GREEN, "D"),
    "over_smoothing": (VERMILLION, "v"),
    "lws": (PURPLE, "P"),
    "cosine": (SKY, "s"),
    "ldam_drw": (INK, "o"),
}
SPARE_LOOKS = ((SKY, "X"), (INK, "*"), (MUTED, "p"), (GREEN, "<"), (PURPLE, ">"))
MARKER_SIGNS = {
    "P": "✚",
    "o": "●",
    "s": "■",
    "^": "▲",
    "D": "◆",
    "v": "▼",
    "X": "✖",
    "*": "★",
    "p": "⬟",
    "<": "◀",
    ">": "▶",
}
LOG_KNOBS = ("lr", "weight_decay", "scale")


def recall_by_frequency(
    counts: Sequence[int], before: Sequence[float | None], after: Sequence[float | None], classes: Sequence[str]
) -> str:
    """Per-class recall against training images (log axis): ring before, dot after, joined; SVG markup."""
    figure, axes = canvas(400, 270)
    whole = [i for i, (low, high) in enumerate(zip(before, after, strict=True)) if is_number(low) and is_number(high)]
    seen = np.array([i for i in whole if counts[i] > 0], dtype=np.int64)
    x = np.array(counts, dtype=np.float64)[seen]
    low, high = (np.array([shares[i] for i in seen], dtype=np.float64) for shares in (before, after))
    colours = [VERMILLION if worse else BLUE for worse in high < low]
    as_pixels = len(seen) > MAX_POINTS_AS_SHAPES
    axes.vlines(x, low, high, colors=colours, alpha=0.55, linewidth=2.2, zorder=2, rasterized=as_pixels)
    axes.scatter(x, low, s=42, c=PAPER, edgecolors=GREY, linewidths=1.6, zorder=3, rasterized=as_pixels)
    axes.scatter(x, high, s=48, c=colours, linewidths=0, zorder=4, rasterized=as_pixels)
    # Names for the largest gain and the largest loss only: the table has them all.
    rise = high - low
    for place, rose in ((int(rise.argmax()), True), (int(rise.argmin()), False)) if len(seen) else ():
        if rise[place] > 0 if rose else rise[place] < 0:
            index = int(seen[place])
            _name_class(axes, index, counts, high[place], rose, classes[index])
    axes.set_xscale("log")
    _plain_counts(axes, counts)
    axes.set_ylim(-0.03, 1.03)
    percent_axis(axes.yaxis)
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("recall on test")
    return to_svg(figure, "recall", "Recall of each class against its number of training images, before and after")


def confusion(shares: np.ndarray, classes: Sequence[str], name: str) -> tuple[str, int]:
    """A confusion matrix, shares [C, C] of each true class; returns SVG markup and its natural width in pixels."""
    from matplotlib.patches import Rectangle

    size = len(classes)
    cell = float(np.clip(400 / size, 13, 42))
    labels = [_short(label) for label in classes]
    margin = 16 + 0.62 * FONT_PX * max(len(label) for label in labels)
    width, height = margin + size * cell + 6, 20 + size * cell + margin * 0.72
    figure, axes = canvas(width, height, chart=False)
    axes.set_position((margin / width, (margin * 0.72) / height, size * cell / width, size * cell / height))
    for row, column in np.ndindex(size, size):
        share = shares[row, column]
        if not share > 0:
            continue
        on_diagonal = row == column
        # Opacity, not lightness: the same picture reads on white and on black.
        colour, opacity = (BLUE if on_diagonal else VERMILLION), FAINTEST_CELL + (FULLEST_CELL - FAINTEST_CELL) * share
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, alpha=opacity, linewidth=0))
        if cell >= 22 and share >= 0.005:
            number = axes.text(column + 0.5, row + 0.52, f"{100 * share:.0f}", ha="center", va="center", color=INK)
            number.set_fontsize(FONT_PX)
    axes.set(xlim=(0, size), ylim=(size, 0))
    axes.set_xticks(np.arange(size) + 0.5, labels, rotation=50, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(np.arange(size) + 0.5, labels, parse_math=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(length=0, labelsize=min(FONT_PX, cell))
    axes.hlines(np.arange(size + 1), 0, size, color=LINE, linewidth=0.6)
    axes.vlines(np.arange(size + 1), 0, size, color=LINE, linewidth=0.6)
    axes.set_title("rows: true class · columns: predicted", fontsize=FONT_PX, color=MUTED, loc="left", pad=6)
    return to_svg(figure, f"confusion-{name}", f"Confusion matrix, {name}: share of each true class"), round(width)


def loss_curve(steps: Sequence[Mapping[str, Any]], classification: str) -> str:
    """Loss and its terms against the step; a running mean over the raw values.

    Args:
        steps: Log lines; their `cross_entropy` is the classification loss, whichever it was.
        classification: What that one is called.
    """
    figure, axes = canvas(310, 210)
    terms = (
        ("loss", "loss", INK, "-"),
        ("cross_entropy", classification, BLUE, "-"),
        ("metric_loss", "metric loss", ORANGE, "--"),
    )
    for key, label, colour, style in terms:
        points = [(line["step"], line[key]) for line in steps if is_number(line.get(key))]
        if not points or (key == "cross_entropy" and not any("metric_loss" in line for line in steps)):
            continue
        x, y = np.array(points, dtype=np.float64).T
        if len(x) > 40:
            axes.plot(x, y, color=colour, alpha=0.18, linewidth=1)
        axes.plot(x, _running_mean(y, max(1, len(y) // 40)), style, color=colour, label=label, linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    _legend(axes)
    return to_svg(figure, "loss", "Training loss and its terms against the step")


def validation_curve(
    epochs: Sequence[Mapping[str, Any]],
    select_by: str,
    baseline: Sequence[Mapping[str, Any]],
    kept_epoch: int | None,
) -> str:
    """Metrics on val an epoch; the kept epoch is ringed, the baseline's course is dotted.

    Args:
        epochs: Log lines of stage one; epochs count from 0 there and from 1 in the picture.
        select_by: Metric by which the epoch was chosen.
        baseline: Log lines of plain cross-entropy.
        kept_epoch: As in the log; None = not known.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = canvas(310, 210)
    looks = (
        ("balanced_accuracy", "balanced accuracy", BLUE, "-"),
        ("macro_f1", "macro F1", GREEN, "--"),
        ("worst_recall", "worst class", VERMILLION, "-."),
    )
    for key, label, colour, style in looks:
        points = [(line["epoch"] + 1, line[key]) for line in epochs if is_number(line.get(key))]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label, marker="o", markersize=3.5)
        if key == select_by and kept_epoch is not None:
            for place in (place for place in points if place[0] == kept_epoch + 1):
                _ring(axes, *place, colour)
    points = [(line["epoch"] + 1, line[select_by]) for line in baseline if is_number(line.get(select_by))]
    if points:
        axes.plot(*zip(*points, strict=True), ":", color=GREY, label="plain cross-entropy", linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 1)
    percent_axis(axes.yaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("on val")
    _legend(axes)
    return to_svg(figure, "validation", "Metrics on the validation split against the epoch")


def throughput_curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """Images per second against the step."""
    figure, axes = canvas(310, 210)
    points = [(line["step"], line["images_per_s"]) for line in steps if is_number(line.get("images_per_s"))]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.plot(x, y, color=GREEN, linewidth=1.6)
    axes.set_ylim(0, 1.12 * max(y, default=1))
    axes.set_xlabel("step")
    axes.set_ylabel("images per second")
    return to_svg(figure, "throughput", "Images per second against the step")


def search_by_family(
    search: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]], names: Mapping[str, str]
) -> str:
    """Score on val of every head, a row a family; the chosen head of each is ringed.

    Args:
        search: A row a head.
        chosen: Of those, the one of each family, best family first (`trainer.findings.best_per_family`).
        names: Of families, for people.
    """
    families = [head["family"] for head in chosen]
    figure, axes = canvas(400, 62 + 36 * len(families))
    spread = np.random.default_rng(0)
    for row, (family, head) in enumerate(zip(families, chosen, strict=True)):
        heads = [line for line in search if line["family"] == family and is_number(line["score"])]
        heights = row + spread.uniform(-0.27, 0.27, len(heads))
        _scatter(axes, np.array([line["score"] for line in heads]), heights, *_look(family, families))
        place = next(place for place, line in enumerate(heads) if line is head)
        _ring(axes, head["score"], heights[place], INK)
    axes.set_yticks(range(len(families)), [_short(names.get(family, family)) for family in families], parse_math=False)
    axes.set_ylim(len(families) - 0.45, -0.55)
    axes.grid(False, axis="y")
    percent_axis(axes.xaxis)
    axes.set_xlabel("score on val")
    return to_svg(figure, "families", "Score on the validation split of every head, by family")


def search_by_knob(search: Sequence[Mapping[str, Any]], knob: str, label: str, families: Sequence[str]) -> str:
    """Score on val against one knob, families told apart by colour and marker."""
    figure, axes = canvas(310, 210)
    for family in families:
        rows = [line for line in search if line["family"] == family and is_number(line["score"])]
        points = [(line[knob], line["score"]) for line in rows if is_number(line.get(knob))]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            _scatter(axes, x, y, *_look(family, families))
    if knob in LOG_KNOBS:
        plain_log_axis(axes)
    percent_axis(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("score on val")
    return to_svg(figure, f"knob-{knob}", f"Score on the validation split against {label}")


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, marker: str) -> None:
    as_pixels = len(x) > MAX_POINTS_AS_SHAPES
    axes.scatter(x, y, s=20, c=colour, marker=marker, alpha=0.55, linewidths=0, rasterized=as_pixels, zorder=3)


def _ring(axes: Axes, x: float, y: float, colour: str) -> None:
    axes.plot(x, y, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4)


def _look(family: str, families: Sequence[str]) -> tuple[str, str]:
    unknown = [name for name in families if name not in FAMILY_LOOKS]
    return FAMILY_LOOKS.get(family) or SPARE_LOOKS[unknown.index(family) % len(SPARE_LOOKS)]


def family_sign(family: str, families: Sequence[str]) -> tuple[str, str]:
    """CSS colour and character that stand for a family's marks in a legend."""
    colour, marker = _look(family, families)
    return css_colour(colour), MARKER_SIGNS[marker]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=FONT_PX - 0.5, labelcolor=MUTED, handlelength=1.6, borderaxespad=0.2)


def _name_class(axes: Axes, index: int, counts: Sequence[int], height: float, above: bool, name: str) -> None:
    """A class's name over or under its dot, set so that it stays within the picture."""
    present = [count for count in counts if count > 0]
    place = np.log(counts[index] / min(present)) / max(np.log(max(present) / min(present)), 1e-9)
    axes.annotate(
        _short(name),
        (counts[index], height),
        xytext=(0, 9 if above else -9),
        textcoords="offset points",
        ha="left" if place < 0.25 else "right" if place > 0.75 else "center",
        va="bottom" if above else "top",
        color=INK,
        fontsize=FONT_PX,
        zorder=5,
        parse_math=False,  # a class may be called "$x$"
    )


def _plain_counts(axes: Axes, counts: Sequence[int]) -> None:
    """1, 2, 5, 10, 20 ... within the counts, written as they are spoken."""
    from matplotlib.ticker import NullLocator

    present = [count for count in counts if count > 0] or [1]
    low, high = min(present) / 1.3, max(present) * 1.3
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [base * 10**power for power in range(9) for base in steps if low <= base * 10**power <= high]
    axes.set_xticks(ticks or present[:1], [f"{tick:,}" for tick in ticks or present[:1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over up to `width` values on both sides together, narrower at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"
