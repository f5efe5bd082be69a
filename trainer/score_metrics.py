"""Metrics of probabilities rather than of decisions, each of them for many weightings of the samples at once.

A weighting says how often each sample counts: all once, or as a resample of the bootstrap drew it.

Shapes: S weightings, N samples, C classes, L levels (different values of a score).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def area_under_roc(labels: Array, scores: Array, weights: Array | None = None) -> Array:
    """Area under the ROC curve of each class against the rest, ties counting half (Mann-Whitney).

    Args:
        labels: [N].
        scores: [N, C], any increasing function of the class's probability.
        weights: [S, N]; None = every sample once.

    Returns:
        [S, C]; NaN where a class, or its rest, has no sample.
    """

    def of_class(positive: Array, negative: Array) -> Array:
        below = np.cumsum(negative, axis=1) - negative
        pairs = (positive * (below + negative / 2)).sum(axis=1)
        return _ratio(pairs, positive.sum(axis=1) * negative.sum(axis=1))

    return _by_class(labels, scores, weights, of_class)


def average_precision(labels: Array, scores: Array, weights: Array | None = None) -> Array:
    """Average precision of each class against the rest: sum of (R_k - R_(k-1)) P_k over the thresholds (scikit-learn).

    Arguments and result as in `area_under_roc`; NaN where a class has no sample.
    """

    def of_class(positive: Array, negative: Array) -> Array:
        found = np.cumsum(positive[:, ::-1], axis=1)  # from the highest score down
        passed = found + np.cumsum(negative[:, ::-1], axis=1)
        precision = np.divide(found, passed, out=np.zeros(found.shape), where=passed > 0)
        return _ratio((positive[:, ::-1] * precision).sum(axis=1), positive.sum(axis=1))

    return _by_class(labels, scores, weights, of_class)


def sensitivity_at(specificity: float, labels: Array, scores: Array, weights: Array | None = None) -> Array:
    """The largest share of each class that a threshold finds while it leaves `specificity` of the rest alone.

    The point of the ROC curve of each class against the rest with the highest true-positive rate among those whose
    false-positive rate is at most 1 - specificity. Arguments and result as in `area_under_roc`.
    """

    def of_class(positive: Array, negative: Array) -> Array:
        found = np.cumsum(positive[:, ::-1], axis=1)  # from the highest score down
        alarms = np.cumsum(negative[:, ::-1], axis=1)
        rest = negative.sum(axis=1, keepdims=True)
        best = (found * (alarms <= _allowed_alarms(specificity, rest))).max(axis=1)
        return np.where(rest[:, 0] > 0, _ratio(best, positive.sum(axis=1)), np.nan)

    return _by_class(labels, scores, weights, of_class)


def threshold_at(specificity: float, labels: Array, scores: Array) -> Array:
    """Where `sensitivity_at` cuts: a sample with at least that score is called the class.

    Returns:
        [C]; infinity where no threshold finds any of the class, NaN where a class, or its rest, has no sample.
    """
    thresholds = np.full(scores.shape[1], np.nan)
    for c in range(scores.shape[1]):
        own, rest = np.unique(scores[labels == c, c]), np.sort(scores[labels != c, c])
        if len(own) and len(rest):
            alarms = len(rest) - np.searchsorted(rest, own, side="left")
            low_enough = alarms <= _allowed_alarms(specificity, len(rest))
            thresholds[c] = own[low_enough][0] if low_enough.any() else np.inf
    return thresholds


def calibration_error(labels: Array, probabilities: Array, weights: Array | None = None, bins: int = 15) -> Array:
    """Mean gap between confidence and accuracy over equal bins of confidence, weighted by their samples.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), eq. 3. Bin m holds the samples
    whose largest probability is in ((m - 1) / bins, m / bins].

    Args:
        labels: [N].
        probabilities: [N, C], rows sum to 1.
        weights: [S, N]; None = every sample once.
        bins: M of the paper.

    Returns:
        [S].
    """
    weights = np.ones((1, len(labels))) if weights is None else weights
    confidence, correct, in_bin = _confidence_bins(labels, probabilities, bins)
    gaps = weights @ (in_bin * (correct - confidence)[:, None])
    return _ratio(np.abs(gaps).sum(axis=1), weights.sum(axis=1))


def reliability(
    labels: Array, probabilities: Array, weights: Array | None = None, bins: int = 15
) -> tuple[Array, Array, Array]:
    """What the calibration error is made of: samples, mean confidence and accuracy of each of its bins.

    Arguments as in `calibration_error`.

    Returns:
        Three of [S, bins]; confidence and accuracy of a bin without samples are NaN.
    """
    weights = np.ones((1, len(labels))) if weights is None else weights
    confidence, correct, in_bin = _confidence_bins(labels, probabilities, bins)
    samples = weights @ in_bin.astype(np.float64)
    mean_confidence, accuracy = (_ratio(weights @ (in_bin * x[:, None]), samples) for x in (confidence, correct))
    return samples, mean_confidence, accuracy


def _confidence_bins(labels: Array, probabilities: Array, bins: int) -> tuple[Array, Array, Array]:
    """Confidence [N], whether the decision is right [N], and which bin each sample is in [N, bins]."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    # Inner edges only: confidence 0 falls into the first bin and a rounded 1.0000001 into the last.
    which = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], confidence, side="left")
    return confidence, probabilities.argmax(axis=1) == labels, which[:, None] == np.arange(bins)


def _allowed_alarms(specificity: float, rest: Any) -> Any:
    """False alarms that a specificity allows; 0.9 of 10 allows one, though 1 - 0.9 is a hair less than 0.1."""
    return (1 - specificity) * rest + 1e-9 * rest


def _by_class(labels: Array, scores: Array, weights: Array | None, of_class: Any) -> Array:
    """`of_class(positive, negative)` for each class: weights [S, L] of its samples and of the rest, by rising score."""
    weights = np.ones((1, len(labels))) if weights is None else weights
    results = np.full((len(weights), scores.shape[1]), np.nan)
    for c in range(scores.shape[1] if len(labels) else 0):
        order = np.argsort(scores[:, c], kind="stable")
        starts = np.flatnonzero(np.diff(scores[order, c], prepend=-np.inf))
        own = (labels == c)[order]
        ordered = weights[:, order]
        positive, negative = (np.add.reduceat(ordered * side, starts, axis=1) for side in (own, ~own))
        results[:, c] = of_class(positive.astype(np.float64), negative.astype(np.float64))
    return results


def _ratio(numerator: Array, denominator: Array) -> Array:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)
