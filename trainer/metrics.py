"""Metrics of imbalanced classification that follow from decisions. numpy only.

Every metric here follows from three counts a class (`ClassCounts`), so that 1,000 resamples of a bootstrap
(`trainer.bootstrap`) are a few array operations. A class that occurs in no label has no recall and is left out of
means; so is, in a resample, a class that was not drawn.

Shapes: N samples, C classes, S weightings of the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import UserError

Array = np.ndarray[Any, Any]
TIERS = ("many", "medium", "few")


@dataclass(frozen=True)
class ClassCounts:
    """What the metrics need of labels and predictions; leading axes are resamples.

    Attributes:
        correct: [..., C], samples of the class that were predicted as it.
        labelled: [..., C], samples of the class.
        predicted: [..., C], samples predicted as the class.
    """

    correct: Array
    labelled: Array
    predicted: Array

    def recall(self) -> Array:
        """[..., C]; NaN for a class without samples."""
        return _ratio(self.correct, self.labelled, np.nan)

    def precision(self) -> Array:
        """[..., C]; 0 for a class that was never predicted (scikit-learn's zero_division = 0)."""
        return _ratio(self.correct, self.predicted, 0.0)


CountMetric = Callable[[ClassCounts], Array]


def _accuracy(counts: ClassCounts) -> Array:
    return _ratio(counts.correct.sum(-1), counts.labelled.sum(-1), np.nan)


def _balanced_accuracy(counts: ClassCounts) -> Array:
    return _mean_present(counts.recall())


def _worst_recall(counts: ClassCounts) -> Array:
    recall = counts.recall()
    worst = np.min(recall, axis=-1, where=~np.isnan(recall), initial=np.inf)
    return np.where(np.isinf(worst), np.nan, worst)


def _macro_f1(counts: ClassCounts) -> Array:
    return _mean_present(_ratio(2 * counts.correct, counts.labelled + counts.predicted, np.nan))


def mean_recall_of(members: Array) -> CountMetric:
    """Mean recall over some classes as a metric for the bootstrap; NaN where none of them is present.

    Args:
        members: [C] bool.
    """
    return lambda counts: _mean_present(np.where(members, counts.recall(), np.nan))


# The headline and its companions; each also a name for `bootstrap_interval`.
COUNT_METRICS: dict[str, CountMetric] = {
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _macro_f1,
    "worst_recall": _worst_recall,
    "accuracy": _accuracy,
}


def class_counts(labels: Array, predictions: Array, num_classes: int) -> ClassCounts:
    """Count correct, labelled and predicted samples a class, from labels [N] and predictions [N]."""
    _check_classes(num_classes, labels=labels, predictions=predictions)
    hits = labels[labels == predictions]
    return ClassCounts(*(np.bincount(x, minlength=num_classes) for x in (hits, labels, predictions)))


def weighted_counts(labels: Array, predictions: Array, num_classes: int, weights: Array) -> ClassCounts:
    """`class_counts` where sample n counts `weights[s, n]` times, [S, C] each."""
    _check_classes(num_classes, labels=labels, predictions=predictions)
    hits = labels == predictions
    return ClassCounts(
        _sum_by_class(weights[:, hits], labels[hits], num_classes),
        _sum_by_class(weights, labels, num_classes),
        _sum_by_class(weights, predictions, num_classes),
    )


def balanced_accuracy(labels: Array, predictions: Array, num_classes: int) -> float:
    """Mean recall of the classes that occur in `labels`."""
    return float(_balanced_accuracy(class_counts(labels, predictions, num_classes)))


def macro_f1(labels: Array, predictions: Array, num_classes: int) -> float:
    """Mean F1 of the classes that occur in labels or predictions (scikit-learn's convention, zero_division = 0)."""
    return float(_macro_f1(class_counts(labels, predictions, num_classes)))


def worst_recall(labels: Array, predictions: Array, num_classes: int) -> float:
    """Recall of the class that is recognised worst, among those that occur in `labels`."""
    return float(_worst_recall(class_counts(labels, predictions, num_classes)))


def accuracy(labels: Array, predictions: Array, num_classes: int) -> float:
    """Share of correct predictions; the common classes decide it, so it is never the headline."""
    return float(_accuracy(class_counts(labels, predictions, num_classes)))


METRICS: dict[str, Callable[[Array, Array, int], float]] = {
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "worst_recall": worst_recall,
    "accuracy": accuracy,
}


def per_class_recall(labels: Array, predictions: Array, num_classes: int) -> Array:
    """[C]; NaN for a class that does not occur in `labels`."""
    return class_counts(labels, predictions, num_classes).recall()


def per_class_precision(labels: Array, predictions: Array, num_classes: int) -> Array:
    """[C]; see `ClassCounts.precision`."""
    return class_counts(labels, predictions, num_classes).precision()


def confusion(labels: Array, predictions: Array, num_classes: int) -> Array:
    """Counts [C, C] int64; row = label, column = prediction."""
    _check_classes(num_classes, labels=labels, predictions=predictions)
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_tiers(train_counts: Array, many_above: int | None = None, few_below: int | None = None) -> Array:
    """Tell many-, medium- and few-shot classes apart.

    Args:
        train_counts: [C], training images of each class.
        many_above: A class with more images is "many".
        few_below: A class with fewer images is "few". Without both bounds: thirds of the classes sorted by count (equal
            counts by class number); what does not divide goes to "many", then to "medium". Of fewer than three classes
            the rarest is "few".

    Returns:
        [C] of "many", "medium" and "few".

    Raises:
        UserError: One bound without the other, or bounds that overlap.
    """
    tiers = np.empty(len(train_counts), dtype="U6")
    if many_above is None and few_below is None:
        by_count = np.argsort(-np.asarray(train_counts), kind="stable")
        for tier, classes in zip(TIERS, np.array_split(by_count, len(TIERS)), strict=True):
            tiers[classes] = tier
        if 0 < len(by_count) < len(TIERS):
            tiers[by_count[-1]] = "few"
        return tiers
    if many_above is None or few_below is None or few_below > many_above + 1:
        raise UserError(
            f"evaluation.many_above = {many_above} and evaluation.few_below = {few_below} do not part the classes; "
            "give both, with few_below at most many_above + 1, or neither for thirds of the classes"
        )
    tiers[:] = "medium"
    tiers[np.asarray(train_counts) > many_above] = "many"
    tiers[np.asarray(train_counts) < few_below] = "few"
    return tiers


def group_recall(labels: Array, predictions: Array, tiers: Array) -> dict[str, float]:
    """Mean recall of the many-, medium- and few-shot classes.

    Args:
        labels: [N].
        predictions: [N].
        tiers: [C] of `class_tiers`.

    Returns:
        Tier -> mean recall of its classes that occur in `labels`; NaN for a tier without any.
    """
    counts = class_counts(labels, predictions, len(tiers))
    return {tier: float(mean_recall_of(tiers == tier)(counts)) for tier in TIERS}


def _sum_by_class(weights: Array, classes: Array, num_classes: int) -> Array:
    """[S, N] -> [S, C]: sums over the samples of each class, at a cost that does not depend on C."""
    sums = np.zeros((len(weights), num_classes), weights.dtype)
    if len(classes):
        order = np.argsort(classes, kind="stable")
        present, starts = np.unique(classes[order], return_index=True)
        sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _ratio(numerator: Array, denominator: Array, otherwise: float) -> Array:
    """Divide, with `otherwise` where the denominator is 0."""
    out = np.full(np.shape(numerator), otherwise, dtype=np.float64)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) > 0)


def _mean_present(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    return _ratio(np.nansum(values, axis=-1), np.sum(~np.isnan(values), axis=-1), np.nan)


def _check_classes(num_classes: int, **vectors: Array) -> None:
    for name, vector in vectors.items():
        if len(vector) and (vector.min() < 0 or vector.max() >= num_classes):
            raise ValueError(f"{name}: classes {vector.min()} to {vector.max()} are not all in [0, {num_classes})")
