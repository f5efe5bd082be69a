"""Features of a bucket on this machine's disk: fetched once, read by memory map by all of its processes."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.run import mirror
from cluster.storage import Storage, open_storage
from trainer.features import MANIFEST_FILE


def fetch_features(uri: str | Path, declared: bool = True) -> Path:
    """Local folder of features, for `trainer.features.read_features`; where they lie in a folder, that folder.

    One process fetches, under a file lock, the others wait. The copy is good as long as `features.json` is the
    bucket's: it names the checkpoint and all else that decides the features. Who has a file of an older copy mapped
    keeps it.

    Args:
        uri: Folder or s3:// URI.
        declared: They have their `features.json`; false = the parts alone are fetched, so that it can be written.
    """
    storage = open_storage(uri)
    local = storage.local_path("")
    if local is not None:
        return local
    folder = mirror(storage.uri)
    with _alone(folder):
        there = declared and storage.exists(MANIFEST_FILE)
        manifest, own = storage.read(MANIFEST_FILE) if there else None, folder / MANIFEST_FILE
        if manifest is None or not own.is_file() or own.read_bytes() != manifest:
            own.unlink(missing_ok=True)
            _fetch_parts(storage, folder)
        if manifest is not None:
            own.write_bytes(manifest)
    return folder


def _fetch_parts(storage: Storage, folder: Path) -> None:
    for old in folder.glob("*.arrow"):
        old.unlink()
    for stored in storage.list():
        if stored.path.endswith(".arrow"):
            storage.download(stored.path, folder / stored.path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of the machine at a time."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
