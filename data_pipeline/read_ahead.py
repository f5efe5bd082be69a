"""What training, evaluation and prediction share: reading and decoding ahead, and the care of damaged images."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch

from cluster.errors import UserError
from data_pipeline.augment import ViewParameters
from data_pipeline.dataset import Dataset, Index
from data_pipeline.decode import QUEUE_DEPTH, DecodeError, Decoder
from data_pipeline.shards import ShardReader

READ_AHEAD_BATCHES = 4
READ_THREADS = 2
MAX_NAMED = 20
"""Damaged images that an error names; the others are counted."""


@dataclass(eq=False)
class Load:
    """Encoded images on their way to the decoder; B of them, the same B in each field."""

    epoch: int
    step: int
    rows: np.ndarray
    """int64 [B]: rows of an index, or numbers of loose files."""
    encoded: list[np.ndarray]
    """uint8 [bytes] each."""
    views: list[ViewParameters] = field(default_factory=list)
    """One of B for each view of the training graph."""
    positions: np.ndarray | None = None
    """int64 [B]: in the epoch; training only."""
    damaged: list[tuple[int, str]] = field(default_factory=list)
    """Loose files that were left out: number and reason."""

    def without(self, reasons: dict[int, str]) -> Load:
        """The evaluation load without its damaged images, given by place in the batch."""
        kept = [place for place in range(len(self.encoded)) if place not in reasons]
        damaged = [(int(self.rows[place]), reason) for place, reason in reasons.items()]
        return replace(
            self,
            rows=self.rows[kept],
            encoded=[self.encoded[place] for place in kept],
            damaged=sorted(self.damaged + damaged),
        )


def read_images(reader: ShardReader, index: Index, rows: np.ndarray) -> list[np.ndarray]:
    """The encoded images of some rows, uint8 [bytes] each."""
    ranges = zip(index.shard[rows].tolist(), index.offset[rows].tolist(), index.length[rows].tolist(), strict=True)
    return [reader.read(*place) for place in ranges]


def decode_ahead(
    decoder: Decoder, pool: Executor, jobs: Iterable[Callable[[], Load]], repair: Callable[[Load], Load]
) -> Iterator[tuple[Load, torch.Tensor]]:
    """Run the jobs and decode what they load, in order, a few ahead of the caller.

    Args:
        decoder: Empty at the start, and left empty.
        pool: Runs the jobs.
        jobs: Each reads one batch.
        repair: Called with a load that DALI could not decode; returns one without the damaged images.

    Yields:
        The load as it was decoded, and its images [V * B, 3, px, px].
    """
    remaining = iter(jobs)
    reading: deque[Future[Load]] = deque()
    decoding: deque[Load] = deque()

    def top_up(wait: bool) -> None:
        reading.extend(pool.submit(job) for job in islice(remaining, READ_AHEAD_BATCHES - len(reading)))
        while reading and len(decoding) < QUEUE_DEPTH and (reading[0].done() or (wait and not decoding)):
            decoding.append(reading.popleft().result())
            _submit(decoder, decoding[-1])

    try:
        while True:
            top_up(wait=True)
            if not decoding:
                return
            images = _images(decoder, decoding, repair)
            load = decoding.popleft()
            top_up(wait=False)  # DALI is kept busy while the caller works on this batch
            yield load, images
    finally:
        for future in reading:
            future.cancel()
        decoder.drain()


def _images(decoder: Decoder, decoding: deque[Load], repair: Callable[[Load], Load]) -> torch.Tensor:
    """The images of the oldest load; repairs it in place, and submits all again, as often as it takes."""
    while decoding[0].encoded:
        try:
            return decoder.result()
        except DecodeError:
            decoding[0] = repair(decoding[0])
            for load in decoding:
                _submit(decoder, load)
    side = decoder.settings.image.image_px
    return torch.empty(0, 3, side, side, device=decoder.settings.device)


def _submit(decoder: Decoder, load: Load) -> None:
    if load.encoded:
        decoder.submit(load.encoded, load.views)


class DamageLog:
    """The damaged images that a worker has met in a split, up to a limit."""

    def __init__(self, dataset: Dataset, index: Index, limit: int):
        self._dataset, self._index, self._limit = dataset, index, limit
        self._reasons: dict[int, str] = {}

    def pairs(self) -> list[tuple[str, str]]:
        """Key and reason of each, by row."""
        return [(str(self._index.key[row]), reason) for row, reason in sorted(self._reasons.items())]

    def add(self, reasons: dict[int, str]) -> None:
        """Note damaged rows.

        Raises:
            UserError: Now there are more than the limit; all are named.
        """
        self._reasons.update(reasons)
        if len(self._reasons) > self._limit:
            pairs = self.pairs()
            named = "; ".join(f"{key} ({reason})" for key, reason in pairs[:MAX_NAMED])
            more = f"; and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
            raise UserError(
                f"{self._dataset.uri} has more than data.max_damaged = {self._limit} damaged images: {named}{more}; "
                "pack the dataset again, or raise data.max_damaged"
            )

    def restore(self, pairs: list[list[str]]) -> None:
        """Take up the `pairs` of an earlier run; keys that the split does not hold are passed over."""
        reasons = dict(pairs)
        rows = np.flatnonzero(np.isin(self._index.key, list(reasons))).tolist()
        self._reasons = {row: reasons[self._index.key[row]] for row in rows}

    def replaced(self, rows: np.ndarray) -> np.ndarray:
        """`rows` with the next row of the same class in place of each damaged one.

        Whether a replacement is damaged too shows when it is decoded. What ends up in a batch therefore depends on
        which images are damaged, not on when that was found out.

        Raises:
            UserError: All images of a class are damaged.
        """
        if not self._reasons:
            return rows
        return np.array([self._next_of_class(row) if row in self._reasons else row for row in rows.tolist()])

    def _next_of_class(self, row: int) -> int:
        label = self._index.label[row]
        members = np.flatnonzero(self._index.label == label)
        for candidate in np.roll(members, -1 - int(np.searchsorted(members, row))).tolist():
            if candidate not in self._reasons:
                return candidate
        raise UserError(
            f"all {len(members)} training images of class {self._dataset.classes[label]!r} in {self._dataset.uri} are "
            "damaged; pack the dataset again"
        )
