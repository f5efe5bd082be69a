"""The page of `rarelens report A B`: two runs side by side, as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.compare import Comparison, Side
from trainer.findings import Gain, commonest_first, verdict
from trainer.page import (
    MINUS,
    Column,
    Columns,
    Section,
    breakable,
    change,
    definitions,
    document,
    known_span,
    move_track,
    percent,
    scale_ends,
    signed_points,
    table,
    text,
    write_page,
)
from trainer.results_section import FIGURE_NAMES, signed_with_interval

MAX_ROWS = 60  # classes in the table; of more, the rarest are shown
HEADLINES = {"gain": "B is better", "loss": "A is better", "open": "no difference that chance would not give"}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page, whole or not at all."""
    write_page(render(comparison), path)


def render(found: Comparison) -> str:
    """The page as a string of HTML."""
    sections = [_figures(found), _classes(found), _settings(found), _runs(found)]
    links = "".join(f'<a href="#{section.anchor}">{section.link}</a>' for section in sections)
    parts = [_header(found), f"<nav>{links}</nav>", *(section.markup() for section in sections)]
    return document(f"{found.a.name} and {found.b.name}", "\n".join(parts))


def headline(found: Comparison) -> str:
    """The difference of balanced accuracy in words; plain text."""
    gain = found.figures["balanced_accuracy"]
    low, high = gain["interval"]
    return (
        f"balanced accuracy, B - A: {signed_points(gain['value'])} points (95 % interval {signed_points(low)} to "
        f"{signed_points(high)}): {HEADLINES[verdict(Gain(gain['value'], (low, high)))]}"
    )


def _header(found: Comparison) -> str:
    gain = found.figures["balanced_accuracy"]
    outcome = HEADLINES[verdict(Gain(gain["value"], tuple(gain["interval"])))]
    warnings = []
    for letter, side in (("A", found.a), ("B", found.b)):
        if side.test_reads > 1:
            warnings.append(f"Test was read {side.test_reads} times in {letter}: its figures may be too good.")
    if found.a.fingerprint != found.b.fingerprint:
        warnings.append(
            "The runs have different packed datasets. Their test images have the same names, labels and groups; make "
            "sure that they are the same pictures."
        )
    a, b = (percent(row["balanced_accuracy"]) for row in found.rows)
    return "\n".join(
        [
            '<header><p class="eyebrow">rarelens · two runs</p>',
            f"<h1>{text(found.a.name)} (A) and {text(found.b.name)} (B): {outcome}</h1>",
            f'<p class="lead">Balanced accuracy on test: A {a} %, B {b} %. In {text(headline(found))}.</p>',
            f"<p>Measured on the same {sum(found.test_counts):,} test images of {found.groups:,} groups.</p>",
            *(f'<div class="warning" role="note">{warning}</div>' for warning in warnings),
            "</header>",
        ]
    )


def _figures(found: Comparison) -> Section:
    rows = []
    for figure, title in FIGURE_NAMES.items():
        if figure in found.figures:
            sides = [
                f"{percent(row[figure])}<small>{known_span(row['intervals'].get(figure))}</small>" for row in found.rows
            ]
            rows.append([title, signed_with_interval(found.figures[figure]), *sides])
    note = (
        "In percent, differences in points; small: 95 % intervals over groups. Both models see the same resamples, so "
        "that the intervals of differences are paired; bold where 0 is not in them. They hold each training run fixed: "
        "another seed would move both."
    )
    return Section("figures", "Figures", "Figures on test", table(["figure", f"B {MINUS} A", "A", "B"], rows, note))


def _classes(found: Comparison) -> Section:
    order = commonest_first(found.train_counts)
    shown = order[-MAX_ROWS:]
    a, b = found.recall
    rows = [
        [
            breakable(found.classes[label]),
            f"{found.train_counts[label]:,}",
            f"{found.test_counts[label]:,}",
            move_track(a[label], b[label]),
            *(
                f"{percent(recall[label], 0)}<small>{known_span(intervals[label], 0)}</small>"
                for recall, intervals in zip(found.recall, found.recall_intervals, strict=True)
            ),
            f"{change(a[label], b[label])}<small>{_ends(found.recall_differences[label])}</small>",
        ]
        for label in shown
    ]
    columns: Columns = ["class", Column("train", spare=True), Column("test", spare=True)]
    columns += [Column(f"recall{scale_ends(0, 1)}", spare=True), "A", "B", f"B {MINUS} A"]
    left_out = f" The {len(shown)} rarest of {len(order)} classes are listed." if len(shown) < len(order) else ""
    note = f"Recall in percent, ring A, dot B; small: 95 % intervals, of the differences paired.{left_out}"
    return Section("classes", "Classes", "Recall of each class", table(columns, rows, note))


def _settings(found: Comparison) -> Section:
    rows = [[f"<code>{text(key)}</code>", text(_shown(a)), text(_shown(b))] for key, a, b in found.settings]
    columns: Columns = [Column("setting"), Column("A", left=True), Column("B", left=True)]
    same = "<p>Nothing: the runs have the same configuration.</p>"
    return Section("settings", "Settings", "What differs in their settings", table(columns, rows) if rows else same)


def _runs(found: Comparison) -> Section:
    items = [(letter, _described(side)) for letter, side in (("A", found.a), ("B", found.b))]
    return Section("runs", "Runs", "The runs", definitions(items))


def _described(side: Side) -> str:
    return f"{text(side.uri)}: {text(side.described)}; dataset <code>{text(side.fingerprint)}</code>"


def _ends(interval: Any) -> str:
    low, high = interval
    return "" if low is None or high is None else f"{signed_points(low)} to {signed_points(high)}"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
