"""Whole shards of a bucket on the local disk, shared by all processes of a machine.

One process downloads a shard, under a file lock, the others wait; every process compares a shard's SHA-256 before it
reads from it. The shards used least recently make room, never one that some process has open. Bytes that are still on
their way count from the start, so that the bound holds with any number of downloads at a time.

    CACHE/FINGERPRINT/train/body-000000.tar      a whole copy
    CACHE/FINGERPRINT/train/body-000000.lock     held by whoever opens or downloads it
    CACHE/FINGERPRINT/train/body-000000.coming/  a download; `room` has the size that it will have
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from cluster.errors import UserError
from cluster.folder import disk_errors
from data_pipeline.config import DataConfig
from data_pipeline.dataset import DATASET_FILE, HASH_BLOCK_BYTES, Dataset, Shard


class OpenShard:
    """An open file that closes itself when nobody refers to it any more."""

    def __init__(self, path: Path, in_use: bool = False):
        """Open the file; `in_use` tells other processes so, as long as it is open."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if in_use:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, length: int) -> np.ndarray:
        """Uint8 [length], read-only; shorter where the file ends before."""
        return np.frombuffer(os.pread(self.descriptor, length, offset), dtype=np.uint8)

    def whole(self) -> np.ndarray:
        """The file, uint8, read-only."""
        with open(self.descriptor, "rb", closefd=False) as file:
            file.seek(0)
            data = np.fromfile(file, dtype=np.uint8)
        data.setflags(write=False)
        return data

    def sha256(self) -> str:
        """Of the whole file, in hex."""
        digest = hashlib.sha256()
        for offset in range(0, self.bytes, HASH_BLOCK_BYTES):
            digest.update(os.pread(self.descriptor, HASH_BLOCK_BYTES, offset))
        return digest.hexdigest()

    def is_in_use(self) -> bool:
        """Whether someone else has opened the file as in use."""
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class ShardCache:
    """A dataset's part of the cache; the bound is shared with all other datasets and processes."""

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
        self._fingerprint = dataset.fingerprint
        self._found_whole: dict[str, int] = {}  # shard -> inode of the copy whose SHA-256 was compared
        # A process keeps at most a quarter of the cache open, and with that locked.
        self.max_open = max(2, self._bound_bytes // (4 * max(largest, 1)))

    def has(self, shard: Shard) -> bool:
        """Whether a copy is here, or was a moment ago."""
        return self._path(shard).is_file()

    def open(self, shard: Shard) -> OpenShard:
        """Open a shard's local copy, whose SHA-256 has been compared; download it first if need be.

        Raises:
            UserError: The bucket's shard is missing or not the one that was packed, or the disk is full.
        """
        path = self._path(shard)
        with _locked(path.with_suffix(".lock")):  # one downloads, the machine's other processes wait
            for attempt in range(3):  # the local copy; a download; another for a body that was cut off on its way
                if attempt or not path.is_file():
                    self._download(shard, path)
                with suppress(FileNotFoundError):  # another process has just made room
                    opened = OpenShard(path, in_use=True)
                    if self._is_whole(shard, opened):
                        os.utime(path)  # the time of use, by which room is made
                        return opened
            path.unlink(missing_ok=True)
        raise self.explain(shard) or broken(self._dataset, shard, "altered")

    def explain(self, shard: Shard) -> UserError | None:
        """Why a shard cannot be had from the bucket as it was packed, if its bucket still answers."""
        uri = self._dataset.uri
        with suppress(UserError):
            if not self._dataset.storage.exists(DATASET_FILE):
                return UserError(f"the packed dataset {uri} was removed while it was in use; upload or pack it again")
            if hashlib.sha256(self._dataset.storage.read(DATASET_FILE)).hexdigest() != self._fingerprint:
                return UserError(f"the packed dataset {uri} was packed anew while it was in use; start again with it")
            if not self._dataset.storage.exists(shard.path):
                return broken(self._dataset, shard, "missing")
        return None

    def _path(self, shard: Shard) -> Path:
        return self._root / self._fingerprint[:16] / shard.path

    def _is_whole(self, shard: Shard, opened: OpenShard) -> bool:
        """Compare size and SHA-256; a file that this process has found whole is not read again."""
        stat = os.fstat(opened.descriptor)
        if stat.st_size != shard.bytes:
            return False
        if self._found_whole.get(shard.path) != stat.st_ino:
            if opened.sha256() != shard.sha256:
                return False
            self._found_whole[shard.path] = stat.st_ino
        return True

    def _download(self, shard: Shard, path: Path) -> None:
        coming = path.with_suffix(".coming")
        with disk_errors(self._root):
            with _locked(self._root / "room.lock"):
                self._make_room(shard.bytes)
                shutil.rmtree(coming, ignore_errors=True)  # of a process that was killed
                coming.mkdir()
                with (coming / "room").open("wb") as room:
                    room.truncate(shard.bytes)
            try:
                self._fetch(shard, coming / "data")
                os.replace(coming / "data", path)
            finally:
                shutil.rmtree(coming, ignore_errors=True)

    def _fetch(self, shard: Shard, target: Path) -> None:
        """Download; where the disk is full, with less in the cache."""
        while True:
            try:
                return self._dataset.storage.download(shard.path, target)
            except UserError as error:
                if not _is_full_disk(error):
                    explained = self.explain(shard)
                    if explained is None:
                        raise
                    raise explained from error
                with _locked(self._root / "room.lock"):
                    freed = self._evict(shard.bytes)
                if not freed:
                    raise UserError(
                        f"no space left in {self._root} for {shard.path} of {self._dataset.uri} "
                        f"({shard.bytes / 2**20:.1f} MiB); free some, or set data.cache_dir to a folder on another disk"
                    ) from error

    def _make_room(self, wanted_bytes: int) -> None:
        """Let `wanted_bytes` more fit into the bound, as far as shards that are open allow."""
        used_bytes = sum(size for _, size, _ in self._copies())
        for room in self._files("room"):
            with suppress(FileNotFoundError):
                used_bytes += self._coming_bytes(room)
        self._evict(used_bytes + wanted_bytes - self._bound_bytes)

    def _evict(self, excess_bytes: int) -> int:
        """Remove the shards used least recently, not those that are open, until so much is free; bytes removed."""
        freed = 0
        for _, size, file in sorted(self._copies()):
            if freed >= excess_bytes:
                break
            with suppress(FileNotFoundError):
                if not OpenShard(file).is_in_use():
                    file.unlink()
                    freed += size
        return freed

    def _copies(self) -> list[tuple[float, int, Path]]:
        """Time of use, bytes and path of each shard in the cache."""
        found = []
        for file in self._files(".tar"):
            with suppress(FileNotFoundError):  # found broken and removed by another process
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
        return found

    def _files(self, suffix: str) -> Iterator[Path]:
        for folder, _, names in os.walk(self._root):  # folders may vanish meanwhile; pathlib would raise
            yield from (Path(folder, name) for name in names if name.endswith(suffix))

    def _coming_bytes(self, room: Path) -> int:
        """Bytes that a download will have; none, and the rest removed, where its process was killed."""
        if OpenShard(room.parent.with_suffix(".lock")).is_in_use():
            return room.stat().st_size
        shutil.rmtree(room.parent, ignore_errors=True)
        return 0


def cache_folder(data: DataConfig) -> Path:
    """Where shards of buckets are kept: `data.cache_dir`, else the user's cache folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rarelens" / "shards"


def broken(dataset: Dataset, shard: Shard, state: str) -> UserError:
    """What is said of a shard that is not as it was packed; `state` missing, truncated or altered."""
    return UserError(f"{shard.path} of the packed dataset {dataset.uri} is {state}; download or pack the dataset again")


def _is_full_disk(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
