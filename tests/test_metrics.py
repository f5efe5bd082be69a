"""Metrics of decisions against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from cluster.errors import UserError
from trainer.metrics import (
    METRICS,
    balanced_accuracy,
    class_tiers,
    confusion,
    group_recall,
    macro_f1,
    per_class_precision,
    per_class_recall,
    worst_recall,
)

NUM_CLASSES = 6


def sample(seed=0, n=300):
    """Long-tailed labels and half-right predictions; class 4 is never labelled, class 5 never predicted."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 3, 5], size=n, p=[0.5, 0.3, 0.12, 0.05, 0.03])
    predictions = np.where(rng.random(n) < 0.5, labels, rng.integers(0, 5, size=n))
    predictions[predictions == 5] = 0
    return labels, predictions


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learn(seed):
    labels, predictions = sample(seed)
    recall = sk.recall_score(labels, predictions, labels=range(NUM_CLASSES), average=None, zero_division=np.nan)
    precision = sk.precision_score(labels, predictions, labels=range(NUM_CLASSES), average=None, zero_division=0)
    expected = {
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions),
        "macro_f1": sk.f1_score(labels, predictions, average="macro", zero_division=0),
        "worst_recall": np.nanmin(recall),
        "accuracy": sk.accuracy_score(labels, predictions),
    }
    assert {name: metric(labels, predictions, NUM_CLASSES) for name, metric in METRICS.items()} == pytest.approx(
        expected
    )
    np.testing.assert_allclose(per_class_recall(labels, predictions, NUM_CLASSES), recall)
    np.testing.assert_allclose(per_class_precision(labels, predictions, NUM_CLASSES), precision)
    assert math.isnan(recall[4]) and precision[5] == 0
    matrix = sk.confusion_matrix(labels, predictions, labels=range(NUM_CLASSES))
    np.testing.assert_array_equal(confusion(labels, predictions, NUM_CLASSES), matrix)


def test_perfect_single_class_and_no_samples():
    labels = np.array([2, 2, 2])
    assert balanced_accuracy(labels, labels, 5) == macro_f1(labels, labels, 5) == worst_recall(labels, labels, 5) == 1
    empty = np.empty(0, np.int64)
    assert all(math.isnan(metric(empty, empty, 5)) for metric in METRICS.values())


def test_class_outside_the_range_is_refused():
    with pytest.raises(ValueError, match=r"^predictions: classes 0 to 3 are not all in \[0, 3\)$"):
        confusion(np.array([0, 1]), np.array([0, 3]), 3)


def test_tiers_by_thirds_and_by_count():
    counts = np.array([5, 1000, 40, 300, 5, 90, 12])
    assert class_tiers(counts).tolist() == ["few", "many", "medium", "many", "few", "many", "medium"]
    assert class_tiers(counts, many_above=100, few_below=20).tolist() == [
        *("few", "many", "medium", "many", "few", "medium", "few")
    ]
    assert class_tiers(counts, many_above=40, few_below=41).tolist().count("medium") == 0


@pytest.mark.parametrize(
    "counts, tiers",
    [([5, 40], ["few", "many"]), ([40, 5], ["many", "few"]), ([7, 7], ["many", "few"]), ([3], ["few"]), ([], [])],
)
def test_the_rarest_of_fewer_than_three_classes_is_few(counts, tiers):
    assert class_tiers(np.array(counts)).tolist() == tiers


def test_tiers_that_do_not_part_the_classes_are_refused():
    message = (
        r"^evaluation.many_above = 20 and evaluation.few_below = 100 do not part the classes; give both, with "
        r"few_below at most many_above \+ 1, or neither for thirds of the classes$"
    )
    with pytest.raises(UserError, match=message):
        class_tiers(np.array([1, 2, 3]), many_above=20, few_below=100)
    with pytest.raises(UserError, match=r"evaluation.many_above = 20 and evaluation.few_below = None do not part"):
        class_tiers(np.array([1, 2, 3]), many_above=20)


def test_group_recall_is_the_mean_over_the_tiers_present_classes():
    labels, predictions = sample()
    tiers = np.array(["many", "many", "medium", "medium", "few", "few"])
    recall = sk.recall_score(labels, predictions, labels=range(NUM_CLASSES), average=None, zero_division=np.nan)
    expected = {"many": recall[:2].mean(), "medium": recall[2:4].mean(), "few": recall[5]}
    assert group_recall(labels, predictions, tiers) == pytest.approx(expected)
    tiers[5] = "medium"  # only the class without labels is left in "few"
    assert math.isnan(group_recall(labels, predictions, tiers)["few"])
