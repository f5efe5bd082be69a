"""The report's charts draw the numbers that they are given: read back from matplotlib's own objects."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from tests.reports import some_inputs
from trainer import evidence, figures, judgement_figures
from trainer.figures import FAINTEST_CELL, FULLEST_CELL
from trainer.findings import row_shares
from trainer.svg import BLUE, GREY, INK, PAPER, VERMILLION, to_svg

CLASSES = ("melanoma", "naevus", "keratosis", "scar")
COUNTS = (40, 900, 200, 12)
BEFORE, AFTER = (0.2, 0.9, 0.6, None), (0.7, 0.8, 0.6, 0.5)


@pytest.fixture
def drawn(monkeypatch):
    """Name -> axes of each figure that is made; the page gets its SVG all the same."""
    kept = {}

    def keep(figure, name, description):
        kept[name] = figure.axes[0]
        return to_svg(figure, name, description)

    for module in (figures, judgement_figures):
        monkeypatch.setattr(module, "to_svg", keep)
    return kept


def marks(axes):
    """Places [N, 2] and colours of each scatter, in the order of drawing."""
    scatters = [found for found in axes.collections if isinstance(found, PathCollection)]
    return [
        (np.asarray(found.get_offsets()), [to_hex(colour) for colour in found.get_facecolors()]) for found in scatters
    ]


def rings(axes):
    """Places of hollow single marks."""
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in hollow]


def segments(axes):
    """Ends of the vertical lines, [N, 2, 2]."""
    (lines,) = (found for found in axes.collections if isinstance(found, LineCollection))
    return np.array(lines.get_segments())


def curves(axes):
    """Label -> points [N, 2] of each curve that the legend names."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): np.array(line.get_xydata()) for line in named}


def named_classes(axes):
    return {text.get_text(): text.xy for text in axes.texts if isinstance(text, Annotation)}


def test_recall_has_a_ring_before_and_a_dot_after(drawn):
    figures.recall_by_frequency(COUNTS, BEFORE, AFTER, CLASSES)
    axes = drawn["recall"]
    (before, ring), (after, dot) = marks(axes)
    np.testing.assert_array_equal(before, [(40, 0.2), (900, 0.9), (200, 0.6)])
    np.testing.assert_array_equal(after, [(40, 0.7), (900, 0.8), (200, 0.6)])
    np.testing.assert_array_equal(segments(axes), np.stack([before, after], axis=1))
    assert set(ring) == {PAPER} and dot == [BLUE, VERMILLION, BLUE]
    assert named_classes(axes) == {"melanoma": (40, 0.7), "naevus": (900, 0.8)}


@pytest.mark.parametrize(
    "after, named",
    [
        ((0.7, 0.95, 0.65, None), {"melanoma"}),
        ((0.1, 0.8, 0.4, None), {"keratosis"}),
        ((0.2, 0.9, 0.6, None), set()),
        ((0.3, 0.5, 0.6, None), {"melanoma", "naevus"}),
    ],
    ids=["none fell", "none rose", "nothing moved", "both"],
)
def test_the_largest_rise_is_one_and_the_largest_fall_too(drawn, after, named):
    """Where all classes rose, the smallest rise is no fall."""
    figures.recall_by_frequency(COUNTS, BEFORE, after, CLASSES)
    assert set(named_classes(drawn["recall"])) == named


def test_a_confusion_holds_the_shares_of_each_true_class(drawn):
    counts = [[6, 2, 0, 0], [1, 97, 2, 0], [0, 30, 10, 0], [0, 0, 0, 0]]
    shares = row_shares(counts)
    figures.confusion(shares, CLASSES, "x")
    axes = drawn["confusion-x"]
    cells = {(int(p.get_y()), int(p.get_x())): p for p in axes.patches if isinstance(p, Rectangle)}
    assert set(cells) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2)}
    for (row, column), patch in cells.items():
        opacity = FAINTEST_CELL + (FULLEST_CELL - FAINTEST_CELL) * counts[row][column] / sum(counts[row])
        assert patch.get_alpha() == pytest.approx(opacity)
        assert to_hex(patch.get_facecolor()) == (BLUE if row == column else VERMILLION)
    written = {(int(text.get_position()[1]), int(text.get_position()[0])): text for text in axes.texts}
    assert {place: text.get_text() for place, text in written.items()} == {
        (0, 0): "75", (0, 1): "25", (1, 0): "1", (1, 1): "97", (1, 2): "2", (2, 1): "75", (2, 2): "25",
    }  # fmt: skip
    assert {text.get_color() for text in written.values()} == {INK}
    assert [label.get_text() for label in axes.get_yticklabels()] == list(CLASSES)


def test_both_confusions_of_the_page_are_those_of_the_models(drawn):
    inputs = some_inputs()
    evidence.confusions(inputs)
    order = [0, 2, 4, 1, 3]  # commonest first
    for when, counts in (("after", inputs.winner_confusion), ("before", inputs.own_confusion)):
        shares = row_shares(counts)[np.ix_(order, order)]
        for text in drawn[f"confusion-{when}"].texts:
            column, row = (int(place) for place in text.get_position())
            assert text.get_text() == f"{100 * shares[row, column]:.0f}"
        assert len(drawn[f"confusion-{when}"].texts) == (shares >= 0.005).sum()


