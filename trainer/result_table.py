"""The figures of several models on one test set, each with its 95 % interval, and the differences between them.

Shapes: N test samples, C classes, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer import metrics
from trainer.bootstrap import Measure, bootstrap, decision_measure, interval, mean_measure
from trainer.retrieval import Retrieval
from trainer.score_metrics import area_under_roc, average_precision, calibration_error

RANKING_BUDGET = 2 * 10**10
"""S * N * C beyond which areas under curves get no interval: each costs a pass over all of that."""


@dataclass(frozen=True)
class Judged:
    """What one model says about the test set.

    Attributes:
        name: Short name; a row of the table.
        description: For people.
        probabilities: After the temperature, [N, C].
        uncalibrated: Before it, [N, C].
        found: Retrieval on the features that the model works on.
    """

    name: str
    description: str
    probabilities: np.ndarray
    uncalibrated: np.ndarray
    found: Retrieval

    @property
    def predictions(self) -> np.ndarray:
        """Most probable class, [N]."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class HeldOutSet:
    """Labels [N], groups [N] and the tier of each class [C], with the bootstrap's settings."""

    labels: np.ndarray
    groups: np.ndarray
    tiers: np.ndarray
    samples: int
    seed: int


def result_rows(models: Sequence[Judged], test: HeldOutSet) -> list[dict[str, Any]]:
    """A row a model: every figure, its interval in `intervals`, and the figures of each class.

    NaN (a class or tier without test images) becomes None.
    """
    rows = []
    for model in models:
        values = {name: float(measure(_once(test))[0]) for name, measure in _measures(model, test).items()}
        resampled = bootstrap(_resampled(model, test), test.groups, test.samples, test.seed)
        intervals = {name: interval(numbers) for name, numbers in resampled.items()}
        rows.append(
            {
                "name": model.name,
                "description": model.description,
                **{name: _or_none(value) for name, value in values.items()},
                "interval": intervals["balanced_accuracy"],
                "intervals": {name: [_or_none(end) for end in ends] for name, ends in intervals.items()},
                **{name: [_or_none(value) for value in figures] for name, figures in _by_class(model, test).items()},
            }
        )
    return rows


def difference(model: Judged, other: Judged, test: HeldOutSet) -> dict[str, Any]:
    """Figures of `model` less those of `other`, with paired 95 % intervals.

    Returns:
        `value` and `interval` of balanced accuracy, and both for every figure in `figures`.
    """
    ours, theirs = (_resampled(m, test) for m in (model, other))
    paired: dict[str, Measure] = {
        **{f"ours {name}": m for name, m in ours.items()},
        **{f"theirs {name}": m for name, m in theirs.items()},
    }
    resampled = bootstrap(paired, test.groups, test.samples, test.seed)
    figures = {}
    for name in ours:
        value = float(ours[name](_once(test))[0] - theirs[name](_once(test))[0])
        ends = interval(resampled[f"ours {name}"] - resampled[f"theirs {name}"])
        figures[name] = {"value": _or_none(value), "interval": [_or_none(end) for end in ends]}
    return {**figures["balanced_accuracy"], "figures": figures}


def _measures(model: Judged, test: HeldOutSet) -> dict[str, Measure]:
    labels, classes = test.labels, len(test.tiers)
    measures: dict[str, Measure] = {
        name: decision_measure(name, labels, model.predictions, classes) for name in metrics.COUNT_METRICS
    }
    for tier in metrics.TIERS:
        of_tier = metrics.mean_recall_of(test.tiers == tier)
        measures[tier] = decision_measure(of_tier, labels, model.predictions, classes)
    return {
        **measures,
        "ece": lambda weights: calibration_error(labels, model.probabilities, weights),
        "ece_before": lambda weights: calibration_error(labels, model.uncalibrated, weights),
        "auc": lambda weights: _macro(area_under_roc(labels, model.probabilities, weights)),
        "average_precision": lambda weights: _macro(average_precision(labels, model.probabilities, weights)),
        "recall_at_1": mean_measure(model.found.hit),
        "map_at_r": mean_measure(model.found.average_precision),
    }


def _resampled(model: Judged, test: HeldOutSet) -> dict[str, Measure]:
    """The measures that get an interval."""
    measures = _measures(model, test)
    if test.samples * model.probabilities.size > RANKING_BUDGET:
        del measures["auc"], measures["average_precision"]
    return measures


def _by_class(model: Judged, test: HeldOutSet) -> Mapping[str, np.ndarray]:
    classes = len(test.tiers)
    return {
        "per_class_recall": metrics.per_class_recall(test.labels, model.predictions, classes),
        "per_class_precision": metrics.per_class_precision(test.labels, model.predictions, classes),
        "per_class_auc": area_under_roc(test.labels, model.probabilities)[0],
        "per_class_average_precision": average_precision(test.labels, model.probabilities)[0],
    }


def _once(test: HeldOutSet) -> np.ndarray:
    return np.ones((1, len(test.labels)), dtype=np.int64)


def _macro(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a value, [S, C] -> [S]."""
    number = (~np.isnan(values)).sum(axis=1)
    return np.divide(np.nansum(values, axis=1), number, out=np.full(len(values), np.nan), where=number > 0)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
