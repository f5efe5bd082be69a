"""Areas under curves against scikit-learn, with weights too; calibration and retrieval against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from trainer.retrieval import retrieval
from trainer.score_metrics import (
    area_under_roc,
    average_precision,
    calibration_error,
    sensitivity_at,
    threshold_at,
)


def scored(seed, n=200):
    """Labels of 4 classes, none of class 3; probabilities that know something, many of them tied."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=n, p=[0.7, 0.25, 0.05])
    scores = rng.dirichlet(np.ones(4), size=n) + 0.3 * np.eye(4)[labels]
    return labels, np.round(scores / scores.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"), [(area_under_roc, sk.roc_auc_score), (average_precision, sk.average_precision_score)]
)
def test_areas_equal_scikit_learn(ours, theirs, seed):
    labels, scores = scored(seed)
    weights = np.random.default_rng(seed).integers(0, 4, size=(5, len(labels)))
    found = np.concatenate([ours(labels, scores), ours(labels, scores, weights)])
    for row, weight in zip(found, [np.ones(len(labels)), *weights], strict=True):
        for c in range(3):
            assert row[c] == pytest.approx(theirs(labels == c, scores[:, c], sample_weight=weight), abs=1e-12)
        assert np.isnan(row[3])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("specificity", [0.5, 0.9, 0.95, 0.99, 1.0])
def test_sensitivity_at_a_specificity_equals_scikit_learn(specificity, seed):
    labels, scores = scored(seed)
    weights = np.random.default_rng(seed).integers(0, 4, size=(5, len(labels)))
    found = np.concatenate([sensitivity_at(specificity, labels, scores, w) for w in (None, weights)])
    thresholds = threshold_at(specificity, labels, scores)
    for row, weight in zip(found, [np.ones(len(labels)), *weights], strict=True):
        for c in range(3):
            curve = sk.roc_curve(labels == c, scores[:, c], sample_weight=weight, drop_intermediate=False)
            false_alarms, sensitivity, cuts = curve
            allowed = false_alarms <= 1 - specificity + 1e-9
            assert row[c] == pytest.approx(sensitivity[allowed].max(), abs=1e-12)
            if row is found[0]:
                assert thresholds[c] == cuts[allowed][sensitivity[allowed].argmax()]
        assert np.isnan(row[3])
    assert np.isnan(thresholds[3])


def test_a_class_without_a_rest_has_no_area():
    scores = np.array([[0.9], [0.2]])
    assert np.isnan(area_under_roc(np.array([0, 0]), scores)).all()
    assert average_precision(np.array([0, 0]), scores).tolist() == [[1.0]]
    assert np.isnan(sensitivity_at(0.9, np.array([0, 0]), scores)).all()
    assert np.isnan(threshold_at(0.9, np.array([0, 0]), scores)).all()


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
    assert calibration_error(labels, probabilities, bins=bins)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 64 << 20])
def test_retrieval_equals_the_plain_loop(normalise, block_bytes, monkeypatch):
    monkeypatch.setattr("trainer.retrieval.BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    labels = np.array([0] * 20 + [1] * 7 + [2] * 2 + [3])
    x = rng.normal(size=(30, 5)).astype(np.float32) + np.eye(5)[labels]
    found = retrieval(x, labels, normalise)
    points = x / np.linalg.norm(x, axis=1, keepdims=True) if normalise else x
    for i in range(30):
        others = sorted((j for j in range(30) if j != i), key=lambda j: np.linalg.norm(points[i] - points[j]))
        relevant = sum(labels[j] == labels[i] for j in others)
        if not relevant:
            assert np.isnan(found.hit[i]) and np.isnan(found.average_precision[i])
            continue
        hits = [labels[j] == labels[i] for j in others[:relevant]]
        precision = [np.mean(hits[: k + 1]) for k in range(relevant) if hits[k]]
        assert found.hit[i] == hits[0]
        assert found.average_precision[i] == pytest.approx(sum(precision) / relevant, abs=1e-6)


def test_retrieval_tells_neighbours_far_from_the_origin():
    """Raw features: groups of three at distances of .02 and .03, 8,000 from the origin and from each other."""
    centres = 1000 * np.random.default_rng(0).normal(size=(20, 1, 64))
    x = (centres + np.array([0.0, 0.02, 0.05])[:, None] * np.eye(64)[0]).reshape(60, 64)
    found = retrieval(x.astype(np.float32), np.tile([0, 0, 1], 20), normalise=False)
    assert found.hit.reshape(20, 3).tolist() == [[1, 1, 0]] * 20
    copies = retrieval(np.repeat(x[::3][:5], 3, axis=0), np.tile([0, 1, 0], 5), normalise=False)
    assert copies.hit.reshape(5, 3).tolist() == [[0, 0, 1]] * 5  # of equal ones the first


def test_retrieval_of_nothing():
    empty = retrieval(np.empty((0, 4)), np.empty(0, dtype=np.int64))
    assert len(empty.hit) == 0 == len(empty.average_precision)
