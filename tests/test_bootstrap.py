"""The bootstrap against a plain loop over resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.test_metrics import NUM_CLASSES, sample
from trainer.bootstrap import bootstrap, decision_measure, interval, mean_measure
from trainer.metrics import METRICS, mean_recall_of
from trainer.score_metrics import area_under_roc, average_precision, calibration_error


def one_interval(metric, labels, predictions, groups, samples, seed):
    measure = decision_measure(metric, labels, predictions, 1 + max(labels.max(), predictions.max()))
    return interval(bootstrap({"it": measure}, groups, samples, seed)["it"])


def resamples(groups, samples, seed):
    """Row numbers of each resample, group by group."""
    names = np.unique(groups)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=samples)
    rows_of = [np.flatnonzero(groups == name) for name in names]
    return [np.concatenate([rows for rows, n in zip(rows_of, draw, strict=True) for _ in range(n)]) for draw in draws]


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
def test_bootstrap_equals_the_loop_over_resamples(metric, chunk_bytes, monkeypatch):
    """Two models see the same resamples."""
    monkeypatch.setattr("trainer.bootstrap.RESAMPLE_BYTES", chunk_bytes)
    labels, predictions = sample(n=80)
    _, baseline = sample(seed=1, n=80)
    groups = np.array([f"lesion {i // 3}" for i in range(80)], dtype=object)
    both = {"ours": predictions, "theirs": baseline}
    measures = {name: decision_measure(metric, labels, p, NUM_CLASSES) for name, p in both.items()}
    values = bootstrap(measures, groups, samples=50, seed=7)
    for name, p in both.items():
        expected = [METRICS[metric](labels[rows], p[rows], NUM_CLASSES) for rows in resamples(groups, 50, seed=7)]
        np.testing.assert_allclose(values[name], expected)
        assert interval(values[name]) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])))


@pytest.mark.parametrize("metric", [area_under_roc, average_precision, calibration_error])
def test_bootstrap_of_probabilities_equals_the_loop_over_resamples(metric):
    labels, _ = sample(n=80)
    probabilities = np.random.default_rng(3).dirichlet(np.ones(NUM_CLASSES), size=80)
    groups = np.arange(80) // 3
    found = bootstrap({"it": lambda weights: metric(labels, probabilities, weights)}, groups, samples=30, seed=7)["it"]
    expected = [metric(labels[rows], probabilities[rows])[0] for rows in resamples(groups, 30, seed=7)]
    np.testing.assert_allclose(found, expected)


def test_the_mean_of_a_figure_leaves_out_samples_without_it():
    values, groups = np.array([0.2, np.nan, 0.9, 0.5]), np.arange(4)
    found = bootstrap({"it": mean_measure(values)}, groups, samples=40, seed=1)["it"]
    expected = [np.mean(values[rows][~np.isnan(values[rows])]) for rows in resamples(groups, 40, seed=1)]
    np.testing.assert_allclose(found, expected)


def test_bootstrap_of_a_tier_leaves_out_resamples_without_it():
    labels, predictions, groups = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), np.arange(4)
    few = mean_recall_of(np.array([False, True]))
    assert one_interval(few, labels, predictions, groups, 100, 0) == (1, 1)
    absent = mean_recall_of(np.array([False, False]))
    assert all(math.isnan(x) for x in one_interval(absent, labels, predictions, groups, 100, 0))


def test_bootstrap_draws_whole_groups():
    # 10 groups of 100 equal samples are 10 observations, not 1,000: the interval must be as wide as for 10.
    right = np.arange(10) % 2
    labels = np.zeros(1000, np.int64)
    whole = one_interval("accuracy", labels, 1 - right.repeat(100), np.arange(10).repeat(100), 2000, 0)
    few = one_interval("accuracy", labels[:10], 1 - right, np.arange(10), 2000, 0)
    assert whole == pytest.approx(few)
    single = one_interval("accuracy", labels, 1 - right.repeat(100), np.arange(1000), 2000, 0)
    assert whole[1] - whole[0] > 5 * (single[1] - single[0])


def test_interval_covers_the_truth_as_often_as_it_says():
    # 200 studies of 60 lesions with 2 pictures each, which are right or wrong together with probability 0.7.
    rng = np.random.default_rng(0)
    labels, groups = np.zeros(120, np.int64), np.arange(60).repeat(2)
    covered = 0
    for seed in range(200):
        wrong = (rng.random(60) > 0.7).astype(np.int64).repeat(2)
        low, high = one_interval("accuracy", labels, wrong, groups, 300, seed)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99
