"""The report: what it says is what went in, and the page stands on its own whatever the classes are called."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import get_args

import numpy as np
import pytest

from tests.reports import COUNTS, HOSTILE, Reader, confusion, evidence, row, some_audit, some_inputs
from trainer import origin
from trainer.config import StageOneConfig
from trainer.evidence import CLASSIFICATION_LOSS_NAMES
from trainer.findings import (
    most_confused,
    verdict,
)
from trainer.judgement_figures import MAX_LOOKS, class_looks
from trainer.loss_config import ClassificationLossName, LossConfig, MetricLossName
from trainer.page import DASH, MINUS, percent
from trainer.report import (
    METRIC_LOSS_NAMES,
    Gain,
    ReportInputs,
    header,
    loss_in_words,
    write_report,
)

SECTIONS = ("results", "recall", "confusion", "mistakes", "map", "reliability", "operating", "training", "search")
SECTIONS += ("data", "making", "limits", "card")


def _page(inputs: ReportInputs, tmp_path) -> str:
    write_report(inputs, tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def _confusions(inputs: ReportInputs) -> tuple:
    return inputs.winner_confusion, inputs.own_confusion


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return _page(some_inputs(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def read(page) -> Reader:
    return Reader(page)


def test_page_is_well_formed_and_has_all_sections_in_order(read):
    anchors = [attrs["id"] for tag, attrs in read.tags if tag == "section"]
    assert anchors == list(SECTIONS)
    links = [attrs["href"] for tag, attrs in read.tags if tag == "a"]
    assert links[: len(anchors)] == [f"#{anchor}" for anchor in anchors]
    # recall, 2 confusions, map, reliability, 3 curves, families, q, tau, lr
    assert sum(tag == "svg" for tag, _ in read.tags) == 12
    assert all(attrs.get("aria-label") for tag, attrs in read.tags if tag == "svg")


def test_ids_are_unique_and_every_reference_is_there(read):
    ids = Counter(attrs["id"] for _, attrs in read.tags if "id" in attrs)
    assert max(ids.values()) == 1
    for _, attrs in read.tags:
        target = attrs.get("href", "data:")
        assert target.startswith("data:") or (target.startswith("#") and target[1:] in ids), attrs
        assert "xlink:href" not in attrs
        for reference in re.findall(r"url\(#([^)]*)\)", " ".join(str(value) for value in attrs.values())):
            assert reference in ids


def test_page_needs_nothing_from_outside_and_runs_nothing(page, read):
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in read.tags}
    for tag, attrs in read.tags:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert attrs.get("src", "data:image/").startswith("data:image/")
    assert not re.search(r"url\((?!#)|@import", page)
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_names_are_text(page, read):
    assert "<script" not in page and "<b>1</b>" not in page and "<img src=x>" not in page
    assert "run <b>1</b>" in read.text and "skin & co" in read.text and "<i>lr</i>" in read.text
    for name in HOSTILE:
        assert name in read.text
    # In pictures too, where long ones are cut: a formula is no formula, and a colour's name is not replaced.
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    drawn = [Reader(picture).text for picture in pictures if 'id="confusion-' in picture]
    assert len(drawn) == 2
    for text in drawn:
        assert "<script>alert(1)</s…" in text and "$x_1$ & co" in text and "#0072b2 'naevus'" in text


def test_headline_and_table_say_the_figures(read):
    inputs = some_inputs()
    own, winner = inputs.row("own"), inputs.row("winner")
    before, after = 100 * own.balanced_accuracy, 100 * winner.balanced_accuracy
    assert f"Balanced accuracy on test rose from {before:.1f} % to {after:.1f} %" in read.text
    assert "+3.1 points (95 % interval +1.2 to +5.0), more than chance would give" in read.text
    assert "262 test images of 240 groups" in read.text
    assert (
        f"Against plain cross-entropy of the same budget: {MINUS}0.5 points (95 % interval {MINUS}2.0 to +1.0)"
        in read.text
    )
    assert "resnet50 at 128 px, trained for 2 epochs by cross-entropy with a supervised contrastive loss" in read.text
    assert "the best on val of 12 heads" in read.text
    assert "Test was read once, after every choice had been made." in read.text
    assert "No group and no near-duplicate of a training image is in val or test." in read.text
    for text in ("ab" * 32, "12 min 34 s", "4.2 s", "image_px: 128", "- tau_norm", "torch 2.15.0"):
        assert text in read.text


def test_a_class_without_test_images_has_a_dash_and_is_named(read):
    assert f"{HOSTILE[3]} 8 0 {DASH} {DASH} {DASH}" in read.text  # train, test, before, after, points
    assert f"Fewer than 10 test images: {HOSTILE[1]} (7), {HOSTILE[3]} (0)." in read.text


def test_every_figure_stands_with_its_interval(read):
    table = read.text[read.text.index("Every figure with its interval") :]
    own, winner = some_inputs().row("own"), some_inputs().row("winner")
    before, after = percent(own.balanced_accuracy), percent(winner.balanced_accuracy)
    assert f"balanced accuracy {before} {DASH} {after} 50.0{DASH}60.0 +3.1 +1.2 to +5.0" in table
    assert f"few {DASH} {DASH} {DASH} {DASH} {DASH}" in table
    assert f"10{DASH}90" in read.text[read.text.index("Which classes gained") :]


def test_pictures_stand_where_they_belong(page, read):
    images = Counter(attrs["alt"] for tag, attrs in read.tags if tag == "img")
    named = [f"{name}, training image 1" for name in HOSTILE]
    pair = f"{HOSTILE[2]}, taken for {HOSTILE[0]}"
    expected = [*named, f"{pair} 1", f"{pair} 2", f"{HOSTILE[0]}, recognised 1", pair]
    assert images == Counter(expected), "of what has no picture, none is shown"
    found = next(p for p in most_confused(*_confusions(some_inputs()), limit=99) if (p.true, p.predicted) == (2, 0))
    assert f"{HOSTILE[2]} , taken for {HOSTILE[0]}: {found.images} of {found.of}" in read.text
    assert f"({HOSTILE[2]} )" not in read.text
    mistakes = read.text[read.text.index("The worst mistakes") : read.text.index("Map of the test images")]
    assert f"{HOSTILE[2]} (1 %) taken for {HOSTILE[0]} (90 %) test_0" in mistakes.replace("\N{NO-BREAK SPACE}", " ")
    assert "<i>key</i>" in mistakes
    assert page.count("data:image/jpeg") == len(expected)


def test_the_map_tells_each_class_without_scripts(read):
    points = some_inputs().embedding_map
    marks = [attrs for tag, attrs in read.tags if tag == "use" and attrs["href"].startswith("#map-")]
    assert len(marks) == len(points.x)
    wrong = sum(label != said for label, said in zip(points.labels, points.predicted, strict=True))
    assert sum(mark.get("class") == "w" for mark in marks) == wrong > 0
    assert f"{len(points.x)} of 5,000 test images" in read.text and "Trustworthiness 0.93" in read.text
    titles = read.text[read.text.index("Map of the test images") : read.text.index("Hovering tells")]
    assert titles.count(f"{HOSTILE[2]}, taken for {HOSTILE[0]}") == some_inputs().winner_confusion[2][0]


def test_looks_differ_without_colour_and_with_it():
    looks = class_looks(range(99))
    assert len(looks) == MAX_LOOKS == len(set(looks.values()))
    shapes = [shape for _, shape in looks.values()]
    assert all(shapes[i] != shapes[i + 1] for i in range(len(shapes) - 1))


def test_operating_points_and_calibration_are_told(read):
    inputs = some_inputs()
    points = inputs.operating_points
    told = read.text[read.text.index("Operating points: one class") : read.text.index("Stage one: training")]
    low, high = points.intervals[2][0]
    first = f"{percent(points.sensitivity[2][0], 0)} {percent(low, 0)}{DASH}{percent(high, 0)}"
    assert f"{HOSTILE[2]} 45 90.0 {first} p ≥ {points.thresholds[2][0]:.3f}" in told
    assert f"{HOSTILE[3]} 0 90.0 {DASH} {DASH}" in told  # no test image: nothing can be said
    assert "T = 1.7, fitted on val" in read.text and f"5.0 % after (95 % interval 3.0{DASH}7.0)" in read.text


def test_the_card_says_what_is_stated_and_what_is_not(read, tmp_path):
    card = read.text[read.text.index("Model card Model ") :]
    assert "resnet50 with a head of model winner, 5 classes, made 2026-11-30, by rarelens 0.1.0" in card
    assert "Not stated by its makers ( report.intended_use )" in card and "set report.data_licence" in card
    # 160 x 1.143 = 182.9: the decoder takes an even number, so that the crop is centred.
    assert "short side resized to 182 px" in card and "160 x 160 px" in card and "(temperature 1.7, fitted" in card
    assert "ab" * 32 in card and "2 of 5 classes have too few test images" in card and "do not leak" in card
    stated = {"intended_use": "sorting <b>only</b>", "data_licence": "CC BY-NC 4.0", "model_licence": "MIT"}
    told = Reader(_page(some_inputs(config={"report": stated}), tmp_path)).text
    assert "Intended use sorting <b>only</b> Not for" in told
    assert "Licence of the data CC BY-NC 4.0 Licence of the model MIT" in told


def test_the_table_of_the_data_holds_its_numbers(read):
    table = read.text[read.text.index("class train val test") : read.text.index("What the classes look like")]
    for label in (0, 2, 4, 1, 3):
        row = " ".join(f"{COUNTS[split][label]:,}" for split in ("train", "val", "test"))
        assert f"{HOSTILE[label]} {row}" in table
        table = table[table.index(HOSTILE[label]) :]  # commonest first
    assert "all classes 1,238 264 262" in table
    assert "the commonest has 112 times as many training images as the rarest" in read.text


def test_groups_are_said_to_be_whole_only_where_the_audit_has_shown_it(read):
    whole = "Whole groups (patients, lesions, near-duplicates) are in training or out of it."
    assert whole in read.text
    for audit in (some_audit(leaked=4), {}):
        assert "Whole groups" not in Reader(origin.data(some_inputs(audit=audit)).markup()).text
    unlooked = some_inputs(audit={**some_audit(leaked=0), "near_duplicate_bits": -1})
    unlooked = Reader(origin.data(unlooked).markup()).text
    assert "Whole groups (patients, lesions) are in training or out of it." in unlooked
    assert "No group of a training image is in val or test. Near-duplicates were not looked for." in unlooked
    assert "near-duplicate of" not in unlooked and "in at most -1" not in unlooked


@pytest.mark.parametrize(
    "stage_one, said",
    [
        ({}, "plain cross-entropy"),
        ({"loss": {"name": "none"}, "classification": {"name": "balanced_softmax"}}, "balanced softmax"),
        ({"loss": {"name": "centre", "weight": 0.0}}, "plain cross-entropy"),
        ({"loss": {"name": "centre"}}, "cross-entropy with a centre loss"),
        ({"classification": {"name": "focal"}, "sampling": {"power": 0.5}}, "focal loss with rebalanced sampling"),
        (
            {"classification": {"name": "ldam", "reweight_from": 0.8}},
            "LDAM with weights by class towards the end",
        ),
        (
            {"loss": {"name": "semi_hard_triplet"}, "sampling": {"classes_per_batch": 8, "samples_per_class": 8}},
            "cross-entropy with a semi-hard triplet loss and batches of P classes x K images",
        ),
        (
            {
                "loss": {"name": "proxy_anchor"},
                "classification": {"label_smoothing": 0.1, "reweight_from": 0.0},
                "sampling": {"class_weights": {"a": 1.0}},
            },
            "cross-entropy with a proxy-anchor loss, label smoothing, weights by class and rebalanced sampling",
        ),
    ],
)
def test_the_head_of_the_page_says_what_was_minimised(stage_one, said):
    inputs = some_inputs(config={"stage_one": {"epochs": 2, **stage_one}})
    assert f"trained for 2 epochs by {said} on 1,238 images" in Reader(header(inputs)).text


def test_a_whole_configuration_with_nothing_set_is_plain():
    assert loss_in_words(StageOneConfig(loss=LossConfig(name="none")).model_dump(mode="json")) == "plain cross-entropy"


def test_every_loss_has_a_name_for_people():
    assert set(CLASSIFICATION_LOSS_NAMES) == set(get_args(ClassificationLossName))
    assert set(METRIC_LOSS_NAMES) == set(get_args(MetricLossName)) - {"none"}


def test_second_reading_of_test_and_leaks_are_said_on_top(tmp_path):
    page = _page(some_inputs(test_reads=2, audit=some_audit(leaked=4)), tmp_path)
    read = Reader(page)
    top = page[: page.index("<nav>")]
    assert "Test was read 2 times in this run" in top and "The audit found leaks" in top
    assert "only the first reading is an unbiased estimate" in read.text
    assert "No group and no near-duplicate" not in read.text
    audit = read.text[read.text.index("Leak audit") :]
    assert f"{HOSTILE[1]} 29 / 6 / 6 0 of 7 4 of 7" in audit
    assert audit.index(f"{HOSTILE[1]} 29") < audit.index(f"{HOSTILE[0]} 900"), "what leaks stands first"
    assert "a near-duplicate of another class: 3. Unreadable files: 1." in audit


@pytest.mark.parametrize(
    "gain, expected, said",
    [
        (Gain(0.02, (-0.01, 0.05)), "open", "which may be chance"),
        (Gain(-0.03, (-0.05, -0.01)), "loss", "Balanced accuracy on test fell"),
        (Gain(0.02, (0.001, 0.05)), "gain", "Balanced accuracy on test rose"),
        (None, "open", "No paired interval of the difference was computed"),
    ],
)
def test_verdict_follows_the_paired_interval(gain, expected, said):
    inputs = some_inputs(gain=gain, gain_over_baseline=None)
    assert verdict(gain) == expected
    assert said in Reader(header(inputs)).text


def test_a_run_with_nothing_but_results_has_a_report(tmp_path):
    full, all_fields = some_inputs(config={}), dataclasses.fields(ReportInputs)
    missing = dataclasses.MISSING
    needed = [field.name for field in all_fields if field.default is field.default_factory is missing]
    read = Reader(_page(ReportInputs(**{name: getattr(full, name) for name in needed}), tmp_path))
    what = ("head was searched", "step was logged", "audit was recorded", "map was made", "calibration was recorded")
    for text in (*what, "operating point was recorded", "mistake was recorded"):
        assert f"No {text}" in read.text


def test_many_classes_stay_a_page(tmp_path):
    count = 150
    draw = np.random.default_rng(0)
    counts = {split: draw.integers(1, 20, count).tolist() for split in COUNTS}
    own, winner = (confusion(seed, count, counts["test"]) for seed in (1, 2))
    inputs = some_inputs(
        classes=[f"class {i}" for i in range(count)],
        class_counts=counts,
        rows=[row("own", own), row("winner", winner)],
        own_confusion=own.tolist(),
        winner_confusion=winner.tolist(),
        **{**evidence(winner, count, samples=10), "recall_intervals": (), "mistakes": (), "look_alikes": ()},
    )
    page = _page(inputs, tmp_path)
    read = Reader(page)
    assert "The 60 rarest of 150 classes are listed." in read.text
    assert "Of 150 classes, the 40 confused most." in read.text
    assert len(page) < 5e6
