"""The order of training: which sample stands at which position of an epoch.

The order is planned, not queued. From the index alone, before anything is read, each epoch's N = steps * batch size
draws are computed in a few vectorised passes. Class frequencies are therefore exact instead of approached, and any
step of any epoch can be asked for on its own: resuming replays nothing.

1.  *Draws a class.* Class c gets m_c draws: N shared out by p_c ~ n_c^q, by a mixture of two powers that moves with the
    epochs, or by given weights (`sampling.round_fairly`). In P x K batches it gets K draws in each of the batches that
    it is dealt to (`sampling.deal_classes`).
2.  *Samples.* A class's samples lie in a circle, shuffled once by the seed. The k-th draw of the class since the start
    of training is sample k mod n_c of the circle: over any epochs in a row each sample is drawn floor or ceil of the
    mean. With q = 1 no sample comes twice in an epoch. What earlier epochs drew is recomputed from their m_c, O(C) an
    epoch.
3.  *Positions.* Position i belongs to canonical stream i mod S; step t is the positions [t * B, (t + 1) * B). Which of
    them go to which class is random (in P x K, batch by batch), but for the classes that are read from body shards:
    they share their positions, and what stands there follows from the order of reading.
4.  *Classes held in memory* (all their samples in tail shards) go round their circle in rounds, each in random order,
    so that a rare sample's visits are spread over the epoch and the K draws of a class in one batch are different
    samples whenever n_c >= K.
5.  *The body* is read in windows: its shards, in random order, a few at a time, samples shuffled within the window. The
    draws in this order fill their positions in the order (stream, time): each stream reads its own part of the shards
    from front to back, and no class needs a queue. A sample that is drawn r times has its visits a window apart, in at
    most `REPEAT_WINDOWS` windows, so a stream is never in more than that and one more. Shards hold the classes mixed
    (`pack` shuffles them), hence so do the batches. In P x K batches the classes' positions are given; there each
    class of the body for itself meets its own positions in this order, and its place in the shards strays from the
    stream's by about 1 / (2 sqrt(min(n_c, m_c))) of them.
6.  *Ranks.* Rank r of W takes a contiguous block of streams. The global batch is the same for every W <= S; where W
    does not divide S the ranks' parts differ in size.

Legend: N draws of an epoch, T steps, B global batch size, S streams, C classes, n_c samples, m_c draws of class c.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import Index
from data_pipeline.sampling import (
    batches_per_class,
    class_probabilities,
    deal_classes,
    epoch_classes,
    generator,
    progressive,
    round_fairly,
    weighted_probabilities,
)

WINDOW_SHARDS = 4
"""Shards among which samples are shuffled: what a stream keeps open at a time."""
REPEAT_WINDOWS = 8
"""Windows over which the visits of a body's sample are spread that is drawn several times an epoch."""

_BLOCK_DRAWS = 2**20  # draws that are worked out at a time: bounds the memory, fits the caches
_GOLDEN_RATIO = 0.6180339887498949  # its multiples modulo 1 are spread most evenly (Kronecker sequence)


