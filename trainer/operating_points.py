"""What a model can do with rare classes at false alarms that one can live with: sensitivity at fixed specificities.

Each class against the rest, by its probability alone. The thresholds are those of the set itself: they describe how
well the model ranks there; whoever uses one chooses it on other data.

Shapes: N samples, C classes, K specificities, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from trainer.bootstrap import Measure, bootstrap, interval
from trainer.score_metrics import sensitivity_at, threshold_at

SPECIFICITIES = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class OperatingPoints:
    """Points of each class's ROC curve; None where a class, or its rest, has no sample."""

    specificities: Sequence[float]
    """[K]."""
    sensitivity: Sequence[Sequence[float | None]]
    """[C, K]."""
    intervals: Sequence[Sequence[Sequence[float | None]]]
    """[C, K, 2]: 95 % over resampled groups, the threshold taken anew in each; empty where that costs too much."""
    thresholds: Sequence[Sequence[float | None]]
    """[C, K]: a sample with at least that probability is called the class; None also where nothing would be found."""


def operating_points(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, samples: int, seed: int
) -> OperatingPoints:
    """Sensitivities at `SPECIFICITIES`, with their intervals.

    Args:
        labels: [N].
        probabilities: [N, C].
        groups: [N]; samples of one group are drawn together.
        samples: S; 0 = no intervals.
        seed: Of the resamples.
    """
    measures: dict[str, Measure] = {
        str(s): partial(sensitivity_at, s, labels, probabilities) for s in SPECIFICITIES
    }  # the weights come last
    whole = np.stack([measure(np.ones((1, len(labels))))[0] for measure in measures.values()], axis=1)
    drawn = bootstrap(measures, groups, samples, seed) if samples else {}
    return OperatingPoints(
        specificities=SPECIFICITIES,
        sensitivity=_plain(whole),
        intervals=[
            [[_plain_number(end) for end in interval(values[:, c])] for values in drawn.values()]
            for c in range(probabilities.shape[1])
        ]
        if drawn
        else [],
        thresholds=_plain(np.stack([threshold_at(s, labels, probabilities) for s in SPECIFICITIES], axis=1)),
    )


def _plain(values: np.ndarray) -> list[list[float | None]]:
    return [[_plain_number(value) for value in row] for row in values.tolist()]


def _plain_number(value: float) -> float | None:
    return value if np.isfinite(value) else None
