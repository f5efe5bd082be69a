"""What training, evaluation and prediction share: batches, and reading and decoding ahead of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch

from data_pipeline.augment import ViewParameters
from data_pipeline.dataset import Index
from data_pipeline.decode import QUEUE_DEPTH, DecodeError, Decoder, can_parse
from data_pipeline.mix import Mix
from data_pipeline.shards import ShardReader

READ_AHEAD_BATCHES = 4
READ_THREADS = 2


@dataclass(eq=False)
class Batch:
    """One rank's part of a batch; B samples, V views."""

    images: torch.Tensor
    """float32, or the dtype that was asked for, [V * B, 3, px, px], normalised, channels_last, view-major: all of view
    0, then view 1."""
    labels: torch.Tensor
    """int64 [B], on the images' device."""
    rows: np.ndarray
    """int64 [B]: rows of the split's index."""
    keys: list[str]
    step: int
    epoch: int
    mix: Mix | None = None
    """What the images are mixed of, where `data.mix` asks for it."""
    positions: np.ndarray | None = None
    """int64 [B]: of the samples in the epoch, whatever the number of ranks; training only."""


@dataclass(eq=False)
class FileBatch:
    """Loose images; `numbers` and `damaged` count within the files that were given."""

    images: torch.Tensor
    """float32 [B, 3, px, px], channels_last."""
    numbers: list[int]
    """[B]: which file each image is."""
    damaged: list[tuple[int, str]]
    """Files that could not be decoded, with the reason."""


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
    can_parse: bool = True
    """Whether DALI can parse all of them, and so may be given them."""

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
    return reader.read(list(ranges))


def make_batch(index: Index, load: Load, images: torch.Tensor) -> Batch:
    """The batch of a split that a load has become."""
    labels = torch.from_numpy(index.label[load.rows]).to(images.device)
    return Batch(images, labels, load.rows, index.key[load.rows].tolist(), load.step, load.epoch, None, load.positions)


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
        reading.extend(pool.submit(_parsed, job) for job in islice(remaining, READ_AHEAD_BATCHES - len(reading)))
        while reading and len(decoding) < QUEUE_DEPTH and (reading[0].done() or (wait and not decoding)):
            load = reading.popleft().result()
            decoding.append(load if load.can_parse else _repaired(load, repair))
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
            decoding[0] = _repaired(decoding[0], repair)
            for load in decoding:
                _submit(decoder, load)
    side = decoder.settings.image.image_px
    return torch.empty(0, 3, side, side, device=decoder.settings.device)


def _parsed(job: Callable[[], Load]) -> Load:
    load = job()
    return replace(load, can_parse=all(can_parse(data) for data in load.encoded))


def _repaired(load: Load, repair: Callable[[Load], Load]) -> Load:
    """The load with what takes the place of its damaged images; that may be damaged too."""
    while True:
        repaired = _parsed(partial(repair, load))
        if np.array_equal(repaired.rows, load.rows):
            raise RuntimeError(f"DALI failed on a batch of which it decodes each image: rows {load.rows.tolist()}")
        if repaired.can_parse:
            return repaired
        load = repaired


def _submit(decoder: Decoder, load: Load) -> None:
    if load.encoded:
        decoder.submit(load.encoded, load.views)
