"""Write shards: plain tar files whose bytes depend on their content alone."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cluster.folder import disk_errors, whole_file
from cluster.storage import Storage

BLOCK_BYTES = tarfile.BLOCKSIZE


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


def member_bytes(length: int) -> int:
    """What a file of `length` bytes takes in a tar."""
    return BLOCK_BYTES + length + -length % BLOCK_BYTES


@contextmanager
def new_file(storage: Storage, path: str) -> Iterator[BinaryIO]:
    """A file of the storage, written piece by piece, that appears when the block has ended well.

    For a bucket it is written to the local temporary folder and then uploaded.
    """
    target = storage.local_path(path)
    if target is not None:
        with whole_file(target) as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="rarelens-") as folder:
        local = Path(folder) / "shard.tar"
        with disk_errors(local.parent), local.open("wb") as file:
            yield file
        storage.upload(local, path)