class TrainStream:
    """The training order of one dataset: a pure function of (index, sampling, batch size, streams, seed, epochs)."""

    def __init__(
        self,
        index: Index,
        classes: Sequence[str],
        batch_size: int,
        sampling: SamplingConfig,
        streams: int,
        seed: int,
        tail_shards: Collection[int] = (),
        epochs: int = 1,
    ):
        """Prepare the class circles; no epoch is planned yet.

        Args:
            index: The training split.
            classes: Names of the C classes; classes without samples are allowed.
            batch_size: B, over all ranks.
            sampling: Power q or class weights, P x K.
            streams: S, a divisor of B.
            seed: The run's seed.
            tail_shards: Numbers of the shards that are held in memory.
            epochs: Of the whole training: when `sampling.power_last` is reached.

        Raises:
            UserError: The split is empty or has a label beyond the classes, the class weights do not fit the classes,
                S does not divide B, P x K is not B, or P exceeds the classes at hand.
        """
        if batch_size % streams:
            raise UserError(f"batch_size = {batch_size} must be a multiple of data.streams = {streams}")
        self.num_classes, self.batch_size, self.streams, self.seed = len(classes), batch_size, streams, seed
        self.epochs = epochs
        self.counts = np.bincount(index.label, minlength=len(classes))
        if len(self.counts) > len(classes):
            raise UserError(
                f"the index has label {len(self.counts) - 1}, but the dataset has {len(classes)} classes; "
                "pack the dataset again"
            )
        self.steps_per_epoch = max(1, len(index) // batch_size)
        self._targets = _targets(self.counts, classes, sampling)
        self._classes_per_batch, self._samples_per_class = self._batch_shape(sampling)
        draws_rng = generator(seed, "draws")
        self._order, self._offset = draws_rng.permutation(len(classes)), draws_rng.random()
        self._circle = _circles(index.label, len(classes), generator(seed, "circle"))
        self._circle_start = np.cumsum(self.counts) - self.counts
        self._shard = index.shard
        self._find_body(index, tail_shards)
        self._drawn = (0, np.zeros(len(classes), dtype=np.int64))  # (epoch, draws of each class before it)
        self._planned: tuple[int, np.ndarray] | None = None
        self._places: dict[tuple[int, int], np.ndarray] = {}  # (rank, world) -> its places in a batch
        self._lock = threading.Lock()

    def rank_rows(self, epoch: int, step: int, rank: int = 0, world: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """A rank's part of one global batch, by ascending position.

        Args:
            epoch: From 0.
            step: From 0, below `steps_per_epoch`.
            rank: Of `world` ranks.
            world: W, at most S.

        Returns:
            Row numbers in the index, int64 [B / W], and their positions in the epoch, int64 [B / W].

        Raises:
            UserError: There are more ranks than streams.
        """
        if (rank, world) not in self._places:
            if world > self.streams:
                raise UserError(
                    f"{world} workers are more than data.streams = {self.streams}; set data.streams to at least {world}"
                )
            stream = np.arange(self.batch_size) % self.streams
            self._places[rank, world] = np.flatnonzero(stream * world // self.streams == rank)
        positions = self._places[rank, world] + step * self.batch_size
        return self.plan(epoch)[positions].astype(np.int64), positions

    def plan(self, epoch: int) -> np.ndarray:
        """Row number at each position of an epoch, int [N], read-only; the last epoch asked for is kept."""
        with self._lock:  # the loader asks from several threads
            if self._planned is None or self._planned[0] != epoch:
                self._planned = None  # let go of the old plan before the new one is made
                self._planned = (epoch, self._plan(epoch))
            return self._planned[1]

    def probabilities(self, epoch: int) -> np.ndarray:
        """p_c of an epoch, float64 [C]."""
        return progressive(*self._targets, epoch, self.epochs)

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """m_c of an epoch, int64 [C]."""
        if self._classes_per_batch is None:
            expected = self.probabilities(epoch) * (self.steps_per_epoch * self.batch_size)
        else:
            expected = batches_per_class(self.probabilities(epoch), self.steps_per_epoch, self._classes_per_batch)
        # One order and evenly spread offsets: over the epochs, too, a class gets what it is due to within a few draws.
        offset = (self._offset + epoch * _GOLDEN_RATIO) % 1
        return round_fairly(expected, self._order, offset) * self._samples_per_class

    def _batch_shape(self, sampling: SamplingConfig) -> tuple[int | None, int]:
        classes, samples = sampling.classes_per_batch, sampling.samples_per_class
        if classes is None or samples is None:
            return None, 1
        if classes * samples != self.batch_size:
            raise UserError(
                f"batch_size = {self.batch_size} must be classes_per_batch x samples_per_class = {classes * samples}"
            )
        batches_per_class(self.probabilities(0), self.steps_per_epoch, classes)  # raises when P exceeds the classes
        return classes, samples

    def _find_body(self, index: Index, tail_shards: Collection[int]) -> None:
        """Tell the classes that are held in memory from those of the body, and list the body's shards."""
        self._num_shards = int(index.shard.max()) + 1
        in_body = ~np.isin(np.arange(self._num_shards), np.fromiter(tail_shards, np.int64))[index.shard]
        self._held = np.bincount(index.label[in_body], minlength=self.num_classes) == 0
        self._body_shards = np.flatnonzero(np.bincount(index.shard[in_body]))

    def _plan(self, epoch: int) -> np.ndarray:
        draws, drawn = self.draws_per_class(epoch), self._drawn_before(epoch)
        rng = generator(self.seed, "epoch", epoch)
        positions = self._positions(self._groups(draws, rng))
        rows = np.concatenate([self._held_rows(draws, drawn, rng), self._body_rows(draws, drawn, rng)])
        plan = np.empty(len(rows), dtype=rows.dtype)
        plan[positions] = rows
        plan.setflags(write=False)
        return plan

    def _drawn_before(self, epoch: int) -> np.ndarray:
        """Draws of each class before an epoch, int64 [C]."""
        known, drawn = self._drawn if self._drawn[0] <= epoch else (0, np.zeros(self.num_classes, dtype=np.int64))
        for earlier in range(known, epoch):
            drawn = drawn + self.draws_per_class(earlier)
        self._drawn = (epoch, drawn)
        return drawn

    def _groups(self, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """At each position the class that is drawn there; C where the body's order of reading decides. Int [N]."""
        if self._classes_per_batch is None:
            return epoch_classes(np.append(np.where(self._held, draws, 0), draws[~self._held].sum()), rng)
        table = deal_classes(draws // self._samples_per_class, self.steps_per_epoch, rng)
        # Neighbours in a batch belong to different streams: the K draws of a class are read at different places.
        return np.repeat(table, self._samples_per_class, axis=1).ravel()

    def _positions(self, groups: np.ndarray) -> np.ndarray:
        """Positions grouped: of held classes by time, then those of the body by (stream, time). Int64 [N]."""
        held = np.append(self._held, False)
        by_time = np.flatnonzero(held[groups])
        by_time = by_time[np.argsort(groups[by_time], kind="stable")]
        per_stream = len(groups) // self.streams
        by_stream = groups.reshape(per_stream, self.streams).T.ravel()
        places = np.flatnonzero(~held[by_stream])
        places = places[np.argsort(by_stream[places], kind="stable")]
        return np.concatenate([by_time, places % per_stream * self.streams + places // per_stream])

    def _held_rows(self, draws: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows that the held classes draw, class by class, in order of time."""
        per_batch = self._samples_per_class
        # A round goes over different samples only and, for P x K, ends where a batch ends: whole batches see no repeat.
        round_length = np.where(self.counts >= per_batch, self.counts // per_batch * per_batch, self.counts)
        parts = [self._circle[:0]]
        for classes, numbers, rows in self._drawn_rows(np.flatnonzero(self._held), draws, drawn):
            begins = numbers % round_length[classes] == 0  # `numbers` begin with 0 in each class
            parts.append(rows[_random_order_within(np.cumsum(begins) - 1, rng)])
        return np.concatenate(parts)

    def _body_rows(self, draws: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows that the body's classes draw, in order of reading; in P x K, class by class."""
        num_windows = -(-len(self._body_shards) // WINDOW_SHARDS)
        window_of_shard = rng.integers(max(1, num_windows), size=self._num_shards)  # any will do for what is in memory
        window_of_shard[rng.permutation(self._body_shards)] = np.arange(len(self._body_shards)) // WINDOW_SHARDS
        all_rows, all_windows = [self._circle[:0]], [np.empty(0, dtype=np.uint16)]
        for classes, numbers, rows in self._drawn_rows(np.flatnonzero(~self._held), draws, drawn):
            visit, sample = np.divmod(numbers, self.counts[classes])
            visits = draws[classes] // self.counts[classes] + (sample < draws[classes] % self.counts[classes])
            apart = visit * np.minimum(visits, REPEAT_WINDOWS) // visits
            windows = (window_of_shard[self._shard[rows]] + apart) % num_windows
            if self._classes_per_batch is None:
                all_rows.append(rows)
                all_windows.append(windows.astype(np.min_scalar_type(num_windows)))
            else:
                all_rows.append(rows[_random_order_within((classes - classes[0]) * num_windows + windows, rng)])
        rows = np.concatenate(all_rows)
        return rows if self._classes_per_batch else rows[_random_order_within(np.concatenate(all_windows), rng)]

    def _drawn_rows(
        self, classes: np.ndarray, draws: np.ndarray, drawn: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The draws of some classes along their circles, in blocks of whole classes.

        Yields:
            Of each draw its class, its number in the class this epoch and the row, int [draws] each.
        """
        block = np.cumsum(draws[classes]) // _BLOCK_DRAWS
        for part in np.split(classes, np.flatnonzero(np.diff(block)) + 1):
            of = np.repeat(part, draws[part])
            if not len(of):
                continue
            numbers = np.arange(len(of)) - np.repeat(np.cumsum(draws[part]) - draws[part], draws[part])
            yield of, numbers, self._circle[self._circle_start[of] + (drawn[of] + numbers) % self.counts[of]]


def _targets(counts: np.ndarray, classes: Sequence[str], sampling: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities of the first and of the last epoch, float64 [C] each."""
    natural = class_probabilities(counts, sampling.power)  # raises when there are no samples
    if sampling.class_weights is not None:
        weighted = weighted_probabilities(counts, classes, sampling.class_weights)
        return weighted, weighted
    last = natural if sampling.power_last is None else class_probabilities(counts, sampling.power_last)
    return natural, last


def _circles(labels: np.ndarray, num_classes: int, rng: np.random.Generator) -> np.ndarray:
    """Rows grouped by class, in random order within each, int32 [samples] (int64 from 2^31 samples on)."""
    rows = rng.permutation(np.arange(len(labels), dtype=np.int32 if len(labels) < 2**31 else np.int64))
    return rows[np.argsort(labels.astype(np.min_scalar_type(num_classes))[rows], kind="stable")]


def _random_order_within(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices that sort `cells`, in random order within each cell, int64 [draws]."""
    shuffled = rng.permutation(len(cells))
    narrow = cells.astype(np.min_scalar_type(int(cells.max(initial=0))))  # up to 16 bits numpy sorts by radix
    return shuffled[np.argsort(narrow[shuffled], kind="stable")]
