"""The report's evidence: classes, confusion, training, search; each section a function of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer import figures, gallery
from trainer.findings import (
    ReportInputs,
    best_per_family,
    classes_in_confusions,
    heads_tried,
    is_number,
    most_confused,
    rarest_last,
    row_shares,
)
from trainer.heads import FAMILY_NAMES
from trainer.page import (
    Column,
    Columns,
    Section,
    breakable,
    change,
    figure,
    known_span,
    legend,
    move_track,
    percent,
    scale_ends,
    signed_points,
    table,
    text,
)

CLASSIFICATION_LOSS_NAMES = {
    "cross_entropy": "cross-entropy",
    "balanced_softmax": "balanced softmax",
    "logit_adjusted": "logit-adjusted cross-entropy",
    "focal": "focal loss",
    "ldam": "LDAM",
    "cosface": "CosFace",
    "arcface": "ArcFace",
}
METRIC_NAMES = {"balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "worst_recall": "the worst class"}
KNOB_NAMES = {
    "power": "q (sampling power)",
    "tau": "tau",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "epochs": "epochs",
    "beta": "beta (class weights)",
    "smoothing": "smoothing",
    "smoothing_tail": "smoothing of the rarest",
    "margin": "margin",
    "scale": "scale of the cosine",
}
SEARCH_TITLE = "Stage two: the search"
MAX_ROWS = 60  # classes in the table; of more, the rarest are shown
MAX_MATRIX = 40  # classes in a confusion matrix; of more, those that are confused most


def recall(inputs: ReportInputs) -> Section:
    """Per-class recall against class frequency, before and after."""
    before, after = inputs.row(inputs.own).per_class_recall, inputs.row(inputs.winner).per_class_recall
    train, test = inputs.class_counts["train"], inputs.class_counts["test"]
    order = rarest_last(inputs)
    shown = order[-MAX_ROWS:]
    rows = [
        [
            breakable(inputs.classes[index]),
            f"{train[index]:,}",
            f"{test[index]:,}",
            move_track(before[index], after[index]),
            percent(before[index], 0),
            _with_interval(inputs, index, percent(after[index], 0)),
            change(before[index], after[index]),
        ]
        for index in shown
    ]
    left_out = f" The {len(shown)} rarest of {len(order)} classes are listed." if len(shown) < len(order) else ""
    keys = legend(
        [
            '<span class="key before"></span> before: stage one\'s own classifier',
            '<span class="key"></span> after, better',
            '<span class="key down"></span> after, worse',
        ]
    )
    columns: Columns = ["class", Column("train", spare=True), Column("test", spare=True), f"recall{scale_ends(0, 1)}"]
    listing = table(
        [*columns, Column("before", spare=True), "after", "points"],
        rows,
        f"Commonest class first; recall in percent, small: its 95 % interval over groups.{left_out}",
    )
    picture = figure(
        figures.recall_by_frequency(train, before, after, inputs.classes),
        "Recall against the number of training images (log axis). The largest rise and the largest fall are named.",
        540,
    )
    return Section("recall", "Classes", "Which classes gained", f"{keys}\n{listing}\n{picture}")


def _with_interval(inputs: ReportInputs, label: int, recall_text: str) -> str:
    if not inputs.recall_intervals:
        return recall_text
    return f"{recall_text}<small>{known_span(inputs.recall_intervals[label], 0)}</small>"


def confusions(inputs: ReportInputs) -> Section:
    """Confusion matrices and the most confused pairs."""
    confused = set(classes_in_confusions(inputs.winner_confusion, MAX_MATRIX))
    kept = [index for index in rarest_last(inputs) if index in confused]
    names = [inputs.classes[index] for index in kept]
    pictures = []
    for when, title, counts in (
        ("after", "After.", inputs.winner_confusion),
        ("before", "Before.", inputs.own_confusion),
    ):
        svg, width = figures.confusion(row_shares(counts)[np.ix_(kept, kept)], names, when)
        note = f"<b>{title}</b> Share of each true class, in percent; the diagonal is recall."
        shrinks_to = 0 if width < 460 else round(0.75 * width)
        pictures.append(figure(svg, note, round(1.1 * width), shrinks_to))
    rows = [
        [
            breakable(inputs.classes[pair.true]),
            breakable(inputs.classes[pair.predicted]),
            f"{pair.images} of {pair.of}",
            percent(pair.share, 0),
            percent(pair.share_before, 0),
        ]
        for pair in most_confused(inputs.winner_confusion, inputs.own_confusion)
    ]
    columns: Columns = [
        "true class",
        Column("taken for", left=True),
        Column("test images", spare=True),
        "after",
        "before",
    ]
    note = "The largest shares of a true class that the chosen model takes for another one, in percent."
    pairs = table(columns, rows, note) if rows else "<p>No test image was taken for another class.</p>"
    part = f"<p>Of {len(inputs.classes)} classes, the {len(kept)} confused most.</p>"
    lead = part if len(kept) < len(inputs.classes) else ""
    content = f'{lead}<div class="grid wide">{"".join(pictures)}</div>\n<h3>Most confused pairs</h3>\n{pairs}'
    content += gallery.confused_pairs(inputs)
    return Section("confusion", "Confusion", "What is taken for what", content)


def training(inputs: ReportInputs) -> Section:
    """Curves of stage one."""
    stage = inputs.config.get("stage_one", {})
    logged = [line for line in inputs.history if line.get("stage", "stage_one") == "stage_one"]
    steps = [line for line in logged if line.get("kind") == "step"]
    epochs = [line for line in logged if line.get("kind") == "epoch"]
    pictures = []
    if steps:
        by = stage.get("classification", {}).get("name", "cross_entropy")
        svg = figures.loss_curve(steps, CLASSIFICATION_LOSS_NAMES[by])
        pictures.append(figure(svg, "<b>Loss</b> on training batches.", 460))
    if epochs:
        baseline = [line for line in inputs.history if (line.get("stage"), line.get("kind")) == ("baseline", "epoch")]
        by = stage.get("select_by", "balanced_accuracy")
        svg = figures.validation_curve(epochs, by, baseline, inputs.kept_epoch)
        ring = "" if inputs.kept_epoch is None else "; the ring marks the epoch that was kept"
        pictures.append(figure(svg, f"<b>Validation</b> after each epoch{ring}.", 460))
    if steps:
        pictures.append(figure(figures.throughput_curve(steps), "<b>Speed</b>, all workers together.", 460))
    content = f'<div class="grid">{"".join(pictures)}</div>' if pictures else "<p>No step was logged.</p>"
    return Section("training", "Training", "Stage one: training", content)


def search(inputs: ReportInputs) -> Section:
    """The search of stage two."""
    best = best_per_family(inputs.search)
    if not best:
        return Section("search", "Search", SEARCH_TITLE, "<p>No head was searched in this run.</p>")
    families = [row["family"] for row in best]
    values = {knob: {row[knob] for row in inputs.search if is_number(row.get(knob))} for knob in KNOB_NAMES}
    knobs = [knob for knob in KNOB_NAMES if len(values[knob]) > 1]
    rows = [
        [
            text(FAMILY_NAMES.get(row["family"], row["family"])),
            f"{sum(line['family'] == row['family'] for line in inputs.search):,}",
            percent(row["score"]),
            ", ".join(f"{text(KNOB_NAMES[knob])} {row[knob]:.3g}" for knob in knobs if is_number(row.get(knob))),
        ]
        for row in best
    ]
    overview = figure(
        figures.search_by_family(inputs.search, best, FAMILY_NAMES),
        "<b>Score by family.</b> A mark a head; the ring is the one that the family is judged by.",
        520,
    )
    panels = [
        figure(figures.search_by_knob(inputs.search, knob, KNOB_NAMES[knob], families), "", 420) for knob in knobs
    ]
    columns: Columns = [
        Column("family"),
        Column("heads", spare=True),
        "score of the chosen head",
        Column("settings", left=True),
    ]
    note = (
        "The chosen head of each family (of those that were trained with more seeds the one with the highest lower "
        "bound, else the one with the best score) and its settings; scores in percent."
    )
    listing = table(columns, rows, note, chosen=0)
    keys = legend(_family_key(family, families) for family in families)
    grid = f'<h3>Score against each setting</h3>{keys}<div class="grid">{"".join(panels)}</div>' if panels else ""
    return Section("search", "Search", SEARCH_TITLE, f"{_search_lead(inputs)}\n{overview}\n{listing}\n{grid}")


def _search_lead(inputs: ReportInputs) -> str:
    metric = METRIC_NAMES.get(inputs.select_by, inputs.select_by)
    unscored = sum(not is_number(row["score"]) for row in inputs.search)
    without = f" {unscored:,} of them failed or diverged and have no score." if unscored else ""
    folds = inputs.choice.get("folds", 1)
    scored = f"scored by {text(metric)} on val" + (
        f", in {folds} folds by groups: what scores a head was not among what it was trained on" if folds > 1 else ""
    )
    return (
        f"<p>{heads_tried(inputs):,} heads on the features of the frozen backbone, {scored}.{without} Test was not "
        f"read.</p>{_choice(inputs)}"
    )


def _choice(inputs: ReportInputs) -> str:
    """How the winner was chosen, and how much of its lead on val is luck."""
    choice = inputs.choice
    sentences = []
    if is_number(choice.get("lower_bound")):
        sentences.append(
            f"The best heads were trained again with other seeds, and the one with the highest lower bound was taken: "
            f"{percent(choice['seeds_score'])} % over {choice['seeds']} seeds, at least "
            f"{percent(choice['lower_bound'])} % (one-sided 95 %)."
        )
    own = choice.get("families", {}).get("own")
    if is_number(choice.get("luck")) and is_number(own):
        sentences.append(
            f"On val it leads stage one's own classifier by {signed_points(choice['score'] - own)} points; if all "
            f"heads were equally good, the best of so many would lead by {signed_points(choice['luck'])} points by "
            "luck alone."
        )
    if choice.get("fine_tuning"):
        sentences.append(text(choice["fine_tuning"]))
    return f"<p>{' '.join(sentences)}</p>" if sentences else ""


def _family_key(family: str, families: Sequence[str]) -> str:
    colour, sign = figures.family_sign(family, families)
    return f'<span style="color:{colour}">{sign}</span> {text(FAMILY_NAMES.get(family, family))}'
