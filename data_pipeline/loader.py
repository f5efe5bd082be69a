"""Batches of tensors: stream -> shards -> DALI, with a few batches read and decoded ahead.

Damaged images. DALI fails a whole batch; its images are then decoded one by one, the damaged ones named and counted,
and the batch is made again: in training with the next image of the same class (by index row) in place of a damaged
one, in evaluation without it. Over `data.max_damaged` different ones in a worker, the run stops with the list.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.augment import uniform_numbers, view_parameters
from data_pipeline.config import DataConfig, SamplingConfig
from data_pipeline.dataset import Dataset, Index
from data_pipeline.decode import Decoder, DecoderSettings, ImageSettings, find_damaged
from data_pipeline.images import DamagedImage, prepare_image
from data_pipeline.read_ahead import READ_THREADS, DamageLog, Load, decode_ahead, read_images
from data_pipeline.shards import ShardReader
from data_pipeline.stream import TrainStream

PREFETCH_STEPS = 128
"""How far ahead the shards of a bucket are asked for."""

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Batch:
    """One rank's part of a batch; B samples, V views."""

    images: torch.Tensor
    """float32 [V * B, 3, px, px], normalised, channels_last, view-major: all of view 0, then view 1."""
    labels: torch.Tensor
    """int64 [B], on the images' device."""
    rows: np.ndarray
    """int64 [B]: rows of the split's index."""
    keys: list[str]
    step: int
    epoch: int


