"""The order of training: which sample stands at which position of an epoch.

The order is planned, not queued. From the index alone, before anything is read, each epoch's N = steps * batch size
draws are computed in a few vectorised passes. Class frequencies are therefore exact instead of approached, and any
step of any epoch can be asked for on its own: resuming replays nothing.

1.  *Draws a class.* Class c gets m_c draws, N shared out by p_c ~ n_c^q (`sampling.apportion`); in P x K batches it
    gets K draws in each of the batches that it is dealt to (`sampling.deal_classes`).
2.  *Samples.* A class's samples lie in a circle, shuffled once by the seed. The k-th draw of the class since the start
    of training is sample k mod n_c of the circle: over any epoch, and over all epochs together, each sample is drawn
    floor or ceil of the mean. With q = 1 no sample comes twice in an epoch. What earlier epochs drew is recomputed from
    their m_c, O(C) an epoch.
3.  *Positions.* The multiset of classes is put in random order (or dealt batch by batch for P x K). Position i belongs
    to canonical stream i mod S; step t is the positions [t * B, (t + 1) * B).
4.  *Which draw of a class at which of its positions.* For classes held in memory (all their samples in tail shards):
    at random, going round the circle in rounds, so that a rare sample's visits are spread over the epoch and the K
    draws of a class in one batch are different samples whenever n_c >= K. For the classes of the body, by place:
    shards are put in random order, cut into windows of a few, samples shuffled within the windows; a class's draws
    in that reading order meet its positions in the order (stream, time). Stream s thus reads about the s-th part of
    the shards from front to back, whatever the mix of classes: sequential reading needs no per-class queues.
5.  *Ranks.* Rank r of W takes a contiguous block of streams. The global batch is the same for every W <= S; where W
    does not divide S the ranks' parts differ in size.

Legend: N draws of an epoch, T steps, B global batch size, S streams, C classes, n_c samples, m_c draws of class c.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import Index
from data_pipeline.sampling import (
    apportion,
    batches_per_class,
    class_probabilities,
    deal_classes,
    epoch_classes,
    generator,
)

WINDOW_SHARDS = 4
"""Shards among which samples are shuffled: what a stream keeps open at a time."""


class TrainStream:
    """The training order of one dataset: a pure function of (index, sampling, batch size, streams, seed)."""

    def __init__(
        self,
        index: Index,
        num_classes: int,
        batch_size: int,
        sampling: SamplingConfig,
        streams: int,
        seed: int,
        tail_shards: Collection[int] = (),
    ):
        """Prepare the class circles; no epoch is planned yet.

        Args:
            index: The training split.
            num_classes: C; classes without samples are allowed.
            batch_size: B, over all ranks.
            sampling: Power q, or P x K.
            streams: S, a divisor of B.
            seed: The run's seed.
            tail_shards: Numbers of the shards that are held in memory.

        Raises:
            UserError: The split is empty, S does not divide B, P x K is not B, or P exceeds the classes at hand.
        """
        if batch_size % streams:
            raise UserError(f"batch_size = {batch_size} must be a multiple of data.streams = {streams}")
        self.num_classes, self.batch_size, self.streams, self.seed = num_classes, batch_size, streams, seed
        self.sampling = sampling
        self.counts = np.bincount(index.label, minlength=num_classes)
        self.probabilities = class_probabilities(self.counts, sampling.power)
        self.steps_per_epoch = max(1, len(index) // batch_size)
        self._classes_per_batch, self._samples_per_class = self._batch_shape()
        self._shard = index.shard
        # Circles of all classes one after the other: a random order, grouped by class.
        shuffled = generator(seed, "circle").permutation(len(index))
        self._circle = shuffled[np.argsort(index.label[shuffled], kind="stable")]
        self._circle_start = np.cumsum(self.counts) - self.counts
        in_body = ~np.isin(index.shard, np.fromiter(tail_shards, np.int64))
        self._held = np.bincount(index.label[in_body], minlength=num_classes) == 0
        self._body_shards = np.unique(index.shard[in_body])
        self._num_shards = int(index.shard.max()) + 1
        self._drawn = (0, np.zeros(num_classes, dtype=np.int64))  # (epoch, draws of each class before it)
        self._planned: tuple[int, np.ndarray] | None = None
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
        if world > self.streams:
            raise UserError(
                f"{world} workers are more than data.streams = {self.streams}; set data.streams to at least {world}"
            )
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        positions = positions[(positions % self.streams) * world // self.streams == rank]
        return self.plan(epoch)[positions].astype(np.int64), positions

    def plan(self, epoch: int) -> np.ndarray:
        """Row number at each position of an epoch, int [N]; the last epoch asked for is kept."""
        with self._lock:  # the loader asks from several threads
            if self._planned is None or self._planned[0] != epoch:
                self._planned = None  # let go of the old plan before the new one is made
                self._planned = (epoch, self._plan(epoch))
            return self._planned[1]

    def draws_per_class(self, epoch: int) -> np.ndarray:
        """m_c of an epoch, int64 [C]."""
        rng = generator(self.seed, "draws", epoch)
        if self._classes_per_batch is None:
            return apportion(self.probabilities, self.steps_per_epoch * self.batch_size, rng)
        chosen = self.steps_per_epoch * self._classes_per_batch
        expected = batches_per_class(self.probabilities, self.steps_per_epoch, self._classes_per_batch)
        return apportion(expected / chosen, chosen, rng) * self._samples_per_class

    def _batch_shape(self) -> tuple[int | None, int]:
        classes, samples = self.sampling.classes_per_batch, self.sampling.samples_per_class
        if classes is None or samples is None:
            return None, 1
        if classes * samples != self.batch_size:
            raise UserError(
                f"batch_size = {self.batch_size} must be classes_per_batch x samples_per_class = {classes * samples}"
            )
        batches_per_class(self.probabilities, self.steps_per_epoch, classes)  # raises when P exceeds the classes
        return classes, samples

    def _plan(self, epoch: int) -> np.ndarray:
        draws = self.draws_per_class(epoch)
        rng = generator(self.seed, "epoch", epoch)
        rows = self._draws_in_order(draws, self._drawn_before(epoch), rng)
        positions = self._positions_in_order(self._class_at_position(draws, rng))
        plan = np.empty(len(rows), dtype=np.int32 if len(self._shard) < 2**31 else np.int64)
        plan[positions] = rows
        return plan

    def _drawn_before(self, epoch: int) -> np.ndarray:
        """Draws of each class before an epoch, int64 [C]."""
        known, drawn = self._drawn if self._drawn[0] <= epoch else (0, np.zeros(self.num_classes, dtype=np.int64))
        for earlier in range(known, epoch):
            drawn = drawn + self.draws_per_class(earlier)
        self._drawn = (epoch, drawn)
        return drawn

    def _class_at_position(self, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Int [N]."""
        if self._classes_per_batch is None:
            return epoch_classes(draws, rng)
        table = deal_classes(draws // self._samples_per_class, self.steps_per_epoch, rng)
        return rng.permuted(np.repeat(table, self._samples_per_class, axis=1), axis=1).ravel()

    def _positions_in_order(self, classes: np.ndarray) -> np.ndarray:
        """Positions grouped by class; within a class by time if it is held in memory, else by (stream, time)."""
        by_stream = np.arange(len(classes)).reshape(-1, self.streams).T.ravel()
        by_stream = by_stream[np.argsort(classes[by_stream], kind="stable")]
        if not self._held.any():
            return by_stream
        by_time = np.argsort(classes, kind="stable")
        return np.where(self._held[classes[by_time]], by_time, by_stream)

    def _draws_in_order(self, draws: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Rows grouped by class; within a class in the order in which they meet its positions, int [N]."""
        classes = np.repeat(np.arange(self.num_classes), draws)
        number = np.arange(len(classes)) - np.repeat(np.cumsum(draws) - draws, draws)  # of the draw in its class
        counts = np.maximum(self.counts, 1)
        rows = self._circle[self._circle_start[classes] + (drawn[classes] + number) % counts[classes]]
        # A round goes over different samples only and, for P x K, ends where a batch ends: whole batches see no repeat.
        per_batch = self._samples_per_class
        round_length = np.where(counts >= per_batch, counts // per_batch * per_batch, counts)
        rounds = number // round_length[classes]
        # Window before round keeps a body class in reading order; held classes have no window.
        windows = np.where(self._held[classes], 0, self._reading_windows(rng)[self._shard[rows]])
        key = (classes * (int(windows.max()) + 1) + windows) * (int(rounds.max()) + 1) + rounds
        shuffled = rng.permutation(len(rows))  # equal keys end up in random order
        return rows[shuffled[np.argsort(key[shuffled], kind="stable")]]

    def _reading_windows(self, rng: np.random.Generator) -> np.ndarray:
        """Number of the window in which each body shard is read this epoch (0 for tail shards), int [shards]."""
        windows = np.zeros(self._num_shards, dtype=np.int64)
        windows[rng.permutation(self._body_shards)] = np.arange(len(self._body_shards)) // WINDOW_SHARDS
        return windows
