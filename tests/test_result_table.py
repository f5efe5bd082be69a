"""The table of results: every figure and its interval, and paired differences."""

import numpy as np
import pytest

from trainer.metrics import METRICS
from trainer.result_table import HeldOutSet, Judged, difference, result_rows
from trainer.retrieval import Retrieval
from trainer.score_metrics import area_under_roc, calibration_error

LABELS = np.repeat([0, 1, 2], [60, 25, 5])
HELD_OUT = HeldOutSet(LABELS, np.arange(90) // 2, np.array(["many", "medium", "few"]), samples=200, seed=0)


def model(name, knows):
    rng = np.random.default_rng(1)
    scores = rng.dirichlet(np.ones(3), size=90) + knows * np.eye(3)[LABELS]
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    return Judged(name, name, probabilities, probabilities**2, Retrieval(rng.random(90).round(), rng.random(90)))


@pytest.fixture(scope="module")
def rows():
    return result_rows([model("weak", 0.2), model("strong", 1.0)], HELD_OUT)


def test_rows_hold_each_figure_with_its_interval(rows):
    strong = model("strong", 1.0)
    for name, metric in METRICS.items():
        assert rows[1][name] == pytest.approx(metric(LABELS, strong.predictions, 3))
    assert rows[1]["auc"] == pytest.approx(area_under_roc(LABELS, strong.probabilities)[0].mean())
    assert rows[1]["ece_before"] == pytest.approx(calibration_error(LABELS, strong.uncalibrated)[0])
    assert rows[1]["map_at_r"] == pytest.approx(strong.found.average_precision.mean())
    for name, (low, high) in rows[1]["intervals"].items():
        assert low <= rows[1][name] + 0.1 and rows[1][name] - 0.1 <= high, name
    assert list(rows[1]["interval"]) == rows[1]["intervals"]["balanced_accuracy"]
    assert len(rows[1]["per_class_auc"]) == len(rows[1]["per_class_average_precision"]) == 3


def test_differences_are_paired(rows):
    found = difference(model("strong", 1.0), model("weak", 0.2), HELD_OUT)
    assert found["value"] == pytest.approx(rows[1]["balanced_accuracy"] - rows[0]["balanced_accuracy"])
    assert found["interval"][0] > 0 and found["figures"]["auc"]["interval"][0] > 0
    same = difference(model("strong", 1.0), model("strong", 1.0), HELD_OUT)
    assert same["value"] == 0 and list(same["interval"]) == [0, 0]
    assert same["figures"]["recall_at_1"] == {"value": 0, "interval": [0, 0]}


def test_a_set_too_large_for_areas_leaves_their_interval_out(monkeypatch):
    monkeypatch.setattr("trainer.result_table.RANKING_BUDGET", 1)
    row = result_rows([model("strong", 1.0)], HELD_OUT)[0]
    assert "auc" not in row["intervals"] and row["auc"] > 0.9
