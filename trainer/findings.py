"""What the report tells, before it is put into words: its inputs and the figures that are derived from them.

C classes throughout; recalls and accuracies are shares in 0..1, NaN or None where a class has no test image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

FEW_TEST_IMAGES = 10  # below this one image moves a class's recall by more than 10 points: the report names the class


@dataclass(frozen=True)
class ResultRow:
    """One row of the result table: a model and its figures on the test set."""

    name: str
    description: str
    balanced_accuracy: float
    interval: tuple[float, float]
    """95 % bootstrap over groups, of balanced accuracy."""
    macro_f1: float
    worst_recall: float
    many: float | None
    medium: float | None
    few: float | None
    ece: float
    """Expected calibration error, after the temperature."""
    per_class_recall: Sequence[float | None]
    detail: str = ""
    """Settings, such as a head's knobs; set small under the description."""

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> ResultRow:
        """A row of `metrics.json`; what the report does not show is passed over."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        return cls(**{**known, "interval": tuple(known["interval"])})


@dataclass(frozen=True)
class Gain:
    """Winner minus another row, balanced accuracy on the same test set."""

    value: float
    interval: tuple[float, float]
    """95 % paired bootstrap over groups."""


@dataclass(frozen=True)
class ReportInputs:
    """All that the report is made of; each field is a plain value out of the run folder's files."""

    name: str
    """Name of the run."""
    dataset: str
    config: Mapping[str, Any]
    """The configuration as used, nested."""
    classes: Sequence[str]
    class_counts: Mapping[str, Sequence[int]]
    """split -> images of each class."""
    rows: Sequence[ResultRow]
    own_confusion: Sequence[Sequence[int]]
    """[C, C] test images, row = true class; of stage one's own classifier."""
    winner_confusion: Sequence[Sequence[int]]
    test_groups: int
    history: Sequence[Mapping[str, Any]] = ()
    """Lines of log.jsonl: stage, kind ('step' or 'epoch'), step, epoch, and the values."""
    search: Sequence[Mapping[str, Any]] = ()
    """A row a head: family, its knobs (None where it has none), score on val."""
    choice: Mapping[str, Any] = field(default_factory=dict)
    """`winner.json`: how the head was chosen on val."""
    own: str = "own"
    """Name of the row of stage one's own classifier: "before"."""
    winner: str = "winner"
    """Name of the row that the search chose: "after"."""
    gain: Gain | None = None
    """Over `own`."""
    gain_over_baseline: Gain | None = None
    """Over plain cross-entropy of the same budget."""
    select_by: str = "balanced_accuracy"
    audit: Mapping[str, Any] = field(default_factory=dict)
    """`AuditReport.to_json()` of the packed dataset."""
    test_reads: int = 1
    timings: Mapping[str, float] = field(default_factory=dict)
    """step -> seconds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    """what -> SHA-256."""
    examples: Sequence[Sequence[bytes]] = ()
    """Encoded training images of each class; four of each are shown."""

    def row(self, name: str) -> ResultRow:
        """The result row of that name."""
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Confused:
    """An ordered pair of classes: images of `true` taken for `predicted`."""

    true: int
    predicted: int
    images: int
    of: int
    share: float
    share_before: float


Verdict = Literal["gain", "loss", "open"]


def verdict(gain: Gain | None) -> Verdict:
    """Whether the winner is better than another row, judged by the paired interval alone.

    Without a paired interval the answer is open: two separate intervals say little about a difference.
    """
    if gain is None:
        return "open"
    low, high = gain.interval
    if low > 0:
        return "gain"
    return "loss" if high < 0 else "open"


def row_shares(confusion: Sequence[Sequence[int]]) -> np.ndarray:
    """Counts [C, C] -> shares of each true class [C, C]; rows of classes without images are NaN."""
    counts = np.asarray(confusion, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def most_confused(inputs: ReportInputs, limit: int = 10) -> list[Confused]:
    """Pairs that the winner confuses, largest share of the true class first; ties by number of images."""
    counts = np.asarray(inputs.winner_confusion, dtype=np.int64)
    shares, before = row_shares(inputs.winner_confusion), row_shares(inputs.own_confusion)
    totals = counts.sum(axis=1)
    pairs = [
        Confused(
            int(i), int(j), int(counts[i, j]), int(totals[i]), float(shares[i, j]), float(np.nan_to_num(before[i, j]))
        )
        for i, j in np.argwhere(counts > 0)
        if i != j
    ]
    return sorted(pairs, key=lambda pair: (-pair.share, -pair.images, pair.true, pair.predicted))[:limit]


def classes_in_confusions(confusion: Sequence[Sequence[int]], limit: int) -> np.ndarray:
    """The `limit` classes with the most off-diagonal share, by row or by column, in their own order."""
    shares = np.nan_to_num(row_shares(confusion))
    np.fill_diagonal(shares, 0)
    weight = shares.sum(axis=0) + shares.sum(axis=1)
    return np.sort(np.argsort(-weight, kind="stable")[:limit])


def rarest_last(inputs: ReportInputs) -> list[int]:
    """Classes by training images, commonest first; ties in class order."""
    counts = inputs.class_counts["train"]
    return sorted(range(len(inputs.classes)), key=lambda index: (-counts[index], index))


def imbalance(counts: Sequence[int]) -> float:
    """Images of the commonest class over those of the rarest that has any."""
    present = [count for count in counts if count > 0]
    return max(present) / min(present) if present else math.nan


def thinly_tested(inputs: ReportInputs) -> list[int]:
    """Classes whose recall rests on fewer than `FEW_TEST_IMAGES` test images."""
    return [index for index, count in enumerate(inputs.class_counts["test"]) if count < FEW_TEST_IMAGES]


def best_per_family(search: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The chosen head of each family, best family first; heads without a score are left out.

    As in the search: of a family's finalists the one with the highest lower bound, else the best score; of equal ones
    the first stands.
    """

    def merit(row: Mapping[str, Any]) -> tuple[float, float]:
        bound = row.get("lower_bound")
        return (float(bound) if bound is not None and is_number(bound) else -math.inf, row["score"])

    best: dict[str, Mapping[str, Any]] = {}
    for row in search:
        if is_number(row["score"]) and (row["family"] not in best or merit(row) > merit(best[row["family"]])):
            best[row["family"]] = row
    return sorted(best.values(), key=merit, reverse=True)


def heads_tried(inputs: ReportInputs) -> int:
    """Heads that the search made; stage one's own classifier stands in its table, but was not made by it."""
    return sum(row["family"] != inputs.own for row in inputs.search)


def is_number(value: Any) -> bool:
    """A finite number, and no bool."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)
