"""Byte ranges out of shards, from a folder or from a bucket.

A folder's shards are read in place. A bucket's shards are downloaded whole, a few ahead of their use, into a local
cache that all workers of a machine share: one of them downloads, under a file lock, the others wait; every process
compares a shard's SHA-256 before it reads from it; the shards used least recently make room, never one that some
process has open. Tail shards are read once and stay in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.folder import disk_errors
from data_pipeline.config import DataConfig
from data_pipeline.dataset import HASH_BLOCK_BYTES, Dataset, Shard

MAX_OPEN_FILES = 64
PREFETCH_THREADS = 4


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
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._max_open = MAX_OPEN_FILES if self._cache is None else min(MAX_OPEN_FILES, self._cache.max_open)
        self._held: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._coming: dict[int, Future[_OpenShard]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def read(self, shard: int, offset: int, length: int) -> np.ndarray:
        """Bytes [offset, offset + length) of a shard, uint8 [length], read-only.

        Raises:
            UserError: The shard is missing, truncated or altered.
        """
        if shard in self._held:
            data = self._held[shard][offset : offset + length]
        else:
            data = self._file(shard).read(offset, length)
        if len(data) < length:
            raise _broken(self._dataset, self._dataset.shards[shard], "truncated")
        return data

    def hold(self, shards: Iterable[int]) -> None:
        """Read whole shards into memory, where they stay; their SHA-256 is checked.

        Raises:
            UserError: A shard is missing, truncated or altered.
        """
        for shard in shards:
            if shard not in self._held:
                self._held[shard] = self._whole(self._dataset.shards[shard])

    def prefetch(self, shards: Iterable[int]) -> None:
        """Download shards of a bucket in the background, in this order; for a folder there is nothing to do."""
        if self._cache is None:
            return
        for shard in shards:
            with self._lock:
                if shard in self._open or shard in self._coming or shard in self._held:
                    continue
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(PREFETCH_THREADS, thread_name_prefix="prefetch")
                self._coming[shard] = self._pool.submit(self._open_ahead, shard)

    def close(self) -> None:
        """Stop prefetching, close files, let go of what is held."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._open.clear()
            self._held.clear()

    def _file(self, shard: int) -> _OpenShard:
        """The open file of a shard. Held by the caller it stays open, even when others push it out of `_open`."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            coming = self._coming.get(shard)
        return coming.result() if coming is not None else self._open_now(shard)

    def _open_now(self, shard: int) -> _OpenShard:
        opened = self._find(self._dataset.shards[shard])
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

    def _open_ahead(self, shard: int) -> _OpenShard:
        try:
            return self._open_now(shard)
        finally:
            with self._lock:
                self._coming.pop(shard)

    def _find(self, shard: Shard) -> _OpenShard:
        if self._cache is not None:
            return self._cache.open(shard)
        path = self._dataset.storage.local_path(shard.path)
        assert path is not None
        try:
            return _OpenShard(path)
        except FileNotFoundError:
            raise _broken(self._dataset, shard, "missing") from None

    def _whole(self, shard: Shard) -> np.ndarray:
        opened = self._find(shard)
        with open(opened.descriptor, "rb", closefd=False) as file:
            file.seek(0)
            data = np.fromfile(file, dtype=np.uint8)
        if len(data) < shard.bytes:
            raise _broken(self._dataset, shard, "truncated")
        if self._cache is None and hashlib.sha256(data.data).hexdigest() != shard.sha256:
            raise _broken(self._dataset, shard, "altered")
        data.setflags(write=False)
        return data


class ShardCache:
    """Whole shards of a bucket on the local disk, shared by all processes of a machine and by all datasets."""

    def __init__(self, dataset: Dataset, data: DataConfig):
        """Nothing is downloaded yet.

        Raises:
            UserError: The largest shard is larger than the cache.
        """
        self._dataset = dataset
        self._root = cache_folder(data)
        self._bound_bytes = int(data.cache_gib * 2**30)
        largest = max((shard.bytes for shard in dataset.shards), default=0)
        if largest > self._bound_bytes:
            raise UserError(
                f"data.cache_gib = {data.cache_gib:g} is smaller than a shard of {dataset.uri} ({largest / 2**30:.3g} "
                "GiB); raise data.cache_gib"
            )
        self._found_whole: dict[str, int] = {}  # shard -> inode of the copy whose SHA-256 was compared
        # A process keeps at most a quarter of the cache open, and with that locked.
        self.max_open = max(2, self._bound_bytes // (4 * max(largest, 1)))

    def open(self, shard: Shard) -> _OpenShard:
        """Open a shard's local copy, whose SHA-256 has been compared; download it first if need be.

        Raises:
            UserError: The bucket's shard is missing or not the one that was packed, or the disk is full.
        """
        path = self._root / self._dataset.fingerprint[:16] / shard.path
        with _locked(path.with_suffix(".lock")):  # one downloads, the machine's other processes wait
            for attempt in range(3):  # the local copy; a download; another for a body that was cut off on its way
                if attempt or not path.is_file():
                    self._download(shard, path)
                with suppress(FileNotFoundError):  # another process has just made room
                    opened = _OpenShard(path, in_use=True)
                    if self._is_whole(shard, opened):
                        os.utime(path)  # the time of use, by which `_make_room` chooses
                        return opened
            path.unlink(missing_ok=True)
        raise _broken(self._dataset, shard, "altered")

    def _is_whole(self, shard: Shard, opened: _OpenShard) -> bool:
        """Compare size and SHA-256; a file that this process has found whole is not read again."""
        stat = os.fstat(opened.descriptor)
        if stat.st_size != shard.bytes:
            return False
        if self._found_whole.get(shard.path) != stat.st_ino:
            digest = hashlib.sha256()
            for offset in range(0, shard.bytes, HASH_BLOCK_BYTES):
                digest.update(os.pread(opened.descriptor, HASH_BLOCK_BYTES, offset))
            if digest.hexdigest() != shard.sha256:
                return False
            self._found_whole[shard.path] = stat.st_ino
        return True

    def _download(self, shard: Shard, path: Path) -> None:
        with _locked(self._root / "room.lock"):
            self._make_room(shard.bytes)
        self._dataset.storage.download(shard.path, path)

    def _make_room(self, wanted_bytes: int) -> None:
        """Remove the shards used least recently until `wanted_bytes` fit; shards that are open stay."""
        files = []
        for file in self._root.rglob("*.tar"):
            with suppress(FileNotFoundError):  # found broken and removed by another process
                files.append((file.stat(), file))
        used_bytes = sum(stat.st_size for stat, _ in files)
        for stat, file in sorted(files, key=lambda entry: entry[0].st_mtime):
            if used_bytes + wanted_bytes <= self._bound_bytes:
                return
            with suppress(FileNotFoundError):
                if not _OpenShard(file).is_in_use():
                    file.unlink()
                    used_bytes -= stat.st_size


def cache_folder(data: DataConfig) -> Path:
    """Where shards of buckets are kept: `data.cache_dir`, else the user's cache folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rarelens" / "shards"


class _OpenShard:
    """An open file that closes itself when nobody refers to it any more."""

    def __init__(self, path: Path, in_use: bool = False):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if in_use:  # a shared lock tells other processes, as long as the file is open
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> np.ndarray:
        return np.frombuffer(os.pread(self.descriptor, length, offset), dtype=np.uint8)

    def is_in_use(self) -> bool:
        """Whether someone else has opened the file as in use."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _broken(dataset: Dataset, shard: Shard, state: str) -> UserError:
    return UserError(f"{shard.path} of the packed dataset {dataset.uri} is {state}; download or pack the dataset again")
