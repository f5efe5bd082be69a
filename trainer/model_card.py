"""The report's model card: what the model is for, what it was made from, what it cannot do, and its hashes.

After Mitchell et al., Model Cards for Model Reporting, FAT* 2019 (arXiv 1810.03993).
"""

from __future__ import annotations

from typing import Any

from data_pipeline.graph import ImageSettings
from trainer.findings import ReportInputs, is_number, thinly_tested
from trainer.page import Section, definitions, percent, span, text

WORST_CLASSES = 3
NOT_STATED = '<span class="none">not stated; set <code>{key}</code> and write the report again</span>'
DEFAULT_USE = (
    "Not stated by its makers (<code>report.intended_use</code>). Without that: research, and sorting or a second look "
    "under the eye of somebody who knows these classes."
)


def model_card(inputs: ReportInputs) -> Section:
    """Intended use, data, figures, limits, licences, hashes."""
    items = [
        ("Model", _model(inputs)),
        ("Intended use", text(_stated(inputs, "intended_use")) if _stated(inputs, "intended_use") else DEFAULT_USE),
        ("Not for", _not_for(inputs)),
        ("Takes", _takes(inputs)),
        ("Gives", _gives(inputs)),
        ("Made from", _made_from(inputs)),
        ("Licence of the data", _licence(inputs, "data_licence")),
        ("Licence of the model", _licence(inputs, "model_licence")),
        ("Figures", _figures(inputs)),
        ("Limits", _limits(inputs)),
        ("Use", "<code>rarelens predict MODEL IMAGES --out predictions.csv</code>"),
    ]
    hashes = [(name, f"<code>{text(value)}</code>") for name, value in inputs.hashes.items()]
    proof = (
        f'<h3>SHA-256</h3>{definitions(hashes)}<p class="note">The first names the packed dataset with every shard, '
        "the last the model's weights: what has another one is another dataset, another model.</p>"
    )
    return Section("card", "Model card", "Model card", definitions(items) + (proof if hashes else ""))


def _model(inputs: ReportInputs) -> str:
    model, made = inputs.config.get("model", {}), inputs.provenance
    head = inputs.row(inputs.winner).description.removeprefix("winner: ")
    said = [f"{text(model.get('backbone', 'a network'))} with a head of {text(head)}, {len(inputs.classes)} classes"]
    if made.get("created"):
        said.append(f"made {text(made['created'][:10])}")
    version = made.get("versions", {}).get("rarelens") or inputs.versions.get("rarelens")
    if version:
        said.append(f"by rarelens {text(version)}")
    return ", ".join(said) + f", run {text(inputs.name)}."


def _not_for(inputs: ReportInputs) -> str:
    return (
        f"A diagnosis or any decision by itself. Images of other classes: each gets one of the {len(inputs.classes)}, "
        "however unlike it is. Other devices, populations or ways of choosing cases than those of the dataset."
    )


def _takes(inputs: ReportInputs) -> str:
    prepared = inputs.preprocessing
    if not prepared:
        return "An RGB image."
    px = prepared["image_px"]
    image = ImageSettings(px, prepared["resize_ratio"], prepared["mean"], prepared["std"])
    return (
        f"An RGB image, its short side resized to {image.short_px} px, its centre of "
        f"{px} x {px} px cut out and normalised by the dataset's mean and standard deviation."
    )


def _gives(inputs: ReportInputs) -> str:
    heat = "" if inputs.temperature is None else f" (temperature {inputs.temperature:.3g}, fitted on val)"
    return f"A calibrated probability{heat} for each of the classes; the most probable one is its answer."


def _made_from(inputs: ReportInputs) -> str:
    counts = {split: sum(numbers) for split, numbers in inputs.class_counts.items()}
    shares = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    leaks: Any = inputs.audit.get("leaks")
    audit = {True: " <strong>Its splits leak.</strong>", False: " Its splits do not leak."}.get(leaks, "")
    return f'{text(inputs.dataset)}: {shares} images. See <a href="#data">Data</a>.{audit}'


def _licence(inputs: ReportInputs, key: str) -> str:
    stated = _stated(inputs, key)
    return text(stated) if stated else NOT_STATED.format(key=f"report.{key}")


def _figures(inputs: ReportInputs) -> str:
    row = inputs.row(inputs.winner)
    return (
        f"On {sum(inputs.class_counts['test']):,} test images of {inputs.test_groups:,} groups: balanced accuracy "
        f"{percent(row.balanced_accuracy)} % (95 % interval {span(row.interval)}), rare classes {percent(row.few)} %, "
        f"calibration error {percent(row.ece)} %."
    )


def _limits(inputs: ReportInputs) -> str:
    recalls = inputs.row(inputs.winner).per_class_recall
    known = sorted((share, label) for label, share in enumerate(recalls) if share is not None and is_number(share))
    worst = ", ".join(f"{text(inputs.classes[label])} {percent(share, 0)} %" for share, label in known[:WORST_CLASSES])
    thin = len(thinly_tested(inputs))
    few = f" {thin} of {len(inputs.classes)} classes have too few test images for a firm figure." if thin else ""
    return f'Found least often: {worst}.{few} More under <a href="#limits">Limits</a>.'


def _stated(inputs: ReportInputs, key: str) -> str | None:
    return inputs.config.get("report", {}).get(key)
