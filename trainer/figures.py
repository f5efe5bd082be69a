"""The report's pictures: matplotlib draws them, inline SVG carries them.

Text stays text (it can be selected, searched and read aloud), and colours become the page's CSS variables, so that one
picture serves light, dark and print. One unit of a picture is one CSS pixel at its natural width.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.findings import is_number, row_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER, GREY = "#1b1f24", "#5d6670", "#e1e5e9", "#ffffff", "#87909a"
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7"
ROLES = {
    INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", GREY: "grey", BLUE: "blue", SKY: "sky", GREEN: "green",
    ORANGE: "orange", VERMILLION: "vermillion", PURPLE: "purple",
}  # fmt: skip
FONT_PX = 10.5
MAX_POINTS_AS_SHAPES = 1200  # beyond, a scatter becomes a small picture inside the SVG: the page stays light
MAX_LABEL = 20

# Colour and marker of a head family: told apart without colour, too.
FAMILY_LOOKS = {
    "own": (GREY, "P"),
    "crt": (BLUE, "o"),
    "balanced_softmax": (GREEN, "s"),
    "logit_adjustment": (ORANGE, "^"),
    "tau_norm": (VERMILLION, "D"),
    "nearest_class_mean": (PURPLE, "v"),
}
LOG_KNOBS = ("lr", "weight_decay")


def recall_by_frequency(
    counts: Sequence[int], before: Sequence[float | None], after: Sequence[float | None], classes: Sequence[str]
) -> str:
    """Per-class recall against training images (log axis): ring before, dot after, joined; SVG markup."""
    figure, axes = _canvas(460, 300)
    moved: list[tuple[float, int]] = []
    for index, (count, low, high) in enumerate(zip(counts, before, after, strict=True)):
        if not (is_number(low) and is_number(high) and count > 0) or low is None or high is None:
            continue
        colour = VERMILLION if high < low else BLUE
        axes.plot([count, count], [low, high], color=colour, alpha=0.55, linewidth=2.2, zorder=2)
        axes.plot(count, low, "o", markersize=6.5, markerfacecolor=PAPER, markeredgecolor=GREY, markeredgewidth=1.6)
        axes.plot(count, high, "o", markersize=7, color=colour, markeredgewidth=0, zorder=4)
        moved.append((high - low, index))
    # Names for the largest gain and the largest loss only: the table has them all.
    for difference, index in {max(moved), min(moved)} if moved else ():
        if difference:
            _name_beside(axes, counts[index], float(after[index] or 0), classes[index], counts)
    axes.set_xscale("log")
    _plain_counts(axes, counts)
    axes.set_ylim(-0.03, 1.03)
    _percent_axis(axes.yaxis)
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("recall on test")
    return _svg(figure, "recall", "Recall of each class against its number of training images, before and after")


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], name: str) -> tuple[str, int]:
    """A row-normalised confusion matrix; returns SVG markup and its natural width in pixels."""
    from matplotlib.patches import Rectangle

    shares = row_shares(counts)
    size = len(classes)
    cell = float(np.clip(430 / size, 13, 46))
    labels = [_short(label) for label in classes]
    margin = 16 + 0.62 * FONT_PX * max(len(label) for label in labels)
    width, height = margin + size * cell + 6, 22 + size * cell + margin * 0.78
    figure, axes = _canvas(width, height, grid=False)
    axes.set_position((margin / width, (margin * 0.78) / height, size * cell / width, size * cell / height))
    for row, column in np.ndindex(size, size):
        share = shares[row, column]
        if not share > 0:
            continue
        on_diagonal = row == column
        # Opacity, not lightness: the same picture reads on white and on black.
        colour, opacity = (BLUE if on_diagonal else VERMILLION), 0.06 + 0.9 * share
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, alpha=opacity, linewidth=0))
        if cell >= 22 and share >= 0.005:
            ink = PAPER if share > 0.55 else INK
            axes.text(column + 0.5, row + 0.52, f"{100 * share:.0f}", ha="center", va="center", color=ink, fontsize=FONT_PX)
    axes.set(xlim=(0, size), ylim=(size, 0))
    axes.set_xticks(np.arange(size) + 0.5, labels, rotation=50, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(size) + 0.5, labels)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(length=0, labelsize=min(FONT_PX, cell))
    axes.hlines(np.arange(size + 1), 0, size, color=LINE, linewidth=0.6)
    axes.vlines(np.arange(size + 1), 0, size, color=LINE, linewidth=0.6)
    axes.set_title("down: true class    across: predicted", fontsize=FONT_PX, color=MUTED, loc="left", pad=6)
    return _svg(figure, f"confusion-{name}", f"Confusion matrix, {name}: share of each true class"), round(width)


def loss_curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """Loss and its terms against the step; a running mean over the raw values."""
    figure, axes = _canvas(360, 240)
    terms = (("loss", "loss", INK, "-"), ("cross_entropy", "cross-entropy", BLUE, "-"), ("metric_loss", "metric", ORANGE, "--"))
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
    return _svg(figure, "loss", "Training loss and its terms against the step")


def validation_curve(epochs: Sequence[Mapping[str, Any]], select_by: str, baseline: Sequence[Mapping[str, Any]]) -> str:
    """Metrics on val an epoch; the chosen epoch is marked, the baseline's course is dotted."""
    figure, axes = _canvas(360, 240)
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
        if key == select_by:
            best = max(points, key=lambda point: point[1])
            axes.plot(*best, "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.4)
    points = [(line["epoch"] + 1, line[select_by]) for line in baseline if is_number(line.get(select_by))]
    if points:
        axes.plot(*zip(*points, strict=True), ":", color=GREY, label="plain cross-entropy", linewidth=1.8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 1)
    _percent_axis(axes.yaxis)
    axes.set_xlabel("epoch")
    axes.set_ylabel("on val")
    _legend(axes)
    return _svg(figure, "validation", "Metrics on the validation split against the epoch")


def throughput_curve(steps: Sequence[Mapping[str, Any]]) -> str:
    """Images per second against the step."""
    figure, axes = _canvas(360, 240)
    points = [(line["step"], line["images_per_s"]) for line in steps if is_number(line.get("images_per_s"))]
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    axes.plot(x, y, color=GREEN, linewidth=1.6)
    axes.set_ylim(0, 1.12 * max(y, default=1))
    axes.set_xlabel("step")
    axes.set_ylabel("images per second")
    return _svg(figure, "throughput", "Images per second against the step")


def search_by_family(search: Sequence[Mapping[str, Any]], families: Sequence[str], names: Mapping[str, str]) -> str:
    """Score on val of every head, a row a family, best family on top; the best head of each is ringed."""
    figure, axes = _canvas(460, 62 + 40 * len(families))
    spread = np.random.default_rng(0)
    for row, family in enumerate(families):
        colour, marker = _look(family, families)
        scores = np.array([line["score"] for line in search if line["family"] == family and is_number(line["score"])])
        _scatter(axes, scores, row + spread.uniform(-0.27, 0.27, len(scores)), colour, marker)
        axes.plot(scores.max(), row, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4)
    axes.set_yticks(range(len(families)), [_short(names.get(family, family)) for family in families])
    axes.set_ylim(len(families) - 0.45, -0.55)
    axes.grid(False, axis="y")
    _percent_axis(axes.xaxis)
    axes.set_xlabel("score on val")
    return _svg(figure, "families", "Score on the validation split of every head, by family")


def search_by_knob(search: Sequence[Mapping[str, Any]], knob: str, label: str, families: Sequence[str]) -> str:
    """Score on val against one knob, families told apart by colour and marker."""
    figure, axes = _canvas(320, 230)
    for family in families:
        rows = [line for line in search if line["family"] == family and is_number(line["score"])]
        points = [(line[knob], line["score"]) for line in rows if is_number(line.get(knob))]
        if points:
            _scatter(axes, *np.array(points, dtype=np.float64).T, *_look(family, families))
    if knob in LOG_KNOBS:
        axes.set_xscale("log")
    _percent_axis(axes.yaxis)
    axes.set_xlabel(label)
    axes.set_ylabel("score on val")
    return _svg(figure, f"knob-{knob}", f"Score on the validation split against {label}")


def _canvas(width_px: float, height_px: float, grid: bool = True) -> tuple[Figure, Axes]:
    """A figure of that size with one set of axes in the page's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout="constrained" if grid else None)
    axes = figure.add_subplot()
    axes.tick_params(colors=MUTED, labelsize=FONT_PX, width=0.8, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(grid and side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.8)
    axes.xaxis.label.set(color=MUTED, size=FONT_PX)
    axes.yaxis.label.set(color=MUTED, size=FONT_PX)
    if grid:
        axes.grid(True, color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def _scatter(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, marker: str) -> None:
    axes.scatter(
        x, y, s=20, c=colour, marker=marker, alpha=0.55, linewidths=0, rasterized=len(x) > MAX_POINTS_AS_SHAPES, zorder=3
    )


def _look(family: str, families: Sequence[str]) -> tuple[str, str]:
    spare = ((SKY, "X"), (INK, "*"), (MUTED, "p"), (GREEN, "<"), (PURPLE, ">"))
    unknown = [name for name in families if name not in FAMILY_LOOKS]
    return FAMILY_LOOKS.get(family) or spare[unknown.index(family) % len(spare)]


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=FONT_PX - 0.5, labelcolor=MUTED, handlelength=1.6, borderaxespad=0.2)


def _name_beside(axes: Axes, x: float, y: float, name: str, counts: Sequence[int]) -> None:
    """Names go towards the middle of the picture, where there is room."""
    to_right = x < np.sqrt(float(max(counts)) * max(1.0, float(min(counts))))
    axes.annotate(
        _short(name),
        (x, y),
        xytext=(8 if to_right else -8, 0),
        textcoords="offset points",
        ha="left" if to_right else "right",
        va="center",
        color=INK,
        fontsize=FONT_PX,
        zorder=5,
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


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over up to `width` values on both sides together, narrower at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + (width + 1) // 2, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}…"


def _svg(figure: Figure, name: str, description: str) -> str:
    """A figure as inline SVG: unique ids, the page's fonts and colours, nothing that points outside."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the glyphs, matplotlib need not
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[a-zA-Z][^>]*>", lambda tag: _tag(tag.group(), name), svg)
    return re.sub(r"\n\s*", "\n", svg).replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def _tag(tag: str, name: str) -> str:
    """One tag of matplotlib's SVG in the page's terms."""
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        assert box is not None
        return f'<svg {box.group()} xmlns="http://www.w3.org/2000/svg">'
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag).replace("url(#", f"url(#{name}-")
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r"font: ([\d. ]*px) [^;\"]*", r"font: \1 var(--sans)", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _variable(colour.group()), tag)


def _variable(colour: str) -> str:
    return f"var(--{ROLES[colour]})" if colour in ROLES else colour
