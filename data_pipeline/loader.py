"""Batches of tensors: stream -> shards -> DALI, with a few batches read and decoded ahead.

Damaged images. DALI fails a whole batch; its images are then decoded one by one, the damaged ones named and counted,
and the batch is made again: in training with the next image of the same class (by index row) in place of a damaged
one, in evaluation (`passes.py`) without it. Over `data.max_damaged` different ones the run stops with the list: those
that this worker has met, and those of the others when the trainer passes them on (`TrainLoader.add_damaged` at each
checkpoint, `damage.check_left_out` after a pass).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import draw_views
from data_pipeline.config import DataConfig, SamplingConfig
from data_pipeline.damage import DamageLog
from data_pipeline.dataset import Dataset
from data_pipeline.decode import Decoder, find_damaged
from data_pipeline.mix import mix_batch
from data_pipeline.passes import decoder_settings
from data_pipeline.read_ahead import READ_THREADS, Batch, Load, decode_ahead, make_batch, read_images
from data_pipeline.shards import ShardReader
from data_pipeline.stream import TrainStream

__all__ = ["Batch", "TrainLoader"]

DECODED_TYPES = (torch.float32, torch.float16)
"""What DALI makes by itself."""
PREFETCH_STEPS = 128
"""How far ahead the shards of a bucket are asked for."""

_log = logging.getLogger(__name__)


class TrainLoader:
    """A rank's training batches; any batch is a pure function of (dataset, configuration, seed, epoch, step, rank)."""

    wait_s: float
    """Seconds that the caller has waited for batches so far."""

    def __init__(  # noqa: PLR0913 - every one names itself at the call
        self,
        dataset: Dataset,
        data: DataConfig,
        *,
        batch_size: int,
        views: int,
        sampling: SamplingConfig,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        epochs: int = 1,
        dtype: torch.dtype = torch.float32,
        warn: Callable[[str], None] = _log.warning,
    ):
        """Plan nothing yet, but read the tail shards into memory (a bucket's: begin to).

        Args:
            dataset: Its train split is read.
            data: Image size, augmentation, streams, threads, cache.
            batch_size: Over all ranks, views not counted.
            views: V augmented views of each image.
            sampling: Which classes a batch draws from.
            seed: The run's seed.
            rank: Of this worker.
            world: Number of workers.
            device: Where the tensors go.
            epochs: Of the whole training: when a progressive sampling arrives, and where reading ahead ends.
            dtype: Of the images; other ones than float32 and float16 are converted to on the device.
            warn: Is told of each damaged image that this worker meets.

        Raises:
            UserError: The configuration does not fit the dataset or the machine, or a tail shard is broken.
        """
        self._index = dataset.index("train")
        self._data, self._seed, self._rank, self._world, self._device = data, seed, rank, world, device
        tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
        self._stream = TrainStream(self._index, dataset.classes, batch_size, sampling, data.streams, seed, tail, epochs)
        self._epochs = epochs
        self.steps_per_epoch = self._stream.steps_per_epoch
        self._views = views
        self._dtype, self._warn = dtype, warn
        settings = decoder_settings(dataset, data, batch_size, device)
        decoded = dtype if dtype in DECODED_TYPES else torch.float32
        self._decoder = Decoder(replace(settings, augment=data.augment, views=views, dtype=decoded))
        self._reader = ShardReader(dataset, data)
        self._reader.hold(tail)
        self._damage = DamageLog(dataset, self._index, data.max_damaged, self._reader)
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._next = (0, 0)
        self.wait_s = 0.0

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Key and reason of each damaged image that this worker has met or was told of."""
        return self._damage.pairs()

    def add_damaged(self, pairs: Iterable[Iterable[str]]) -> None:
        """Take up what other workers' `damaged` say, so that the limit holds for the run and any rank's state is whole.

        It changes no batch: a damaged image is replaced by the same one, whenever it is found out.

        Raises:
            UserError: Together there are more than `data.max_damaged`.
        """
        self._damage.add_pairs(pairs)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on.

        Raises:
            UserError: Too many images are damaged, all of a class are, or a shard is broken.
        """
        jobs = (partial(self._load, epoch, step) for step in range(first_step, self.steps_per_epoch))
        self._prefetch(epoch, range(first_step, first_step + PREFETCH_STEPS))
        decoded = decode_ahead(self._decoder, self._pool, jobs, self._repair)
        while True:
            asked_at = time.perf_counter()
            ready = next(decoded, None)
            if ready is None:
                self._reader.settle()  # nothing of an epoch stays unchecked: a checkpoint may follow
            self.wait_s += time.perf_counter() - asked_at
            if ready is None:
                return
            load, images = ready
            last = load.step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, load.step + 1)
            yield self._mixed(make_batch(self._index, load, images.to(self._dtype)), load)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, as JSON: epoch and step of the next batch, and the damaged images met so far."""
        epoch, step = self._next
        return {"epoch": epoch, "step": step, "damaged": [list(pair) for pair in self.damaged]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state, of any world size; go on with `epoch(state["epoch"], state["step"])`.

        Raises:
            UserError: It names more damaged images than `data.max_damaged`.
        """
        self._next = (int(state["epoch"]), int(state["step"]))
        self._damage.add_pairs(state["damaged"])

    def close(self) -> None:
        """Stop the threads and let go of DALI and the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()
        self._reader.close()

    def _load(self, epoch: int, step: int) -> Load:
        rows, positions = self._stream.rank_rows(epoch, step, self._rank, self._world)
        self._prefetch(epoch, [step + PREFETCH_STEPS])
        if step + 1 == self.steps_per_epoch and epoch + 1 < self._epochs:
            self._pool.submit(self._look_ahead, epoch + 1)
        return self._fill(Load(epoch, step, rows, [], positions=positions))

    def _fill(self, load: Load) -> Load:
        """Read the images of `load.rows`, damaged ones replaced, and make their augmentation parameters."""
        assert load.positions is not None
        rows = self._damage.replaced(load.rows)
        sizes = self._index.width[rows], self._index.height[rows]
        views = draw_views(
            self._data.augment, self._data.image_px, (self._seed, load.epoch), load.positions, self._views, sizes
        )
        return replace(load, rows=rows, encoded=read_images(self._reader, self._index, rows), views=views)

    def _mixed(self, batch: Batch, load: Load) -> Batch:
        config = self._data.mix
        if not (config.mixup_alpha or config.cutmix_alpha):
            return batch
        assert load.positions is not None
        images, mix = mix_batch(
            batch.images, batch.labels, load.positions, self._data.streams, config, self._seed, load.epoch
        )
        return replace(batch, images=images, mix=mix)

    def _repair(self, load: Load) -> Load:
        found = find_damaged(self._decoder.settings, load.encoded, load.views)
        for key, reason in self._damage.add({int(load.rows[place]): why for place, why in found.items()}).items():
            self._warn(f"{key} of split train is damaged, the next of its class takes its place: {reason}")
        return self._fill(load)

    def _look_ahead(self, epoch: int) -> None:
        """Plan an epoch and begin to fetch it while the one before is still being decoded."""
        self._stream.plan(epoch)
        self._prefetch(epoch, range(PREFETCH_STEPS))

    def _prefetch(self, epoch: int, steps: Iterable[int]) -> None:
        if self._reader.in_folder:
            return
        for step in steps:
            if step < self.steps_per_epoch:
                rows, _ = self._stream.rank_rows(epoch, step, self._rank, self._world)
                self._reader.prefetch(np.unique(self._index.shard[rows]).tolist())
