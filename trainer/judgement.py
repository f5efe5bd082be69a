"""The report's sections on how the model judges: map of its features, reliability, operating points."""

from __future__ import annotations

from trainer.findings import ReportInputs, classes_in_confusions, rarest_last
from trainer.judgement_figures import class_looks, look_sign, map_of_features, reliability_diagram
from trainer.page import (
    Column,
    Columns,
    Section,
    breakable,
    figure,
    interval_track,
    known_span,
    legend,
    percent,
    scale_ends,
    table,
    text,
)

MAX_NAMED = 24  # classes with a look of their own on the map; of more, those that are confused most
MAX_ROWS = 60  # classes in a table; of more, the rarest are shown


def embedding(inputs: ReportInputs) -> Section:
    """The map of the features on which the model decides."""
    points = inputs.embedding_map
    if points is None or not points.x:
        return Section("map", "Map", "Map of the test images", "<p>No map was made in this run.</p>")
    named = classes_in_confusions(inputs.winner_confusion, MAX_NAMED).tolist()
    looks = class_looks([label for label in rarest_last(inputs) if label in named])
    keys = legend(
        [
            *(f"{_sign(look)} {text(inputs.classes[label])}" for label, look in looks.items()),
            *(['<span style="color:var(--grey)">●</span> other classes'] if len(inputs.classes) > len(looks) else []),
        ]
    )
    part = f"{len(points.x):,} of {points.samples:,} test images, of rare classes as many as there are"
    shown = part if len(points.x) < points.samples else f"All {points.samples:,} test images"
    trust = points.trustworthiness
    kept = "" if trust is None else f" Trustworthiness {trust:.2f}: 1 = all neighbours are true ones, 0.5 = by chance."
    caption = (
        f"{shown} by the features on which the model decides; filled where it is right, hollow where it is wrong. "
        f"Hovering tells the class. By {text(points.method)}: neighbours mean something, distances between clusters "
        f"and their sizes do not.{kept}"
    )
    picture = figure(map_of_features(points, inputs.classes, looks), caption, 760)
    return Section("map", "Map", "Map of the test images", f"{keys}\n{picture}")


def reliability(inputs: ReportInputs) -> Section:
    """Whether the model is right as often as it says."""
    calibration, row = inputs.calibration, inputs.row(inputs.winner)
    if calibration is None:
        return Section("reliability", "Reliability", "Reliability", "<p>No calibration was recorded in this run.</p>")
    keys = legend(
        [
            '<span class="key before"></span> before the temperature',
            '<span class="key"></span> after, with its 95 % interval',
        ]
    )
    temperature = "" if inputs.temperature is None else f" T = {inputs.temperature:.3g}, fitted on val"
    ends = f" (95 % interval {known_span(row.intervals['ece'])})" if "ece" in row.intervals else ""
    lead = (
        f"<p>The probabilities are calibrated by one temperature{temperature}. Expected calibration error on test: "
        f"{percent(row.ece_before)} % before, <strong>{percent(row.ece)} %</strong> after{ends}.</p>"
    )
    caption = (
        "Test images by how sure the model is of its decision (15 bins; the larger the mark, the more images). On the "
        "dotted line it is right as often as it says; below, it is too sure of itself."
    )
    picture = figure(reliability_diagram(calibration), caption, 460)
    return Section("reliability", "Reliability", "Reliability", f"{lead}\n{keys}\n{picture}")


def operating(inputs: ReportInputs) -> Section:
    """Sensitivity of each class against the rest at fixed specificities."""
    points = inputs.operating_points
    title = "Operating points: one class against the rest"
    if points is None:
        return Section("operating", "Operating points", title, "<p>No operating point was recorded in this run.</p>")
    areas = inputs.row(inputs.winner).per_class_auc
    order = rarest_last(inputs)
    shown = order[-MAX_ROWS:]
    middle = len(points.specificities) // 2
    rows = []
    for label in shown:
        cells = [breakable(inputs.classes[label]), f"{inputs.class_counts['test'][label]:,}"]
        cells.append(percent(areas[label] if areas else None))
        for place, (sensitivity, threshold) in enumerate(
            zip(points.sensitivity[label], points.thresholds[label], strict=True)
        ):
            ends = points.intervals[label][place] if points.intervals else (None, None)
            at = "" if threshold is None else f"p ≥ {threshold:.3f}"
            cells.append(f"{percent(sensitivity, 0)}<small>{known_span(ends, 0)}</small><small>{at}</small>")
            if place == middle:
                cells.append(_track(sensitivity, *ends))
        rows.append(cells)
    columns: Columns = ["class", Column("test", spare=True), Column("AUC", spare=True)]
    for place, specificity in enumerate(points.specificities):
        columns.append(Column(f"at {percent(specificity, 0)} %<small>specificity</small>", spare=place == 0))
        if place == middle:
            columns.append(Column(f"sensitivity at {percent(specificity, 0)} %{scale_ends(0, 1)}", spare=True))
    left_out = f" The {len(shown)} rarest of {len(order)} classes are listed." if len(shown) < len(order) else ""
    lead = (
        "<p>If an alarm for a class is raised whenever its probability reaches a threshold: the share of the class "
        "that is found (sensitivity) while so many of all other images (specificity) raise none.</p>"
    )
    note = (
        f"In percent, commonest class first; 95 % intervals over groups; AUC: area under the ROC curve.{left_out} The "
        "thresholds are read off the test set: they show what is possible there. Choose the one that is to be used on "
        "images of the place where it is used."
    )
    return Section("operating", "Operating points", title, f"{lead}\n{table(columns, rows, note)}")


def _track(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:
        return ""
    return interval_track(value, (low, high), (0.0, 1.0), chosen=True)


def _sign(look: tuple[str, int]) -> str:
    colour, sign = look_sign(look)
    return f'<span style="color:{colour}">{sign}</span>'
