"""The report's evidence: results, classes, confusion, training, search; each section a function of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer import figures
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
    change,
    figure,
    interval_track,
    legend,
    move_track,
    percent,
    scale_ends,
    signed_points,
    span,
    table,
    text,
)

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
    columns += ["macro F1", "worst class", "many", "medium", "few", "ECE"]
    note = (
        "All figures in percent, on the test split. Balanced accuracy is the mean recall over classes; its interval is "
        f"a bootstrap over the {inputs.test_groups:,} groups, so images of one patient or lesion stay together. Many, "
        "medium, few: mean recall of the common, middle and rare classes. ECE: expected calibration error."
    )
    lead = (
        "<p>The highlighted row is the model that was chosen on val before test was read. It need not be the best row "
        "here; the best balanced accuracy is set in bold.</p>"
    )
    return Section("results", "Results", "Results", f"{lead}\n{table(columns, rows, note, chosen)}")


def recall(inputs: ReportInputs) -> Section:
    """Per-class recall against class frequency, before and after."""
    before, after = inputs.row(inputs.own).per_class_recall, inputs.row(inputs.winner).per_class_recall
    train, test = inputs.class_counts["train"], inputs.class_counts["test"]
    order = rarest_last(inputs)
    shown = order[-MAX_ROWS:]
    rows = [
        [
            text(inputs.classes[index]),
            f"{train[index]:,}",
            f"{test[index]:,}",
            move_track(before[index], after[index]),
            percent(before[index], 0),
            percent(after[index], 0),
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
        [*columns, "before", "after", "points"],
        rows,
        f"Commonest class first; recall in percent.{left_out}",
    )
    picture = figure(
        figures.recall_by_frequency(train, before, after, inputs.classes),
        "Recall against the number of training images (log axis). The largest rise and the largest fall are named.",
        540,
    )
    return Section("recall", "Classes", "Which classes gained", f"{keys}\n{listing}\n{picture}")


def confusions(inputs: ReportInputs) -> Section:
    """Confusion matrices and the most confused pairs."""
    confused = set(classes_in_confusions(inputs.winner_confusion, MAX_MATRIX))
    kept = [index for index in rarest_last(inputs) if index in confused]
    names = [inputs.classes[index] for index in kept]
    pictures = []
    for name, title, counts in (
        ("after", "After.", inputs.winner_confusion),
        ("before", "Before.", inputs.own_confusion),
    ):
        svg, width = figures.confusion(row_shares(counts)[np.ix_(kept, kept)], names, name)
        note = f"<b>{title}</b> Share of each true class, in percent; the diagonal is recall."
        shrinks_to = 0 if width < 460 else round(0.75 * width)
        pictures.append(figure(svg, note, round(1.1 * width), shrinks_to))
    rows = [
        [
            text(inputs.classes[pair.true]),
            text(inputs.classes[pair.predicted]),
            f"{pair.images} of {pair.of}",
            percent(pair.share, 0),
            percent(pair.share_before, 0),
        ]
        for pair in most_confused(inputs)
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
    return Section("confusion", "Confusion", "What is taken for what", content)


def training(inputs: ReportInputs) -> Section:
    """Curves of stage one."""
    stage_one = [line for line in inputs.history if line.get("stage", "stage_one") == "stage_one"]
    steps = [line for line in stage_one if line.get("kind") == "step"]
    epochs = [line for line in stage_one if line.get("kind") == "epoch"]
    pictures = []
    if steps:
        pictures.append(figure(figures.loss_curve(steps), "<b>Loss</b> on training batches.", 460))
    if epochs:
        baseline = [line for line in inputs.history if (line.get("stage"), line.get("kind")) == ("baseline", "epoch")]
        svg = figures.validation_curve(epochs, inputs.select_by, baseline)
        pictures.append(figure(svg, "<b>Validation</b> after each epoch; the ring marks the epoch that was kept.", 460))
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
            *(f"{row[knob]:.3g}" if is_number(row.get(knob)) else "" for knob in knobs),
        ]
        for row in best
    ]
    overview = figure(
        figures.search_by_family(inputs.search, families, FAMILY_NAMES),
        "<b>Score by family.</b> A mark a head; the ring is the family's best.",
        520,
    )
    panels = [
        figure(figures.search_by_knob(inputs.search, knob, KNOB_NAMES[knob], families), "", 420) for knob in knobs
    ]
    columns: Columns = [
        Column("family"),
        Column("heads", spare=True),
        "best score",
        *(text(KNOB_NAMES[knob]) for knob in knobs),
    ]
    listing = table(columns, rows, "The best head of each family and its settings; scores in percent.", chosen=0)
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
