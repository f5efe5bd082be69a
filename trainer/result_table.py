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

CLASS_FIGURES = ("per_class_recall", "per_class_precision", "per_class_auc", "per_class_average_precision")
MEANS_OF_CLASSES = {"auc": "per_class_auc", "average_precision": "per_class_average_precision"}


@dataclass(frozen=True)
class Judged:
    """What one model says about the test set.

    Attributes:
        name: Short name; a row of the table.
        description: For people.
        probabilities: After the temperature, [N, C].
        uncalibrated: Before it, [N, C]; None = not known, as of a model of which the predictions are all there is.
        found: Retrieval on the embeddings that stage one compared, else on features; None = not known.
    """

    name: str
    description: str
    probabilities: np.ndarray
    uncalibrated: np.ndarray | None = None
    found: Retrieval | None = None

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
    """A row a model: every figure with its interval in `intervals`, those of each class theirs in `class_intervals`.

    NaN (a class or tier without test images) becomes None.
    """
    rows = []
    for model in models:
        values = _with_means({name: measure(_once(test)) for name, measure in _measures(model, test).items()})
        resampled = _with_means(bootstrap(_resampled(model, test), test.groups, test.samples, test.seed))
        intervals = {name: _ends(numbers) for name, numbers in resampled.items()}
        rows.append(
            {
                "name": model.name,
                "description": model.description,
                **{name: _plain(value[0]) for name, value in values.items()},
                "interval": intervals["balanced_accuracy"],
                "intervals": {name: ends for name, ends in intervals.items() if name not in CLASS_FIGURES},
                "class_intervals": {name: ends for name, ends in intervals.items() if name in CLASS_FIGURES},
            }
        )
    return rows


def difference(model: Judged, other: Judged, test: HeldOutSet) -> dict[str, Any]:
    """Figures of `model` less those of `other`, with paired 95 % intervals.

    Returns:
        `value` and `interval` of balanced accuracy, and both for every figure in `figures`, for those of each class in
        `class_figures`.
    """
    ours, theirs = (_resampled(m, test) for m in (model, other))
    both: dict[str, Measure] = {
        name: lambda weights, name=name: ours[name](weights) - theirs[name](weights)  # type: ignore[misc]
        for name in ours
    }
    values = _with_means({name: measure(_once(test)) for name, measure in both.items()})
    resampled = _with_means(bootstrap(both, test.groups, test.samples, test.seed))
    figures = {name: {"value": _plain(values[name][0]), "interval": _ends(resampled[name])} for name in values}
    return {
        **figures["balanced_accuracy"],
        "figures": {name: figure for name, figure in figures.items() if name not in CLASS_FIGURES},
        "class_figures": {name: figure for name, figure in figures.items() if name in CLASS_FIGURES},
    }


def recall_intervals(model: Judged, test: HeldOutSet) -> list[list[float | None]]:
    """95 % intervals of the recall of each class, [C, 2]."""
    resampled = bootstrap({"recall": _recall_measure(model, test)}, test.groups, test.samples, test.seed)
    return _ends(resampled["recall"])


def recall_differences(model: Judged, other: Judged, test: HeldOutSet) -> list[list[float | None]]:
    """Paired 95 % intervals of the recall of each class, `model` less `other`, [C, 2]."""
    both = {"ours": _recall_measure(model, test), "theirs": _recall_measure(other, test)}
    resampled = bootstrap(both, test.groups, test.samples, test.seed)
    return _ends(resampled["ours"] - resampled["theirs"])


def _recall_measure(model: Judged, test: HeldOutSet) -> Measure:
    return decision_measure(metrics.ClassCounts.recall, test.labels, model.predictions, len(test.tiers))


def _measures(model: Judged, test: HeldOutSet) -> dict[str, Measure]:
    labels, classes = test.labels, len(test.tiers)
    measures: dict[str, Measure] = {
        name: decision_measure(name, labels, model.predictions, classes) for name in metrics.COUNT_METRICS
    }
    for tier in metrics.TIERS:
        of_tier = metrics.mean_recall_of(test.tiers == tier)
        measures[tier] = decision_measure(of_tier, labels, model.predictions, classes)
    measures |= {
        "ece": lambda weights: calibration_error(labels, model.probabilities, weights),
        "per_class_recall": _recall_measure(model, test),
        "per_class_precision": decision_measure(metrics.ClassCounts.precision, labels, model.predictions, classes),
        "per_class_auc": lambda weights: area_under_roc(labels, model.probabilities, weights),
        "per_class_average_precision": lambda weights: average_precision(labels, model.probabilities, weights),
    }
    if (uncalibrated := model.uncalibrated) is not None:
        measures["ece_before"] = lambda weights: calibration_error(labels, uncalibrated, weights)
    if model.found is not None:
        measures["recall_at_1"] = mean_measure(model.found.hit)
        measures["map_at_r"] = mean_measure(model.found.average_precision)
    return measures


def _resampled(model: Judged, test: HeldOutSet) -> dict[str, Measure]:
    """The measures that get an interval."""
    measures = _measures(model, test)
    if test.samples * model.probabilities.size > RANKING_BUDGET:
        for of_classes in MEANS_OF_CLASSES.values():
            del measures[of_classes]
    return measures


def _with_means(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The figures [S] or [S, C], and those that are means of others over the classes."""
    means = {name: _macro(values[of]) for name, of in MEANS_OF_CLASSES.items() if of in values}
    return {**values, **means}


def _once(test: HeldOutSet) -> np.ndarray:
    return np.ones((1, len(test.labels)), dtype=np.int64)


def _macro(values: np.ndarray) -> np.ndarray:
    """Mean over the classes that have a value, [S, C] -> [S]."""
    number = (~np.isnan(values)).sum(axis=1)
    return np.divide(np.nansum(values, axis=1), number, out=np.full(len(values), np.nan), where=number > 0)


def _ends(values: np.ndarray) -> list[Any]:
    """The 95 % interval of values [S], or of each column of [S, C]."""
    if values.ndim == 2:
        return [_ends(column) for column in values.T]
    return [_or_none(end) for end in interval(values)]


def _plain(value: np.ndarray) -> Any:
    """A number, or a list of them."""
    return [_or_none(v) for v in value.tolist()] if value.ndim else _or_none(float(value))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
