"""The table of results: every figure and its interval, and paired differences."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from tests.test_bootstrap import resamples
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


def by_scikit_learn(judged, chosen):
    """Every figure of some samples, one by one."""
    labels, said, probabilities = LABELS[chosen], judged.predictions[chosen], judged.probabilities[chosen]
    recall = sk.recall_score(labels, said, labels=range(3), average=None, zero_division=np.nan)
    one = [labels == c for c in range(3)]
    areas = [sk.roc_auc_score(one[c], probabilities[:, c]) if any(one[c]) else np.nan for c in range(3)]
    precisions = [sk.average_precision_score(one[c], probabilities[:, c]) if any(one[c]) else np.nan for c in range(3)]
    return {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said),
        "macro_f1": sk.f1_score(labels, said, average="macro", zero_division=0),
        "worst_recall": np.nanmin(recall),
        "accuracy": sk.accuracy_score(labels, said),
        **dict(zip(("many", "medium", "few"), recall, strict=True)),
        "ece": calibration_error(labels, probabilities)[0],
        "ece_before": calibration_error(labels, judged.uncalibrated[chosen])[0],
        "auc": np.nanmean(areas),
        "average_precision": np.nanmean(precisions),
        "recall_at_1": judged.found.hit[chosen].mean(),
        "map_at_r": judged.found.average_precision[chosen].mean(),
        "per_class_recall": recall,
        "per_class_precision": sk.precision_score(labels, said, labels=range(3), average=None, zero_division=0),
        "per_class_auc": np.array(areas),
        "per_class_average_precision": np.array(precisions),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_every_interval_and_that_of_every_difference_is_of_scikit_learn_s_figures():
    """Resample by resample of whole groups; a class that a resample lacks is left out of it."""
    weak, strong, few = model("weak", 0.2), model("strong", 1.0), replace(HELD_OUT, samples=50)
    drawn = resamples(few.groups, few.samples, few.seed)
    figures = [{model.name: by_scikit_learn(model, chosen) for model in (weak, strong)} for chosen in drawn]
    (row,), found = result_rows([strong], few), difference(strong, weak, few)
    told, compared = row["intervals"] | row["class_intervals"], found["figures"] | found["class_figures"]
    assert told.keys() == compared.keys() == figures[0]["strong"].keys()
    for name, ends in told.items():
        values = np.array([figure["strong"][name] for figure in figures])
        others = np.array([figure["weak"][name] for figure in figures])
        expected = np.nanquantile(values, [0.025, 0.975], axis=0).T
        np.testing.assert_allclose(np.array(ends), expected, atol=1e-9, err_msg=name)
        expected = np.nanquantile(values - others, [0.025, 0.975], axis=0).T
        np.testing.assert_allclose(np.array(compared[name]["interval"]), expected, atol=1e-9, err_msg=name)
        once = by_scikit_learn(strong, np.arange(90))[name] - by_scikit_learn(weak, np.arange(90))[name]
        np.testing.assert_allclose(np.array(compared[name]["value"]), once, atol=1e-9, err_msg=name)


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
