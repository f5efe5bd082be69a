"""Where a result comes from and how far it reaches: the report's sections on data, making and limits."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import yaml

from trainer.findings import FEW_TEST_IMAGES, ReportInputs, imbalance, rarest_last, thinly_tested, verdict
from trainer.page import Column, Columns, Section, definitions, duration, table, text

MAX_ROWS = 60  # classes in the table; of more, the rarest are shown
EXAMPLES_PER_CLASS = 4
THUMBNAIL_PX = 128


def data(inputs: ReportInputs) -> Section:
    """Classes, splits, examples, and the audit as proof."""
    train, val, test = (inputs.class_counts[split] for split in ("train", "val", "test"))
    order = rarest_last(inputs)
    shown = order[-MAX_ROWS:]
    largest = max(*train, 1)
    rows = []
    for index in shown:
        bar = f'<span class="bar" style="width:{100 * train[index] / largest:.1f}%"></span>'
        cells = [text(inputs.classes[index]), f"{train[index]:,}", bar, f"{val[index]:,}", f"{test[index]:,}"]
        rows.append([*cells, _thumbnails(inputs, index)])
    rows.append(["all classes", f"{sum(train):,}", "", f"{sum(val):,}", f"{sum(test):,}", ""])
    columns: Columns = ["class", "train", Column('<span class="space"></span>', left=True, spare=True)]
    columns += [Column("val", spare=True), Column("test", spare=True), "training images" if inputs.examples else ""]
    lead = (
        f"<p>{len(inputs.classes)} classes; the commonest has {imbalance(train):,.0f} times as many training images as "
        "the rarest. Whole groups (patients, lesions, near-duplicates) went to one split.</p>"
    )
    note = f"The {len(shown)} rarest of {len(order)} classes." if len(shown) < len(order) else ""
    return Section("data", "Data", "Data", f"{lead}\n{table(columns, rows, note)}\n{_audit(inputs.audit)}")


def making(inputs: ReportInputs) -> Section:
    """Timings, hashes, versions, configuration."""
    parts = []
    if inputs.timings:
        total = sum(inputs.timings.values())
        rows = []
        for step, seconds in inputs.timings.items():
            bar = f'<span class="bar" style="width:{100 * seconds / max(total, 1e-9):.1f}%"></span>'
            rows.append([text(step), duration(seconds), bar])
        columns: Columns = ["step", "time", Column('<span class="space"></span>', left=True)]
        parts.append(f"<h3>Time</h3>{table(columns, [*rows, ['all steps', duration(total), '']])}")
    if inputs.hashes:
        hashes = [(name, f"<code>{text(value)}</code>") for name, value in inputs.hashes.items()]
        parts.append(f"<h3>SHA-256</h3>{definitions(hashes)}")
    if inputs.versions:
        versions = [(name, text(version)) for name, version in inputs.versions.items()]
        parts.append(f"<h3>Versions</h3>{definitions(versions)}")
    dump = yaml.safe_dump(_plain(inputs.config), sort_keys=False, allow_unicode=True)
    parts.append(f"<details open><summary>Configuration as used</summary><pre>{text(dump)}</pre></details>")
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
        notes.append(f"Fewer than {FEW_TEST_IMAGES} test images: {named}{more}. A single image moves their recall far.")
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


def _audit(audit: Mapping[str, Any]) -> str:
    """Written proof that the splits are apart: `AuditReport.to_json()` class by class."""
    if not audit:
        return "<h3>Leak audit</h3><p>No audit was recorded for this dataset.</p>"
    sentence = (
        "<strong>There are leaks between the splits: the test figures are too good.</strong>"
        if audit["leaks"]
        else "No group and no near-duplicate of a training image is in val or test."
    )
    held_out = [split for split in audit["splits"] if split != "train"]
    found = sorted(audit["classes"], key=lambda entry: -sum(entry["leaked"].values()))  # leaks first, else class order
    rows = [
        [
            text(entry["name"]),
            " / ".join(f"{entry['groups'][split]:,}" for split in audit["splits"]),
            *(f"{entry['leaked'][split]:,} of {entry['samples'][split]:,}" for split in held_out),
        ]
        for entry in found[:MAX_ROWS]
    ]
    columns: Columns = ["class", f"groups<small>{' / '.join(audit['splits'])}</small>"]
    columns += [f"{split}<small>leaked images</small>" for split in held_out]
    note = (
        "Leaked: its group, or an image whose 64-bit perceptual hash differs in at most "
        f"{audit['near_duplicate_bits']} bits, is in training. Images with a near-duplicate of another class: "
        f"{audit['conflicts']:,}. Unreadable files: {len(audit['unreadable']):,}."
    )
    return f"<h3>Leak audit</h3><p>{sentence}</p>{table(columns, rows, note)}"


def _thumbnails(inputs: ReportInputs, index: int) -> str:
    """Small copies of a class's examples, re-encoded: no metadata of the originals reaches the page."""
    from PIL import Image, ImageOps

    tags = []
    examples = inputs.examples[index] if inputs.examples else ()
    for number, encoded in enumerate(examples[:EXAMPLES_PER_CLASS]):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=82)
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        tags.append(f'<img src="{uri}" alt="{text(inputs.classes[index])}, example {number + 1}">')
    return f'<div class="thumbs">{"".join(tags)}</div>'


def _plain(value: Any) -> Any:
    """Tuples and mappings of any kind as the lists and dicts that YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
