"""One pass: each sample of a split once over all ranks, as it is or in augmented views; loose files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_pipeline.augment import ViewParameters, draw_views
from data_pipeline.config import DataConfig
from data_pipeline.damage import DamageLog
from data_pipeline.dataset import Dataset
from data_pipeline.decode import Decoder, DecoderSettings, ImageSettings, find_damaged
from data_pipeline.images import DamagedImage, decodable
from data_pipeline.loose_images import BUCKET, ImageReader
from data_pipeline.read_ahead import READ_THREADS, Batch, FileBatch, Load, decode_ahead, make_batch, read_images
from data_pipeline.shards import ShardReader

MAX_DECODE_THREADS = 16
"""More than this outrun any network that is trained."""

BUCKET_REQUESTS = 32
"""Small reads wait for answers, not for bandwidth; as many as a storage keeps connections."""

VIEWS_EPOCH = 2**31 - 1
"""The epoch from whose numbers views are augmented that are kept: no training comes to it."""

_log = logging.getLogger(__name__)


def evaluation_batches(
    dataset: Dataset,
    data: DataConfig,
    split: str,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> Iterator[Batch]:
    """Each sample of a split once over all ranks, in index order, without augmentation.

    Rank r gets the r-th contiguous block of rows; blocks, and with them the numbers of batches, may differ in size.
    A damaged image is left out; `Batch.rows` tells which samples are there.

    Args:
        dataset: The packed dataset.
        data: Image size, threads, cache.
        split: train, val or test.
        batch_size: Of this rank; the last batch may be smaller.
        rank: Of this worker.
        world: Number of workers.
        device: Where the tensors go; None = CPU.
        warn: Is told of each damaged image.

    Raises:
        UserError: More than `data.max_damaged` images of this rank are damaged (`damage.check_left_out` looks at those
            of all ranks), or a shard is broken.
    """
    settings = decoder_settings(dataset, data, batch_size, device or torch.device("cpu"))
    yield from _each_once(dataset, data, split, settings, (rank, world), warn)


def augmented_batches(  # noqa: PLR0913 - every one names itself at the call
    dataset: Dataset,
    data: DataConfig,
    split: str,
    *,
    views: int,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | None = None,
    warn: Callable[[str], None] = _log.warning,
) -> Iterator[Batch]:
    """As `evaluation_batches`, in views that are augmented as training images are.

    A view is a pure function of (seed, row, number of the view): batches, ranks and the number of views change nothing.
    An image is decoded once for all of its views.

    Args:
        dataset: The packed dataset.
        data: Image size, augmentation, threads, cache.
        split: train, val or test.
        views: V of each image.
        seed: The run's seed.
        batch_size: Images of this rank, views not counted; the last batch may be smaller.
        rank: Of this worker.
        world: Number of workers.
        device: Where the tensors go; None = CPU.
        warn: Is told of each damaged image.

    Yields:
        Batches with images [V * B, 3, px, px], view-major.

    Raises:
        UserError: More than `data.max_damaged` images of this rank are damaged, or a shard is broken.
    """
    settings = decoder_settings(dataset, data, batch_size, device or torch.device("cpu"))
    settings = replace(settings, augment=data.augment, views=views)
    yield from _each_once(dataset, data, split, settings, (rank, world), warn, seed)


def _each_once(
    dataset: Dataset,
    data: DataConfig,
    split: str,
    settings: DecoderSettings,
    share: tuple[int, int],
    warn: Callable[[str], None],
    seed: int = 0,
) -> Iterator[Batch]:
    """The pass of one rank, `share` being (rank, world); `seed` is that of augmented views."""
    index, (rank, world) = dataset.index(split), share
    begin, end = rank * len(index) // world, (rank + 1) * len(index) // world
    decoder = Decoder(settings)
    reader = ShardReader(dataset, data)
    damage = DamageLog(dataset, index, data.max_damaged, reader)
    reader.prefetch(dict.fromkeys(index.shard[begin:end].tolist()))

    def load(first: int) -> Load:
        rows = np.arange(first, min(first + settings.batch_size, end))
        number = (first - begin) // settings.batch_size
        return Load(0, number, rows, read_images(reader, index, rows), views_of(rows))

    def views_of(rows: np.ndarray) -> list[ViewParameters]:
        if settings.augment is None or not len(rows):
            return []
        sizes = index.width[rows], index.height[rows]
        return draw_views(settings.augment, data.image_px, (seed, VIEWS_EPOCH), rows, settings.views, sizes)

    def repair(load: Load) -> Load:
        found = find_damaged(decoder.settings, load.encoded, load.views)
        for key, reason in damage.add({int(load.rows[place]): reason for place, reason in found.items()}).items():
            warn(f"{key} of split {split} is left out, it is damaged: {reason}")
        whole = load.without(found)
        return replace(whole, views=views_of(whole.rows))

    jobs = (partial(load, first) for first in range(begin, end, settings.batch_size))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        try:
            for ready, images in decode_ahead(decoder, pool, jobs, repair):
                yield make_batch(index, ready, images)
            reader.settle()
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

    Any format of `images.FORMATS` is taken, by the rules there.

    Args:
        files: Paths, `s3://` URIs, or the encoded bytes themselves.
        image: Size and normalisation.
        batch_size: The last batch may be smaller; damaged files make any batch smaller, down to none.
        device: Where the tensors go; None = CPU.
        threads: For reading local files and for DALI; a bucket is asked for `BUCKET_REQUESTS` images at a time.

    Raises:
        UserError: A bucket does not give an image.
    """
    decoder = Decoder(DecoderSettings(image, batch_size, device or torch.device("cpu"), threads))
    read = ImageReader()

    def encoded(file: Path | str | bytes) -> np.ndarray | str:
        try:
            return np.frombuffer(decodable(file if isinstance(file, bytes) else read(file)), dtype=np.uint8)
        except (DamagedImage, OSError) as error:
            return getattr(error, "strerror", None) or str(error)

    def load(first: int) -> Load:
        some = files[first : first + batch_size]
        remote = any(isinstance(file, str) and file.startswith(BUCKET) for file in some)
        # Else one thread a batch: small tasks would be handed to and fro under Python's lock.
        found = list(requests.map(encoded, some) if remote else map(encoded, some))
        images = [np.empty(0, dtype=np.uint8) if isinstance(image, str) else image for image in found]
        loaded = Load(0, first // batch_size, np.arange(first, first + len(some)), images)
        return loaded.without({place: reason for place, reason in enumerate(found) if isinstance(reason, str)})

    def repair(load: Load) -> Load:
        return load.without(find_damaged(decoder.settings, load.encoded))

    jobs = (partial(load, first) for first in range(0, len(files), batch_size))
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(BUCKET_REQUESTS) as requests:
        try:
            for ready, images in decode_ahead(decoder, pool, jobs, repair):
                yield FileBatch(images, ready.rows.tolist(), ready.damaged)
        finally:
            decoder.close()


def decoder_settings(dataset: Dataset, data: DataConfig, batch_size: int, device: torch.device) -> DecoderSettings:
    """How a split's images are decoded without augmentation."""
    image = ImageSettings(data.image_px, data.resize_ratio, dataset.mean, dataset.std)
    return DecoderSettings(image, batch_size, device, data.decode_threads or cores_per_worker(), data.decode)


def cores_per_worker() -> int:
    """Cores that this process may use, shared out over the machine's workers (LOCAL_WORLD_SIZE, as launchers set it).

    At least one, at most `MAX_DECODE_THREADS`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), MAX_DECODE_THREADS)
