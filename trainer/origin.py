"""Where a result comes from and how far it reaches: the report's sections on data, making and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from trainer import gallery
from trainer.findings import FEW_TEST_IMAGES, ReportInputs, imbalance, rarest_last, thinly_tested, verdict
from trainer.page import Column, Columns, Section, breakable, definitions, duration, table, text

MAX_ROWS = 60  # classes in the table; of more, the rarest are shown
CONFLICTS_SHOWN = 10


def data(inputs: ReportInputs) -> Section:
    """Classes, splits, examples, and the audit as proof."""
    train, val, test = (inputs.class_counts[split] for split in ("train", "val", "test"))
    order = rarest_last(inputs)
    shown = order[-MAX_ROWS:]
    largest = max(*train, 1)
    rows = []
    for index in shown:
        bar = f'<span class="bar" style="width:{100 * train[index] / largest:.1f}%"></span>'
        rows.append([breakable(inputs.classes[index]), f"{train[index]:,}", bar, f"{val[index]:,}", f"{test[index]:,}"])
    rows.append(["all classes", f"{sum(train):,}", "", f"{sum(val):,}", f"{sum(test):,}"])
    columns: Columns = ["class", "train", Column('<span class="space"></span>', left=True), "val", "test"]
    lead = (
        f"<p>{len(inputs.classes)} classes; the commonest has {imbalance(train):,.0f} times as many training images as "
        f"the rarest.{_kept_apart(inputs.audit)}</p>"
    )
    note = f"The {len(shown)} rarest of {len(order)} classes." if len(shown) < len(order) else ""
    content = f"{lead}\n{table(columns, rows, note)}\n{gallery.examples(inputs)}\n{_audit(inputs.audit)}"
    return Section("data", "Data", "Data", content)


def making(inputs: ReportInputs) -> Section:
    """Timings, versions, configuration."""
    parts = []
    if inputs.timings:
        total = sum(inputs.timings.values())
        rows = []
        for step, seconds in inputs.timings.items():
            bar = f'<span class="bar" style="width:{100 * seconds / max(total, 1e-9):.1f}%"></span>'
            rows.append([text(step), duration(seconds), bar])
        columns: Columns = ["step", "time", Column('<span class="space"></span>', left=True)]
        parts.append(f"<h3>Time</h3>{table(columns, [*rows, ['all steps', duration(total), '']])}")
    if inputs.versions:
        versions = [(name, text(version)) for name, version in inputs.versions.items()]
        parts.append(f"<h3>Versions</h3>{definitions(versions)}")
    dump = yaml.safe_dump(_plain(inputs.config), sort_keys=False, allow_unicode=True)
    parts.append(f"<details><summary>Configuration as used</summary><pre>{text(dump)}</pre></details>")
    return Section("making", "Making", "How it was made", "\n".join(parts))


def limits(inputs: ReportInputs) -> Section:
    """What the figures do not say."""
    notes = []
    if inputs.test_reads > 1:
        notes.append(
            f"<strong>Test was read {inputs.test_reads} times.</strong> Whoever chooses after a reading chooses on "
            "test: only the first reading is an unbiased estimate."
        )
    else:
        notes.append("Test was read once, after every choice had been made.")
    notes.append(
        "Every choice was made on val: the epoch, the head's family and settings, the temperature. Scores on val are "
        "therefore too good, most of all the best of many heads; only the test figures count."
    )
    thin = thinly_tested(inputs)
    if thin:
        named = ", ".join(
            f"{text(inputs.classes[index])} ({inputs.class_counts['test'][index]})" for index in thin[:12]
        )
        more = f" and {len(thin) - 12} more" if len(thin) > 12 else ""
        notes.append(
            f"Fewer than {FEW_TEST_IMAGES} test images: {named}{more}. A single image moves their "
            "recall far, and their intervals are too narrow: resampling cannot draw what was never pictured."
        )
    notes.append(
        "The intervals are those of the test set's sampling. They hold this one training run fixed: another seed would "
        "give another model, and differences of a point or two between single runs mean little."
    )
    if verdict(inputs.gain) == "open":
        notes.append("The change from before to after is not shown to differ from chance on this test set.")
    notes.append(
        "The figures hold for images like those of this dataset: same devices, same population, same way of choosing "
        "cases. A model for patients needs its own external validation; this page is no substitute for it."
    )
    return Section("limits", "Limits", "Limits", f"<ul>{''.join(f'<li>{note}</li>' for note in notes)}</ul>")


def _kept_apart(audit: Mapping[str, Any]) -> str:
    """What the audit has shown of groups; nothing where there was none, or where it found a leak."""
    if audit.get("leaks") is not False:
        return ""
    return f" Whole groups ({_bound_together(audit)}) are in training or out of it."


def _bound_together(audit: Mapping[str, Any]) -> str:
    return "patients, lesions, near-duplicates" if _looked_alike(audit) else "patients, lesions"


def _looked_alike(audit: Mapping[str, Any]) -> bool:
    """Whether near-duplicates were looked for."""
    return audit["near_duplicate_bits"] >= 0


def _audit(audit: Mapping[str, Any]) -> str:
    """Written proof that the splits are apart: `AuditReport.to_json()` in numbers, then class by class."""
    if not audit:
        return "<h3>Leak audit</h3><p>No audit was recorded for this dataset.</p>"
    held_out = [split for split in audit["splits"] if split != "train"]
    found = sorted(audit["classes"], key=lambda entry: -sum(entry["leaked"].values()))  # leaks first, else class order
    rows = [_audit_row(breakable(entry["name"]), entry, audit["splits"]) for entry in found[:MAX_ROWS]]
    totals = {
        name: _sums(audit, name) for name in ("samples", "groups", "shared_groups", "shared_duplicates", "leaked")
    }
    rows.append(_audit_row("all classes", totals, audit["splits"]))
    columns: Columns = ["class", f"groups<small>{' / '.join(audit['splits'])}</small>"]
    columns += [f"{split}<small>leaked images</small>" for split in held_out]
    leaked, conflicts = "its group is in training", "Near-duplicates were not looked for"
    if _looked_alike(audit):
        bits = audit["near_duplicate_bits"]
        leaked = f"its group, or an image whose 64-bit perceptual hash differs in at most {bits} bits, is in training"
        conflicts = f"Images with a near-duplicate of another class: {audit['conflicts']:,}"
    note = (
        f"Leaked: {leaked}. A group counts in each class that it has images of. {conflicts}. Unreadable files: "
        f"{len(audit['unreadable']):,}."
    )
    return (
        f"<h3>Leak audit</h3><p>{_audit_verdict(audit)}</p><ul>{_audit_counts(audit, totals, held_out)}</ul>"
        f"{table(columns, rows, note)}{_conflicts(audit)}"
    )


def _audit_verdict(audit: Mapping[str, Any]) -> str:
    if audit["leaks"]:
        return "<strong>There are leaks between the splits: the test figures are too good.</strong>"
    if not _looked_alike(audit):
        return "No group of a training image is in val or test. Near-duplicates were not looked for."
    return "No group and no near-duplicate of a training image is in val or test."


def _audit_counts(audit: Mapping[str, Any], totals: Mapping[str, Mapping[str, int]], held_out: list[str]) -> str:
    """What was compared with what, and what was found, split by split."""
    train = f"{totals['samples']['train']:,} training images"
    lines = []
    for split in held_out:
        line = (
            f"{split}: {totals['samples'][split]:,} images against {train}. In a group of training: "
            f"<strong>{totals['shared_groups'][split]:,}</strong>."
        )
        if _looked_alike(audit):
            line += (
                " A near-duplicate of a training image (hashes that differ in at most "
                f"{audit['near_duplicate_bits']} of 64 bits): <strong>{totals['shared_duplicates'][split]:,}</strong>."
            )
        lines.append(f"<li>{line}</li>")
    return "".join(lines)


def _audit_row(name: str, entry: Mapping[str, Any], splits: list[str]) -> list[str]:
    leaked = [f"{entry['leaked'][split]:,} of {entry['samples'][split]:,}" for split in splits if split != "train"]
    return [name, " / ".join(f"{entry['groups'][split]:,}" for split in splits), *leaked]


def _sums(audit: Mapping[str, Any], name: str) -> dict[str, int]:
    return {split: sum(entry[name].get(split, 0) for entry in audit["classes"]) for split in audit["splits"]}


def _conflicts(audit: Mapping[str, Any]) -> str:
    """Pairs of near-duplicates that are labelled differently: one label of each is wrong."""
    pairs = audit["first_conflicts"][:CONFLICTS_SHOWN]
    if not pairs:
        return ""
    items = "".join(
        f"<li><code>{text(key)}</code> ({text(name)}) and <code>{text(other)}</code> ({text(other_name)})</li>"
        for key, name, other, other_name in pairs
    )
    return f"<details><summary>Near-duplicates with different labels</summary><ul>{items}</ul></details>"


def _plain(value: Any) -> Any:
    """Tuples and mappings of any kind as the lists and dicts that YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
