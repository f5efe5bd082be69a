"""The report: one self-contained HTML file that outlives the terminal.

No scripts, no network, pictures inside. Headline first, then evidence, then how it was made, then what it cannot say.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import evidence, gallery, judgement, origin, results_section
from trainer.evidence import CLASSIFICATION_LOSS_NAMES
from trainer.findings import Gain, ReportInputs, ResultRow, heads_tried, imbalance, verdict
from trainer.model_card import model_card
from trainer.page import document, percent, signed_points, span, text, write_page

__all__ = ["Gain", "ReportInputs", "ResultRow", "write_report"]

SECTIONS = (
    results_section.results,
    evidence.recall,
    evidence.confusions,
    gallery.mistakes,
    judgement.embedding,
    judgement.reliability,
    judgement.operating,
    evidence.training,
    evidence.search,
    origin.data,
    origin.making,
    origin.limits,
    model_card,
)
METRIC_LOSS_NAMES = {
    "supervised_contrastive": "supervised contrastive loss",
    "balanced_contrastive": "balanced contrastive loss",
    "batch_hard_triplet": "batch-hard triplet loss",
    "semi_hard_triplet": "semi-hard triplet loss",
    "all_triplet": "triplet loss over all triplets",
    "class_centre_triplet": "class-centre triplet loss",
    "progressive_class_centre_triplet": "progressive class-centre triplet loss",
    "centre": "centre loss",
    "multi_similarity": "multi-similarity loss",
    "proxy_anchor": "proxy-anchor loss",
}
VERDICTS = {
    "gain": "more than chance would give",
    "loss": "<strong>a loss</strong>, and more than chance would give",
    "open": "<strong>which may be chance</strong>, since the interval holds 0",
}


def write_report(inputs: ReportInputs, path: str | Path) -> None:
    """Write the report as one HTML file, whole or not at all.

    Args:
        inputs: Plain values out of the run folder.
        path: Where the file goes; its folder is made.
    """
    write_page(render(inputs), path)


def render(inputs: ReportInputs) -> str:
    """The report as a string of HTML."""
    sections = [build(inputs) for build in SECTIONS]
    links = "".join(f'<a href="#{section.anchor}">{section.link}</a>' for section in sections)
    footer = (
        f"<footer>Written by rarelens {text(inputs.versions.get('rarelens', ''))} from the run's own files.</footer>"
    )
    parts = [header(inputs), f"<nav>{links}</nav>", *(section.markup() for section in sections), footer]
    return document(f"{inputs.dataset}: {inputs.name}", "\n".join(parts))


def header(inputs: ReportInputs) -> str:
    """What was trained, on what, and what came out, before anything else."""
    before, after = inputs.row(inputs.own), inputs.row(inputs.winner)
    from_to = f"from {percent(before.balanced_accuracy)} % to {percent(after.balanced_accuracy)} %"
    verb = {"gain": "rose", "loss": "fell", "open": "went"}[verdict(inputs.gain)]
    doubt = ", which may be chance" if verdict(inputs.gain) == "open" else ""
    return "\n".join(
        [
            "<header>",
            f'<p class="eyebrow">rarelens report · {text(inputs.dataset)} · {text(inputs.name)}</p>',
            f"<h1>Balanced accuracy on test {verb} {from_to}{doubt}</h1>",
            f'<p class="lead">{_what_was_trained(inputs)}</p>',
            f"<p>{_what_changed(inputs)}</p>",
            *_warnings(inputs),
            _tiles(inputs),
            "</header>",
        ]
    )


def _what_was_trained(inputs: ReportInputs) -> str:
    model, stage = inputs.config.get("model", {}), inputs.config.get("stage_one", {})
    image_px = inputs.config.get("data", {}).get("image_px")
    train = inputs.class_counts["train"]
    head = inputs.row(inputs.winner).description.removeprefix("winner: ")
    return (
        f"<strong>{text(model.get('backbone', 'A network'))}</strong> at {text(image_px)} px, trained for "
        f"{text(stage.get('epochs'))} epochs by {text(loss_in_words(stage))} on {sum(train):,} images of "
        f"{len(inputs.classes)} classes (imbalance {imbalance(train):,.0f}). On top, the best on val of "
        f"{heads_tried(inputs):,} heads: <strong>{text(head)}</strong>."
    )


def loss_in_words(stage_one: Mapping[str, Any]) -> str:
    """What stage one minimised and how it sampled, as far as the configuration (nested) tells; "plain" is the default.

    A section that is missing has its defaults, but for the metric loss, of which nothing is said then.
    """
    loss = stage_one.get("loss", {})
    classification, sampling = stage_one.get("classification", {}), stage_one.get("sampling", {})
    extras = []
    if loss.get("name", "none") != "none" and loss.get("weight", 1.0) > 0:
        extras.append(f"a {METRIC_LOSS_NAMES.get(loss['name'], loss['name'])}")
    if classification.get("label_smoothing"):
        extras.append("label smoothing")
    if classification.get("reweight_from") is not None:
        late = classification["reweight_from"] > 0
        extras.append("weights by class towards the end" if late else "weights by class")
    if sampling.get("power", 1) < 1 or sampling.get("power_last") is not None or sampling.get("class_weights"):
        extras.append("rebalanced sampling")
    if sampling.get("classes_per_batch"):
        extras.append("batches of P classes x K images")
    name = CLASSIFICATION_LOSS_NAMES[classification.get("name", "cross_entropy")]
    if not extras:
        return f"plain {name}" if name == "cross-entropy" else name
    return f"{name} with {', '.join([*extras[:-2], ' and '.join(extras[-2:])])}"


def _what_changed(inputs: ReportInputs) -> str:
    """The paired differences in words, and on how much they rest."""
    sentences = []
    for other, gain in (
        ("stage one's own classifier", inputs.gain),
        ("plain cross-entropy of the same budget", inputs.gain_over_baseline),
    ):
        if gain is not None:
            low, high = (signed_points(end) for end in gain.interval)
            points = f"{signed_points(gain.value)} points (95 % interval {low} to {high})"
            sentences.append(f"Against {other}: {points}, {VERDICTS[verdict(gain)]}.")
    if not sentences:
        sentences.append("No paired interval of the difference was computed.")
    images = sum(inputs.class_counts["test"])
    return f"{' '.join(sentences)} Measured on {images:,} test images of {inputs.test_groups:,} groups."


def _warnings(inputs: ReportInputs) -> list[str]:
    warnings = []
    if inputs.test_reads > 1:
        warnings.append(
            f"Test was read {inputs.test_reads} times in this run: take these figures as optimistic (see Limits)."
        )
    if inputs.audit.get("leaks") is True:
        warnings.append("The audit found leaks between training and test: take these figures as optimistic (see Data).")
    return [f'<div class="warning" role="note">{warning}</div>' for warning in warnings]


def _tiles(inputs: ReportInputs) -> str:
    before, after = inputs.row(inputs.own), inputs.row(inputs.winner)
    tiles = (
        (
            "balanced accuracy",
            before.balanced_accuracy,
            after.balanced_accuracy,
            f"95 % interval {span(after.interval)}",
        ),
        ("recall of the rare classes", before.few, after.few, "mean over the few-shot classes"),
        ("recall of the worst class", before.worst_recall, after.worst_recall, "the class that is missed most"),
        ("calibration error", before.ece, after.ece, "ECE; less is better"),
    )
    return f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'


def _tile(name: str, before: float | None, after: float | None, note: str) -> str:
    return (
        f'<div class="tile"><span>{name}, %</span><b><s>{percent(before)}</s><i>→</i>{percent(after)}</b>'
        f"<span>{note}</span></div>"
    )
