"""What a reliability diagram shows: how often a model is right when it is so sure.

Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), section 2.

Shapes: N samples, C classes, M bins of confidence, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.bootstrap import bootstrap, interval
from trainer.score_metrics import reliability


@dataclass(frozen=True)
class Bins:
    """Bins of confidence [M], those without a sample left out."""

    samples: Sequence[int]
    confidence: Sequence[float]
    """Mean of the largest probability."""
    accuracy: Sequence[float]
    intervals: Sequence[Sequence[float]]
    """[M, 2]: 95 % of the accuracy, over resampled groups."""


@dataclass(frozen=True)
class Calibration:
    """A model before and after its temperature."""

    before: Bins
    after: Bins


def calibration_bins(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, samples: int, seed: int
) -> Bins:
    """The bins of `trainer.score_metrics.calibration_error`, with intervals of their accuracies.

    Args:
        labels: [N].
        probabilities: [N, C].
        groups: [N]; samples of one group are drawn together.
        samples: S.
        seed: Of the resamples.
    """
    counts, confidence, accuracy = (values[0] for values in reliability(labels, probabilities))
    drawn = bootstrap({"accuracy": lambda w: reliability(labels, probabilities, w)[2]}, groups, samples, seed)
    filled = np.flatnonzero(counts)
    return Bins(
        samples=counts[filled].astype(int).tolist(),
        confidence=confidence[filled].tolist(),
        accuracy=accuracy[filled].tolist(),
        intervals=[interval(drawn["accuracy"][:, m]) for m in filled],
    )
