"""How the winner is chosen on val, and how much of its lead is luck.

Shapes: H heads, N samples of val, S resamples of its groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.bootstrap import Measure, bootstrap, decision_measure
from tuning.results import Row, rank

RESAMPLES = 200
ONE_SIDED_95 = 1.645
HEADS_FOR_LUCK = 512
PER_FAMILY = 2
"""Finalists a family: the neighbours of one lucky head are lucky as well."""


@dataclass(frozen=True)
class Judge:
    """Scores predictions on val.

    Attributes:
        labels: [N].
        groups: [N], patients or lesions; resampled whole.
        num_classes: C.
        select_by: The metric.
        seed: Of the resamples.
    """

    labels: np.ndarray
    groups: np.ndarray
    num_classes: int
    select_by: str
    seed: int = 0

    def scores(self, predictions: np.ndarray) -> np.ndarray:
        """The metric of each head's predictions [H, N]; float64 [H]."""
        once = np.ones((1, len(self.labels)), dtype=np.int64)
        return np.array([self._measure(row)(once)[0] for row in predictions])

    def resampled(self, predictions: np.ndarray) -> np.ndarray:
        """The metric of each head on the same S resamples, float64 [H, S]."""
        measures = {str(i): self._measure(row) for i, row in enumerate(predictions)}
        values = bootstrap(measures, self.groups, RESAMPLES, self.seed)
        return np.stack([values[name] for name in measures])

    def _measure(self, predictions: np.ndarray) -> Measure:
        return decision_measure(self.select_by, self.labels, predictions, self.num_classes)


def finalists(rows: Sequence[Row], number: int) -> list[Row]:
    """The best heads by their score, at most two a family, so that several families stay in the race."""
    chosen: list[Row] = []
    for row in sorted(rows, key=rank, reverse=True):
        taken = sum(other["family"] == row["family"] for other in chosen)
        if row["status"] == "done" and taken < PER_FAMILY and len(chosen) < number:
            chosen.append(row)
    return chosen


def lower_bound(judge: Judge, predictions: np.ndarray) -> tuple[float, float]:
    """Mean score of one head trained with several seeds, and a one-sided 95 % lower bound of it.

    The bound counts both what another val would have shown (bootstrap over groups of the mean over seeds) and what
    other seeds would: mean - 1.645 sqrt(var_val + var_seeds / seeds).

    Args:
        judge: Labels, groups and metric.
        predictions: [seeds, N].
    """
    scores = judge.scores(predictions)
    of_val = judge.resampled(predictions).mean(axis=0).var()
    of_seeds = scores.var(ddof=1) / len(scores) if len(scores) > 1 else 0.0
    return float(scores.mean()), float(scores.mean() - ONE_SIDED_95 * np.sqrt(of_val + of_seeds))


def paired_lower_bound(judge: Judge, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """By how much one model scores higher than another, and a one-sided 95 % lower bound of it.

    Paired: both are scored on the same resamples of val's groups, and what makes one hard for both cancels out.

    Args:
        judge: Labels, groups and metric.
        ours: Predictions [N].
        theirs: Predictions [N].
    """
    both = np.stack([ours, theirs])
    scores, resampled = judge.scores(both), judge.resampled(both)
    difference = float(scores[0] - scores[1])
    return difference, difference - ONE_SIDED_95 * float((resampled[0] - resampled[1]).std())


def luck(judge: Judge, predictions: np.ndarray) -> float:
    """By how much the best of so many heads would seem better than it is, if all were equally good.

    The expected maximum, over the heads, of what a resample of val's groups adds to a head's score: heads that err on
    the same images count as the few trials that they are. Of more than 512 heads the best 512 are taken.

    Args:
        judge: Labels, groups and metric.
        predictions: [H, N].
    """
    scores = judge.scores(predictions)
    best = np.argsort(-scores, kind="stable")[:HEADS_FOR_LUCK]
    return expected_lead(judge.resampled(predictions[best]) - scores[best, None])


def expected_lead(noise: np.ndarray) -> float:
    """Expected maximum of what val adds to the scores of equally good heads or trials; 0 for a single one.

    Args:
        noise: What each resample of val's groups adds to each of their scores, [H, S].
    """
    return float(np.maximum(noise.max(axis=0), 0).mean()) if len(noise) > 1 else 0.0
