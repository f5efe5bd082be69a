"""Folders and buckets behind one small interface.

Every write is whole or not at all, in a folder (temporary file, fsync, rename) as in a bucket (one put, or a multipart
upload that appears when it is completed): a reader never sees half a file, whenever the writer was killed.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from cluster.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs

_HANDED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")


@dataclass(frozen=True, order=True)
class StoredFile:
    """A file of a storage: `path` relative to the storage's URI, with `/`; size in bytes."""

    path: str
    bytes: int


StoredFiles: TypeAlias = list[StoredFile]


class Storage(Protocol):
    """A folder or a bucket prefix; `path` is always relative to it, with `/`.

    Storages can be pickled and used by several threads. What the user can mend raises `UserError`.
    """

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from byte `offset` on; `UserError` where the file ends before."""

    def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically."""

    def write_new(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists: of many callers one gets True. The lock of runs is made of it."""

    def exists(self, path: str) -> bool:
        """Whether there is a file of that path."""

    def list(self, prefix: str = "") -> StoredFiles:
        """All files whose path begins with `prefix`, by path."""

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""

    def upload(self, local: Path, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy a local file into the storage, atomically; `on_bytes` is told, on any thread, how many bytes went on."""

    def download(self, path: str, local: Path) -> None:
        """Copy a file of the storage to a local path, atomically; the size is checked."""

    def local_path(self, path: str) -> Path | None:
        """Where the file (`""`: the storage itself) lies on this machine; None for a bucket."""


def open_storage(uri: str | Path) -> Storage:
    """A storage for a folder (made at the first write), `file:///folder` or `s3://bucket/prefix`.

    Credentials and endpoint are found by boto3's own chain (environment, profile, instance role; `AWS_ENDPOINT_URL` for
    S3 servers other than AWS) when the bucket is first used, not here.

    Raises:
        UserError: Another scheme, no bucket, or credentials written into the URI.
    """
    scheme, rest = _split(uri)
    if scheme == "s3":
        from cluster.bucket import BucketStorage

        bucket, _, prefix = rest.partition("/")
        return BucketStorage(bucket, prefix)
    from cluster.folder import LocalStorage

    return LocalStorage(Path(rest))


def check_storage(storage: Storage) -> None:
    """Write, read, list and delete a probe, so that a run fails before it has cost anything.

    Raises:
        UserError: One of the four is refused, or another content comes back.
    """
    probe, content = f"probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
    storage.write(probe, content)
    try:
        if storage.read(probe) != content:
            raise UserError(f"{storage.uri} gave back other bytes than were written; check the disk or the S3 server")
        if storage.list(probe) != [StoredFile(probe, len(content))]:
            raise UserError(
                f"{storage.uri} does not list a file that was just written; rarelens needs a storage that does"
            )
    except BaseException:
        with suppress(UserError):
            storage.delete(probe)
        raise
    storage.delete(probe)
    if storage.exists(probe):
        raise UserError(f"{storage.uri} keeps a file that was deleted; allow deleting (s3:DeleteObject) there")


def to_pyarrow(uri: str | Path) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a URI for Ray's `RunConfig(storage_filesystem=..., storage_path=...)`.

    No credentials go into the file system, so that none travel in a pickle: Arrow's S3 client finds them on each
    machine by itself. Hand `worker_environment()` to the workers.
    """
    import pyarrow.fs

    scheme, rest = _split(uri)
    if scheme != "s3":
        return pyarrow.fs.LocalFileSystem(), str(Path(rest))
    from cluster.bucket import BucketStorage
    from cluster.bucket_errors import endpoint_url

    storage = BucketStorage(*rest.partition("/")[::2])
    os.environ.update(worker_environment())
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    retry = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=11)
    endpoint = endpoint_url()
    if endpoint:
        scheme, _, address = endpoint.rstrip("/").partition("://")
        system = pyarrow.fs.S3FileSystem(
            endpoint_override=address, scheme=scheme, region=region or "us-east-1", retry_strategy=retry
        )
    else:
        region = region or pyarrow.fs.resolve_s3_region(storage.bucket)
        system = pyarrow.fs.S3FileSystem(region=region, retry_strategy=retry)
    return system, storage.uri.removeprefix("s3://")


def worker_environment() -> dict[str, str]:
    """Environment that a worker on another machine needs to reach the same storage; never a secret.

    Arrow's client otherwise sends checksums in a trailer, which Ceph refuses with 411.
    """
    found = {name: os.environ[name] for name in _HANDED_ON if os.environ.get(name)}
    return found | {
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


def safe_path(path: str, uri: str) -> str:
    """`path` unchanged if it is relative and stays inside its storage, else `UserError`."""
    parts = path.split("/")
    if not path or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"path {path!r} in {uri} must be relative, with no empty, '.' or '..' part")
    return path


def missing(uri: str) -> UserError:
    """What is said of a file that is not there."""
    return UserError(f"{uri} does not exist; check the path, or run the step that writes it")


def too_short(uri: str, offset: int, length: int) -> UserError:
    """What is said of a file that ends before the bytes that were asked for."""
    return UserError(f"{uri} ends before byte {offset + length}; it is truncated, write or copy it again")


def _split(uri: str | Path) -> tuple[str, str]:
    """`("s3", "bucket/prefix")` or `("file", path)`."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", str(uri), re.DOTALL)
    if str(uri).startswith("pipe:"):  # a command, to WebDataset
        raise UserError("storage pipe:... is not supported, nothing runs a shell; give a folder or s3://bucket/prefix")
    if isinstance(uri, Path) or not found:
        if not str(uri):
            raise UserError("an empty storage URI was given; give a folder or s3://bucket/prefix")
        return "file", str(uri)
    scheme, rest = found.groups()
    if scheme not in ("s3", "file"):
        raise UserError(f"storage {scheme}://... is not supported; give a folder or s3://bucket/prefix")
    if scheme == "s3" and ("@" in rest or "?" in rest):
        # The URI is not repeated here: it may hold a secret.
        raise UserError(
            "an s3:// URI holds only bucket and prefix; give credentials and AWS_ENDPOINT_URL by environment"
        )
    return scheme, rest