@dataclass(eq=False)
class FileBatch:
    """Loose images; `numbers` and `damaged` count within the files that were given."""

    images: torch.Tensor
    """float32 [B, 3, px, px], channels_last."""
    numbers: list[int]
    """[B]: which file each image is."""
    damaged: list[tuple[int, str]]
    """Files that could not be decoded, with the reason."""


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
    ):
        """Plan nothing yet, but read the tail shards into memory.

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

        Raises:
            UserError: The configuration does not fit the dataset or the machine, or a tail shard is broken.
        """
        self._index = dataset.index("train")
        self._data, self._seed, self._rank, self._world, self._device = data, seed, rank, world, device
        tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
        classes = len(dataset.classes)
        self._stream = TrainStream(self._index, classes, batch_size, sampling, data.streams, seed, tail)
        self.steps_per_epoch = self._stream.steps_per_epoch
        self._views = views
        self._decoder = Decoder(
            replace(_decoder_settings(dataset, data, batch_size, device), augment=data.augment, views=views)
        )
        self._damage = DamageLog(dataset, self._index, data.max_damaged)
        self._reader = ShardReader(dataset, data)
        self._reader.hold(tail)
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._next = (0, 0)
        self.wait_s = 0.0

    @property
    def damaged(self) -> list[tuple[str, str]]:
        """Key and reason of each damaged image that this worker has met."""
        return self._damage.pairs()

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
            self.wait_s += time.perf_counter() - asked_at
            if ready is None:
                return
            load, images = ready
            last = load.step + 1 == self.steps_per_epoch
            self._next = (epoch + 1, 0) if last else (epoch, load.step + 1)
            yield _batch(self._index, load, images)

    def state_dict(self) -> dict[str, Any]:
        """Where to go on, as JSON: epoch and step of the next batch, and the damaged images met so far."""
        epoch, step = self._next
        return {"epoch": epoch, "step": step, "damaged": [list(pair) for pair in self.damaged]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state, of any world size; go on with `epoch(state["epoch"], state["step"])`."""
        self._next = (int(state["epoch"]), int(state["step"]))
        self._damage.restore(state["damaged"])

    def close(self) -> None:
        """Stop the threads and let go of DALI and the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()
        self._reader.close()

    def _load(self, epoch: int, step: int) -> Load:
        rows, positions = self._stream.rank_rows(epoch, step, self._rank, self._world)
        self._prefetch(epoch, [step + PREFETCH_STEPS])
        return self._fill(Load(epoch, step, rows, [], positions=positions))

    def _fill(self, load: Load) -> Load:
        """Read the images of `load.rows`, damaged ones replaced, and make their augmentation parameters."""
        assert load.positions is not None
        rows = self._damage.replaced(load.rows)
        widths, heights = self._index.width[rows], self._index.height[rows]
        views = [
            view_parameters(
                self._data.augment, uniform_numbers(self._seed, load.epoch, view, load.positions), widths, heights
            )
            for view in range(self._views)
        ]
        return replace(load, rows=rows, encoded=read_images(self._reader, self._index, rows), views=views)

    def _repair(self, load: Load) -> Load:
        found = find_damaged(self._decoder.settings, load.encoded, load.views)
        self._damage.add({int(load.rows[place]): reason for place, reason in found.items()})
        return self._fill(load)

    def _prefetch(self, epoch: int, steps: Iterable[int]) -> None:
        for step in steps:
            if step < self.steps_per_epoch:
                rows, _ = self._stream.rank_rows(epoch, step, self._rank, self._world)
                self._reader.prefetch(np.unique(self._index.shard[rows]).tolist())


def evaluation_batches(
    dataset: Dataset,
    data: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
) -> Iterator[Batch]:
    """Each sample of a split once over all ranks, in index order, without augmentation.

    Rank r gets the r-th contiguous block of rows; blocks, and with them the numbers of batches, may differ in size.
    A damaged image is left out, with a warning that names it; `Batch.rows` tells which samples are there.

    Args:
        dataset: The packed dataset.
        data: Image size, threads, cache.
        split: train, val or test.
        batch_size: Of this rank; the last batch may be smaller.
        rank: Of this worker.
        world: Number of workers.
        device: Where the tensors go; None = CPU.

    Raises:
        UserError: More than `data.max_damaged` images of this rank are damaged, or a shard is broken.
    """
    index = dataset.index(split)
    begin, end = rank * len(index) // world, (rank + 1) * len(index) // world
    decoder = Decoder(_decoder_settings(dataset, data, batch_size, device or torch.device("cpu")))
    damage = DamageLog(dataset, index, data.max_damaged)
    reader = ShardReader(dataset, data)
    reader.prefetch(dict.fromkeys(index.shard[begin:end].tolist()))

    def load(first: int) -> Load:
        rows = np.arange(first, min(first + batch_size, end))
        return Load(0, (first - begin) // batch_size, rows, read_images(reader, index, rows))

    def repair(load: Load) -> Load:
        found = find_damaged(decoder.settings, load.encoded)
        damage.add({int(load.rows[place]): reason for place, reason in found.items()})
        for place, reason in found.items():
            _log.warning("%s of split %s is left out, it is damaged: %s", index.key[load.rows[place]], split, reason)
        return load.without(found)

    jobs = (partial(load, first) for first in range(begin, end, batch_size))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        try:
            for ready, images in decode_ahead(decoder, pool, jobs, repair):
                yield _batch(index, ready, images)
        finally:
            decoder.close()
            reader.close()


def decode_files(
    files: Sequence[Path | str | bytes],
    image: ImageSettings,
    *,
    batch_size: int,
    device: torch.device | None = None,
    threads: int = 2,
) -> Iterator[FileBatch]:
    """Loose images through the evaluation graph, in the given order; damaged ones are reported, never fatal.

    Any format that Pillow reads is taken, by the rules of `images.py`.

    Args:
        files: Paths, or the encoded bytes themselves.
        image: Size and normalisation.
        batch_size: The last batch may be smaller; damaged files make any batch smaller, down to none.
        device: Where the tensors go; None = CPU.
        threads: For reading and for DALI.
    """
    decoder = Decoder(DecoderSettings(image, batch_size, device or torch.device("cpu"), threads))

    def load(first: int) -> Load:
        loaded = Load(0, first // batch_size, np.arange(first, min(first + batch_size, len(files))), [])
        damaged = {}
        for place, file in enumerate(files[first : first + batch_size]):
            try:
                data = file if isinstance(file, bytes) else Path(file).read_bytes()
                loaded.encoded.append(np.frombuffer(prepare_image(data).data, dtype=np.uint8))
            except (DamagedImage, OSError) as error:
                loaded.encoded.append(np.empty(0, dtype=np.uint8))
                damaged[place] = getattr(error, "strerror", None) or str(error)
        return loaded.without(damaged)

    def repair(load: Load) -> Load:
        return load.without(find_damaged(decoder.settings, load.encoded))

    jobs = (partial(load, first) for first in range(0, len(files), batch_size))
    with ThreadPoolExecutor(threads) as pool:
        for ready, images in decode_ahead(decoder, pool, jobs, repair):
            yield FileBatch(images, ready.rows.tolist(), ready.damaged)


def _decoder_settings(dataset: Dataset, data: DataConfig, batch_size: int, device: torch.device) -> DecoderSettings:
    image = ImageSettings(data.image_px, data.resize_ratio, dataset.mean, dataset.std)
    return DecoderSettings(image, batch_size, device, data.decode_threads, data.decode)


def _batch(index: Index, load: Load, images: torch.Tensor) -> Batch:
    labels = torch.from_numpy(index.label[load.rows]).to(images.device)
    return Batch(images, labels, load.rows, index.key[load.rows].tolist(), load.step, load.epoch)
