"""The report's first section: every model of the run, and every figure of the chosen one with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.findings import ReportInputs
from trainer.page import (
    DASH,
    Column,
    Columns,
    Section,
    interval_track,
    known_span,
    percent,
    scale_ends,
    signed_points,
    span,
    table,
    text,
)

FIGURE_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "worst_recall": "worst class",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "accuracy": "accuracy<small>the common classes decide it</small>",
    "auc": "area under ROC<small>mean over classes</small>",
    "average_precision": "average precision<small>mean over classes</small>",
    "ece": "calibration error<small>less is better</small>",
    "recall_at_1": "recall@1<small>of embeddings</small>",
    "map_at_r": "MAP@R<small>of embeddings</small>",
}


def results(inputs: ReportInputs) -> Section:
    """The result table."""
    ends = [end for row in inputs.rows for end in row.interval]
    scale = (max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03))
    best = max(row.balanced_accuracy for row in inputs.rows)
    chosen = next(index for index, row in enumerate(inputs.rows) if row.name == inputs.winner)
    rows = []
    for index, row in enumerate(inputs.rows):
        weight = "strong" if row.balanced_accuracy == best else "span"
        shares = (row.macro_f1, row.worst_recall, row.many, row.medium, row.few, row.ece)
        rows.append(
            [
                f"{text(row.description)}<small>{text(row.detail)}</small>",
                f"<{weight}>{percent(row.balanced_accuracy)}</{weight}><small>{span(row.interval)}</small>",
                interval_track(row.balanced_accuracy, row.interval, scale, index == chosen),
                *(percent(share) for share in shares),
            ]
        )
    columns: Columns = ["model", "balanced accuracy<small>95 % interval</small>", scale_ends(*scale)]
    columns += [
        Column("macro F1", spare=True),
        "worst class",
        *(Column(name, spare=True) for name in ("many", "medium")),
    ]
    columns += ["few", Column("ECE", spare=True)]
    note = (
        "All figures in percent, on the test split. Balanced accuracy is the mean recall over classes; its interval is "
        f"a bootstrap over the {inputs.test_groups:,} groups, so images of one patient or lesion stay together. Many, "
        "medium, few: mean recall of the common, middle and rare classes. ECE: expected calibration error."
    )
    lead = (
        "<p>The highlighted row is the model that was chosen on val before test was read. It need not be the best row "
        "here; the best balanced accuracy is set in bold.</p>"
    )
    content = f"{lead}\n{table(columns, rows, note, chosen)}\n{_every_figure(inputs)}"
    return Section("results", "Results", "Results", content)


def _every_figure(inputs: ReportInputs) -> str:
    """Each figure before and after with its interval, and the paired differences; markup."""
    own, winner = inputs.row(inputs.own), inputs.row(inputs.winner)
    if not winner.intervals:
        return ""
    gains = [("change", inputs.gain), ("against<small>plain cross-entropy</small>", inputs.gain_over_baseline)]
    shown = [(title, gain.figures) for title, gain in gains if gain is not None and gain.figures]
    rows = []
    for name, title in FIGURE_NAMES.items():
        values = [
            f"{percent(getattr(row, name))}<small>{known_span(row.intervals.get(name))}</small>"
            for row in (own, winner)
        ]
        rows.append([title, *values, *(signed_with_interval(figures.get(name)) for _, figures in shown)])
    columns: Columns = ["figure", Column("before", spare=True), "after", *(title for title, _ in shown)]
    note = (
        "In percent, changes in points; small: the 95 % interval over groups. Both models see the same resamples, so "
        "that the intervals of changes are paired: a change whose interval holds 0 may be chance."
    )
    return f"<h3>Every figure with its interval</h3>{table(columns, rows, note)}"


def signed_with_interval(found: Mapping[str, Any] | None) -> str:
    """A difference (`value`, `interval`) of `trainer.result_table`: signed points, bold where chance is ruled out."""
    if found is None or found["value"] is None:
        return DASH
    low, high = found["interval"]
    if low is None or high is None:
        return signed_points(found["value"])
    weight, ends = "strong" if low > 0 or high < 0 else "span", f"{signed_points(low)} to {signed_points(high)}"
    return f"<{weight}>{signed_points(found['value'])}</{weight}><small>{ends}</small>"
