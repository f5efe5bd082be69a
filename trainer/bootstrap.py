"""95 % intervals by resampling whole groups.

Pictures of one lesion or patient are not independent: drawing them together keeps the interval honest. (Efron and
Tibshirani 1993, ch. 13; resampling clusters: Davison and Hinkley 1997, sec. 3.8.) All measures see the same resamples,
so that differences of two models on one test set are paired: what makes a resample hard for both cancels out.

Shapes: N samples, G groups, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trainer.metrics import COUNT_METRICS, CountMetric, weighted_counts

Array = np.ndarray[Any, Any]
Measure = Callable[[Array], Array]
"""Weights [s, N], how often each sample counts in each of s resamples -> values [s, ...]."""
RESAMPLE_BYTES = 64 << 20


def bootstrap(measures: Mapping[str, Measure], groups: Array, samples: int, seed: int) -> dict[str, Array]:
    """Each measure on the same resamples of whole groups.

    Args:
        measures: By name.
        groups: [N], anything that numpy can sort; samples of one group are drawn together.
        samples: S.
        seed: The same seed gives the same resamples.

    Returns:
        Values [S, ...] by name.
    """
    parts: dict[str, list[Array]] = {name: [] for name in measures}
    for weights in _resamples(groups, samples, seed):
        for name, measure in measures.items():
            parts[name].append(measure(weights))
    return {name: np.concatenate(values) for name, values in parts.items()}


def decision_measure(metric: str | CountMetric, labels: Array, predictions: Array, num_classes: int) -> Measure:
    """A metric of decisions: a name in `trainer.metrics.COUNT_METRICS`, or a function of counts."""
    of_counts = COUNT_METRICS[metric] if isinstance(metric, str) else metric
    return lambda weights: of_counts(weighted_counts(labels, predictions, num_classes, weights))


def mean_measure(values: Array) -> Measure:
    """The mean of a figure that each sample has, [N]; NaN = it has none."""
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)

    def of_weights(weights: Array) -> Array:
        number = weights @ known
        return np.divide(weights @ filled, number, out=np.full(len(weights), np.nan), where=number > 0)

    return of_weights


def interval(values: Array) -> tuple[float, float]:
    """The 95 % percentile interval of values [S]; resamples in which the measure is undefined (NaN) are left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _resamples(groups: Array, samples: int, seed: int) -> Iterator[Array]:
    """How often each sample is in each resample, [s, N] at a time."""
    names, group_of_sample = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    # Chunks bound the memory; the generator's sequence does not depend on them.
    chunk = max(1, RESAMPLE_BYTES // (8 * max(len(group_of_sample), len(names), 1)))
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        yield draws[:, group_of_sample]
