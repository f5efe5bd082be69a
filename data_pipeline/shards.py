"""Byte ranges out of shards, from a folder or from a bucket.

A folder's shards are read in place. A bucket's shards are downloaded whole, several ahead of their use, into the cache
of `shard_cache.py`. What is needed before its shard has come is read from the bucket by range, many at a time, so that
the first steps wait for their own images only; a checksum of it is kept, and compared with the copy once that has come
and its SHA-256 was found right. Tail shards are read once and stay in memory.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeAlias

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import Dataset
from data_pipeline.shard_cache import OpenShard, ShardCache, broken

MAX_OPEN_FILES = 64
PREFETCH_THREADS = 4
EARLY_THREADS = 16
"""Ranges that are read from a bucket at a time."""

Range: TypeAlias = tuple[int, int, int]
"""Shard number, offset and length in bytes."""


class ShardReader:
    """Reads encoded images by shard number and byte range; may be called from several threads."""

    def __init__(self, dataset: Dataset, data: DataConfig):
        """Nothing is read or downloaded yet.

        Raises:
            UserError: A bucket's largest shard does not fit into the cache.
        """
        self._dataset = dataset
        in_folder = all(dataset.storage.local_path(shard.path) is not None for shard in dataset.shards)
        self._cache = None if in_folder else ShardCache(dataset, data)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._max_open = MAX_OPEN_FILES if self._cache is None else min(MAX_OPEN_FILES, self._cache.max_open)
        self._held: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._downloads: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[None]] = {}
        self._holding: list[Future[None]] = []
        self._failure: BaseException | None = None
        self._early_reads: ThreadPoolExecutor | None = None
        self._early: dict[int, list[tuple[int, int, int]]] = {}  # shard -> offset, length, CRC-32 of what was read

    @property
    def in_folder(self) -> bool:
        """Whether shards are read in place; then there is nothing to prefetch."""
        return self._cache is None

    def read(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        """The bytes of each range, uint8 [length], read-only.

        Raises:
            UserError: A shard is missing, truncated or altered, also one that was to be downloaded for later.
        """
        if self._failure is not None:
            raise self._failure
        sources = {shard: self._source(shard) for shard in {shard for shard, _, _ in ranges}}
        found: list[np.ndarray | Future[np.ndarray]] = []
        for shard, offset, length in ranges:
            source = sources[shard]
            if source is None:
                found.append(self._submit_early(shard, offset, length))
            else:
                found.append(self._cut(shard, source, offset, length))
        return [data.result() if isinstance(data, Future) else data for data in found]

    def hold(self, shards: Iterable[int]) -> None:
        """Read whole shards into memory, where they stay; their SHA-256 is checked. A bucket's come in the background.

        Raises:
            UserError: A shard of a folder is missing, truncated or altered.
        """
        for shard in shards:
            if self._cache is None:
                self._hold_now(shard)
            else:
                self._download(shard, hold=True)

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download shards of a bucket in the background, in this order; for a folder there is nothing to do."""
        if self._cache is not None:
            for shard in shards:
                self._download(shard)

    def is_altered(self, shard: int) -> bool:
        """Whether a folder's shard has changed since it was packed: reads it whole. A bucket's was compared before."""
        return self._cache is None and shard not in self._held and not self._is_whole(shard)

    def settle(self) -> None:
        """Wait until all that was read before its shard had come has been compared with the shard.

        Raises:
            UserError: A shard is missing, truncated or altered.
        """
        with self._lock:
            unchecked = {shard: self._coming.get(shard) for shard in self._early}
        for shard, download in unchecked.items():
            if download is None:
                self._open_now(shard)
            else:
                download.result()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop reading ahead, close files, let go of what is held."""
        for pool in (self._downloads, self._early_reads):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._held.clear()

    def _source(self, shard: int) -> np.ndarray | OpenShard | None:
        """Where a shard is read: memory or an open file (open as long as the caller holds it); None = not here yet."""
        if shard in self._held:
            return self._held[shard]
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        if self._cache is None or self._cache.has(self._dataset.shards[shard]):
            return self._open_now(shard)
        self._download(shard)
        return None

    def _cut(self, shard: int, source: np.ndarray | OpenShard, offset: int, length: int) -> np.ndarray:
        data = source[offset : offset + length] if isinstance(source, np.ndarray) else source.read(offset, length)
        if len(data) < length:
            raise broken(self._dataset, self._dataset.shards[shard], "truncated")
        return data

    # ---- whole shards

    def _download(self, shard: int, hold: bool = False) -> None:
        with self._lock:
            if shard in self._open or shard in self._coming or shard in self._held:
                return
            if self._downloads is None:
                self._downloads = ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="download")
            # Every batch needs the tail: it gets the whole bandwidth first, and what is asked for later waits for it.
            first = [] if hold else [tail for tail in self._holding if not tail.done()]
            self._coming[shard] = self._downloads.submit(self._fetch, shard, hold, first)
            if hold:
                self._holding.append(self._coming[shard])

    def _fetch(self, shard: int, hold: bool, first: list[Future[None]]) -> None:
        try:
            if hold:
                self._hold_now(shard)
            else:
                wait(first)
                self._open_now(shard)
        except BaseException as error:
            self._failure = error  # nobody waits for this download: the next `read` tells
        finally:
            with self._lock:
                self._coming.pop(shard, None)

    def _open_now(self, shard: int) -> OpenShard:
        opened = self._find(shard)
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        self._compare_early(shard, opened)
        return opened

    def _hold_now(self, shard: int) -> None:
        if shard in self._held:
            return
        opened, described = self._find(shard), self._dataset.shards[shard]
        data = opened.whole()
        if self._cache is None and hashlib.sha256(data.data).hexdigest() != described.sha256:
            raise broken(self._dataset, described, "altered")
        with self._lock:
            self._held[shard] = data
        self._compare_early(shard, data)

    def _find(self, shard: int) -> OpenShard:
        described = self._dataset.shards[shard]
        if self._cache is not None:
            return self._cache.open(described)
        path = self._dataset.storage.local_path(described.path)
        assert path is not None
        try:
            opened = OpenShard(path)
        except FileNotFoundError:
            raise broken(self._dataset, described, "missing") from None
        if opened.bytes != described.bytes:
            state = "truncated" if opened.bytes < described.bytes else "altered"
            raise broken(self._dataset, described, state)
        return opened

    def _is_whole(self, shard: int) -> bool:
        try:
            return self._find(shard).sha256() == self._dataset.shards[shard].sha256
        except UserError:
            return False

    # ---- ranges of shards that have not come yet

    def _submit_early(self, shard: int, offset: int, length: int) -> Future[np.ndarray]:
        with self._lock:
            if self._early_reads is None:
                self._early_reads = ThreadPoolExecutor(EARLY_THREADS, thread_name_prefix="early")
        return self._early_reads.submit(self._read_early, shard, offset, length)

    def _read_early(self, shard: int, offset: int, length: int) -> np.ndarray:
        described = self._dataset.shards[shard]
        try:
            data = self._dataset.storage.read_range(described.path, offset, length)
        except UserError as error:
            explained = self._cache.explain(described) if self._cache is not None else None
            if explained is None:
                raise
            raise explained from error
        with self._lock:
            self._early.setdefault(shard, []).append((offset, length, zlib.crc32(data)))
            source = self._held.get(shard, self._open.get(shard))
        if source is not None:  # it came meanwhile
            self._compare_early(shard, source)
        return np.frombuffer(data, dtype=np.uint8)

    def _compare_early(self, shard: int, source: np.ndarray | OpenShard) -> None:
        """What was read of a shard before its SHA-256 was known must be what it holds."""
        with self._lock:
            notes = self._early.pop(shard, [])
        for offset, length, checksum in notes:
            if zlib.crc32(self._cut(shard, source, offset, length).data) != checksum:
                raise broken(self._dataset, self._dataset.shards[shard], "altered")
