"""Metrics against scikit-learn, the bootstrap against a plain loop over resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from cluster.errors import UserError
from trainer import metrics
from trainer.metrics import (
    METRICS,
    balanced_accuracy,
    bootstrap_difference,
    bootstrap_interval,
    class_tiers,
    confusion,
    expected_calibration_error,
    group_recall,
    macro_f1,
    mean_recall_of,
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


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_the_plain_loop(bins):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=500)
    probabilities[:3] = [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.4, 0.2, 0.2, 0.2]]  # on the edges of bins
    labels = rng.integers(0, 4, size=500)
    expected = 0.0
    for m in range(bins):
        inside = [i for i in range(500) if m / bins < probabilities[i].max() <= (m + 1) / bins]
        if inside:
            accuracy = np.mean([probabilities[i].argmax() == labels[i] for i in inside])
            confidence = np.mean([probabilities[i].max() for i in inside])
            expected += len(inside) / 500 * abs(accuracy - confidence)
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def resamples(groups, samples, seed):
    """Row numbers of each resample, group by group."""
    names = np.unique(groups)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    rows_of = [np.flatnonzero(groups == name) for name in names]
    return [np.concatenate([rows for rows, n in zip(rows_of, draw, strict=True) for _ in range(n)]) for draw in draws]


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
def test_bootstrap_equals_the_loop_over_resamples(metric, chunk_bytes, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLE_BYTES", chunk_bytes)
    labels, predictions = sample(n=80)
    _, baseline = sample(seed=1, n=80)
    groups = np.array([f"lesion {i // 3}" for i in range(80)], dtype=object)
    ours, theirs = (
        np.array([METRICS[metric](labels[rows], p[rows], NUM_CLASSES) for rows in resamples(groups, 50, seed=7)])
        for p in (predictions, baseline)
    )
    low, high = bootstrap_interval(metric, labels, predictions, groups, samples=50, seed=7)
    assert (low, high) == pytest.approx(tuple(np.quantile(ours, [0.025, 0.975])))
    low, high = bootstrap_difference(metric, labels, predictions, baseline, groups, samples=50, seed=7)
    assert (low, high) == pytest.approx(tuple(np.quantile(ours - theirs, [0.025, 0.975])))


def test_bootstrap_of_a_tier_leaves_out_resamples_without_it():
    labels, predictions, groups = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), np.arange(4)
    few = mean_recall_of(np.array([False, True]))
    assert bootstrap_interval(few, labels, predictions, groups, samples=100, seed=0) == (1, 1)
    absent = mean_recall_of(np.array([False, False]))
    assert all(math.isnan(x) for x in bootstrap_interval(absent, labels, predictions, groups, samples=100, seed=0))


def test_bootstrap_draws_whole_groups():
    # 10 groups of 100 equal samples are 10 observations, not 1,000: the interval must be as wide as for 10.
    right = np.arange(10) % 2
    labels = np.zeros(1000, np.int64)
    whole = bootstrap_interval("accuracy", labels, 1 - right.repeat(100), np.arange(10).repeat(100), 2000, 0)
    few = bootstrap_interval("accuracy", labels[:10], 1 - right, np.arange(10), 2000, 0)
    assert whole == pytest.approx(few)
    single = bootstrap_interval("accuracy", labels, 1 - right.repeat(100), np.arange(1000), 2000, 0)
    assert whole[1] - whole[0] > 5 * (single[1] - single[0])


def test_interval_covers_the_truth_as_often_as_it_says():
    # 200 studies of 60 lesions with 2 pictures each, which are right or wrong together with probability 0.7.
    rng = np.random.default_rng(0)
    labels, groups = np.zeros(120, np.int64), np.arange(60).repeat(2)
    covered = 0
    for seed in range(200):
        wrong = (rng.random(60) > 0.7).astype(np.int64).repeat(2)
        low, high = bootstrap_interval("accuracy", labels, wrong, groups, 300, seed)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99
