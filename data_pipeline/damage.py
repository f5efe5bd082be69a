"""The care of images that turn out damaged while they are used: named, counted, replaced by their class."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from cluster.errors import UserError
from data_pipeline.dataset import Dataset, Index
from data_pipeline.shards import ShardReader

MAX_NAMED = 20
"""Damaged images that an error names; the others are counted."""


class DamageLog:
    """The damaged images that are known in a split, up to a limit."""

    def __init__(self, dataset: Dataset, index: Index, limit: int, reader: ShardReader):
        """No image is damaged yet.

        Args:
            dataset: For its name and classes.
            index: The split.
            limit: Damaged images that are tolerated.
            reader: Is asked whether a damaged image's shard has changed since it was packed.
        """
        self._dataset, self._index, self._limit, self._reader = dataset, index, limit, reader
        self._reasons: dict[int, str] = {}
        self._replacements: dict[int, int] = {}
        self._altered: dict[int, bool] = {}
        self._lock = threading.Lock()  # batches are read ahead in threads while others are repaired

    def pairs(self) -> list[tuple[str, str]]:
        """Key and reason of each, by row."""
        return [(str(self._index.key[row]), reason) for row, reason in sorted(self._reasons.items())]

    def add(self, reasons: dict[int, str]) -> dict[str, str]:
        """Note damaged rows.

        Returns:
            Key -> reason of those that were not known.

        Raises:
            UserError: Now there are more than the limit; all are named.
        """
        new = {
            row: reason + self._shard_note(int(self._index.shard[row]))
            for row, reason in reasons.items()
            if row not in self._reasons
        }
        self._note(new)
        return {str(self._index.key[row]): reason for row, reason in new.items()}

    def add_pairs(self, pairs: Iterable[Iterable[str]]) -> None:
        """Note the `pairs` of another worker or of an earlier run; keys that the split does not hold are passed over.

        Raises:
            UserError: Now there are more than the limit; all are named.
        """
        reasons = {key: reason for key, reason in pairs}
        rows = np.flatnonzero(np.isin(self._index.key, list(reasons))).tolist() if reasons else []
        known = {row: reasons[self._index.key[row]] for row in rows}
        self._note(known | self._reasons)

    def replaced(self, rows: np.ndarray) -> np.ndarray:
        """`rows` with the next row of the same class in place of each damaged one.

        Whether a replacement is damaged too shows when it is decoded. What ends up in a batch therefore depends on
        which images are damaged, not on when that was found out.

        Raises:
            UserError: All images of a class are damaged.
        """
        if not self._reasons:
            return rows
        with self._lock:
            return np.array([self._next_of_class(row) if row in self._reasons else row for row in rows.tolist()])

    def _note(self, reasons: dict[int, str]) -> None:
        with self._lock:
            self._reasons.update(reasons)
            self._replacements.clear()
        if len(self._reasons) > self._limit:
            raise _too_many(self._dataset, self._limit, [f"{key} ({reason})" for key, reason in self.pairs()])

    def _shard_note(self, shard: int) -> str:
        """Images were whole when they were packed: if the shard has changed since, that is said."""
        if shard not in self._altered:
            self._altered[shard] = self._reader.is_altered(shard)
        return f"; {self._dataset.shards[shard].path} has changed since it was packed" if self._altered[shard] else ""

    def _next_of_class(self, row: int) -> int:
        if row not in self._replacements:
            self._replacements[row] = self._find_next(row)
        return self._replacements[row]

    def _find_next(self, row: int) -> int:
        label = self._index.label[row]
        members = np.flatnonzero(self._index.label == label)
        for candidate in np.roll(members, -1 - int(np.searchsorted(members, row))).tolist():
            if candidate not in self._reasons:
                return candidate
        raise UserError(
            f"all {len(members)} training images of class {self._dataset.classes[label]!r} in {self._dataset.uri} are "
            "damaged; pack the dataset again"
        )


def check_left_out(dataset: Dataset, split: str, rows: np.ndarray, limit: int) -> None:
    """Hold a pass of all ranks to the limit, to which each of them has held its own part.

    Args:
        dataset: The packed dataset.
        split: Through which the pass went.
        rows: Int [N], of the split's index: what all ranks together have seen.
        limit: Damaged images that are tolerated.

    Raises:
        UserError: More are missing; they are named. Why they are damaged each rank has told.
    """
    key = dataset.index(split).key
    missing = np.setdiff1d(np.arange(len(key)), rows)
    if len(missing) > limit:
        raise _too_many(dataset, limit, key[missing].tolist())


def _too_many(dataset: Dataset, limit: int, named: list[str]) -> UserError:
    more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return UserError(
        f"{dataset.uri} has more than data.max_damaged = {limit} damaged images: {'; '.join(named[:MAX_NAMED])}{more}; "
        "pack the dataset again, or raise data.max_damaged"
    )