def test_reliability_has_the_bins_before_and_after(drawn):
    calibration = some_inputs().calibration
    judgement_figures.reliability_diagram(calibration)
    axes = drawn["reliability"]
    (before, ring), (after, dot) = marks(axes)
    for places, bins in ((before, calibration.before), (after, calibration.after)):
        np.testing.assert_allclose(places, np.array([bins.confidence, bins.accuracy]).T)
    assert set(ring) == {PAPER} and set(dot) == {BLUE}
    ends = [
        [(x, low), (x, high)]
        for x, (low, high) in zip(calibration.after.confidence, calibration.after.intervals, strict=True)
    ]
    np.testing.assert_allclose(segments(axes), ends)
    assert {to_hex(line.get_color()) for line in axes.lines} >= {GREY}, "the course before the temperature"


EPOCHS = [
    {"epoch": e, "balanced_accuracy": b, "macro_f1": f} for e, b, f in ((0, 0.4, 0.3), (1, 0.7, 0.4), (2, 0.6, 0.5))
]


@pytest.mark.parametrize("by, kept, ring", [("macro_f1", 2, (3, 0.5)), ("balanced_accuracy", 0, (1, 0.4))])
def test_the_ring_is_at_the_epoch_that_was_kept_on_the_metric_that_chose_it(drawn, by, kept, ring):
    """Also where it is not the best that was logged: its checkpoint may be gone, or the choice of heads another's."""
    figures.validation_curve(EPOCHS, by, EPOCHS[:2], kept)
    axes = drawn["validation"]
    assert rings(axes) == [ring]
    found = curves(axes)
    np.testing.assert_array_equal(found["balanced accuracy"], [(1, 0.4), (2, 0.7), (3, 0.6)])
    np.testing.assert_array_equal(found["macro F1"], [(1, 0.3), (2, 0.4), (3, 0.5)])
    np.testing.assert_array_equal(found["plain cross-entropy"], [(e["epoch"] + 1, e[by]) for e in EPOCHS[:2]])


def test_an_epoch_that_is_not_known_has_no_ring(drawn):
    figures.validation_curve(EPOCHS, "balanced_accuracy", [], None)
    assert rings(drawn["validation"]) == [] and "plain cross-entropy" not in curves(drawn["validation"])


def test_the_page_takes_stage_ones_own_metric_for_the_ring(drawn):
    """Heads may be chosen by another one."""
    stage = {"epochs": 2, "select_by": "macro_f1", "classification": {"name": "balanced_softmax"}}
    history = [
        *({"stage": "stage_one", "kind": "epoch", **epoch} for epoch in EPOCHS),
        *({"stage": "stage_one", "kind": "step", "step": s, "loss": 3 / s, "cross_entropy": 1 / s, "metric_loss": 2 / s}
          for s in range(1, 6)),
    ]  # fmt: skip
    inputs = some_inputs(config={"stage_one": stage}, history=history, kept_epoch=2, select_by="balanced_accuracy")
    assert "the ring marks the epoch that was kept" in evidence.training(inputs).content
    assert rings(drawn["validation"]) == [(3, 0.5)]
    found = curves(drawn["loss"])
    assert set(found) == {"loss", "balanced softmax", "metric loss"}
    for name, of_step in (("loss", 3), ("balanced softmax", 1), ("metric loss", 2)):
        np.testing.assert_allclose(found[name], [(s, of_step / s) for s in range(1, 6)])
    unknown = some_inputs(config={"stage_one": stage}, history=history, kept_epoch=None)
    assert "ring" not in evidence.training(unknown).content


def test_a_long_loss_is_a_running_mean_over_its_raw_values(drawn):
    values = np.random.default_rng(0).uniform(size=400)
    figures.loss_curve([{"step": step, "loss": value} for step, value in enumerate(values)], "cross-entropy")
    raw, mean = (np.array(line.get_ydata()) for line in drawn["loss"].lines)
    np.testing.assert_array_equal(raw, values)
    np.testing.assert_allclose(mean[20:380], [values[i - 5 : i + 5].mean() for i in range(20, 380)])


def test_the_head_that_is_ringed_is_the_one_that_was_chosen(drawn):
    """With the highest lower bound, though another of its family has a better score."""
    search = [
        {"head": 0, "family": "crt", "score": 0.9, "lower_bound": None, "power": 0.1},
        {"head": 1, "family": "crt", "score": 0.8, "lower_bound": 0.75, "power": 0.4},
        {"head": 2, "family": "lws", "score": 0.85, "lower_bound": 0.6, "power": None},
        {"head": 3, "family": "lws", "score": None, "lower_bound": None, "power": None},
    ]
    content = evidence.search(some_inputs(search=search)).content
    axes = drawn["families"]
    (crt, _), (lws, _) = marks(axes)
    assert crt[:, 0].tolist() == [0.9, 0.8] and lws[:, 0].tolist() == [0.85]
    assert rings(axes) == [(0.8, pytest.approx(crt[1, 1])), (0.85, pytest.approx(lws[0, 1]))]
    assert "score of the chosen head" in content and "best score</th>" not in content
    knobs, _ = marks(drawn["knob-power"])[0]
    np.testing.assert_array_equal(knobs, [(0.1, 0.9), (0.4, 0.8)])


def test_speed_is_drawn_as_it_was_logged(drawn):
    figures.throughput_curve([{"step": 1, "images_per_s": 10.0}, {"step": 2}, {"step": 3, "images_per_s": 14.0}])
    np.testing.assert_array_equal(drawn["throughput"].lines[0].get_xydata(), [(1, 10), (3, 14)])
