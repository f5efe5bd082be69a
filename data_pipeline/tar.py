"""Write shards: plain tar files whose bytes depend on their content alone."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cluster.folder import disk_errors, whole_file
from cluster.storage import Storage

BLOCK_BYTES = tarfile.BLOCKSIZE
UPLOADS = 2
"""Shards on their way to a bucket at once; with the one that is written they bound the local disk space."""


class TarWriter:
    """Appends files to a tar and keeps count: `bytes` so far and the running SHA-256."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self.bytes = 0

    def add(self, name: str, data: bytes) -> int:
        """Append one file, with owner, times and mode fixed.

        Returns:
            Offset of its first byte in the tar.
        """
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
        offset = self.bytes
        self._write(data)
        self._write(bytes(-len(data) % BLOCK_BYTES))
        return offset

    def close(self) -> str:
        """Write the end mark; the SHA-256 of the whole, in hex."""
        self._write(bytes(2 * BLOCK_BYTES))
        return self._digest.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


class ShardFiles:
    """Where shards are written: in place in a folder; for a bucket on local disk, from where threads send them."""

    def __init__(self, storage: Storage):
        """Nothing is written yet; to be used with `with`, which waits for what is on its way."""
        self._storage = storage
        self._threads = ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload")
        self._on_the_way: deque[Future[None]] = deque()
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def new(self, path: str, then: Callable[[], None]) -> Iterator[BinaryIO]:
        """A shard that is written piece by piece, and appears when the block has ended well.

        Args:
            path: Below the storage.
            then: Called once the shard is there whole; for a bucket later, by another thread.
        """
        target = self._storage.local_path(path)
        if target is not None:
            with whole_file(target) as file:
                yield file
            then()
            return
        while len(self._on_the_way) >= UPLOADS:
            self._on_the_way.popleft().result()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="rarelens-")
        local = Path(self._folder.name, path.replace("/", "-"))
        with disk_errors(local.parent), local.open("wb") as file:
            yield file
        self._on_the_way.append(self._threads.submit(self._send, local, path, then))

    def __enter__(self) -> ShardFiles:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            while self._on_the_way and failed is None:
                self._on_the_way.popleft().result()
        finally:
            self._threads.shutdown(wait=True, cancel_futures=True)
            if self._folder is not None:
                self._folder.cleanup()

    def _send(self, local: Path, path: str, then: Callable[[], None]) -> None:
        self._storage.upload(local, path)
        local.unlink()
        then()


def member_bytes(length: int) -> int:
    """What a file of `length` bytes takes in a tar."""
    return BLOCK_BYTES + length + -length % BLOCK_BYTES
