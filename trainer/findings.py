"""What the report tells, before it is put into words: its inputs and the figures that are derived from them.

C classes throughout; recalls and accuracies are shares in 0..1, NaN or None where a class has no test image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from trainer.calibration import Calibration
from trainer.operating_points import OperatingPoints
from trainer.projection import EmbeddingMap

FEW_TEST_IMAGES = 10  # below this one image moves a class's recall by more than 10 points: the report names the class
CONFUSED_PAIRS = 10  # as many are told, and as many have pictures


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
    per_class_auc: Sequence[float | None] = ()
    accuracy: float | None = None
    ece_before: float | None = None
    """Before the temperature."""
    auc: float | None = None
    average_precision: float | None = None
    recall_at_1: float | None = None
    map_at_r: float | None = None
    intervals: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """figure -> 95 % bootstrap over groups; of the figures above."""
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
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """figure -> its `value` and `interval`, of every figure of a row."""


@dataclass(frozen=True)
class Mistake:
    """A test image that the model takes for another class."""

    key: str
    true: int
    predicted: int
    p_true: float
    p_predicted: float


@dataclass(frozen=True)
class LookAlike:
    """Pictures of two classes that the model confuses, as keys of test images."""

    true: int
    predicted: int
    taken: Sequence[str]
    """Images of `true` that are taken for `predicted`."""
    rightly: Sequence[str]
    """Images of `predicted` that are recognised."""


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
    kept_epoch: int | None = None
    """Of stage one, as the log counts them; None = not known."""
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
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Of `model.json`: when and by what the model was made."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """Of `model.json`: image_px, resize_ratio, mean, std."""
    temperature: float | None = None
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """key -> JPEG, small copies of images of the dataset; what has none is left out of the page."""
    examples: Sequence[Sequence[str]] = ()
    """Keys of training images of each class."""
    look_alikes: Sequence[LookAlike] = ()
    mistakes: Sequence[Mistake] = ()
    """The worst first."""
    recall_intervals: Sequence[Sequence[float | None]] = ()
    """[C, 2], 95 %, of the model's recall of each class."""
    embedding_map: EmbeddingMap | None = None
    calibration: Calibration | None = None
    operating_points: OperatingPoints | None = None

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


def most_confused(
    after: Sequence[Sequence[int]], before: Sequence[Sequence[int]], limit: int = CONFUSED_PAIRS
) -> list[Confused]:
    """Pairs that the model confuses, largest share of the true class first; ties by number of images.

    Args:
        after: Test images [C, C], row = true class, of the model.
        before: The same of stage one's own classifier.
        limit: Pairs wanted.
    """
    counts = np.asarray(after, dtype=np.int64)
    shares, shares_before = row_shares(after), row_shares(before)
    totals = counts.sum(axis=1)
    pairs = [
        Confused(
            int(i),
            int(j),
            int(counts[i, j]),
            int(totals[i]),
            float(shares[i, j]),
            float(np.nan_to_num(shares_before[i, j])),
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


def commonest_first(counts: Sequence[int]) -> list[int]:
    """Classes by their images [C]; ties in class order."""
    return sorted(range(len(counts)), key=lambda index: (-counts[index], index))


def rarest_last(inputs: ReportInputs) -> list[int]:
    """Classes by training images, commonest first."""
    return commonest_first(inputs.class_counts["train"])


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
