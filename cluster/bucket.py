"""A bucket prefix as a storage: AWS S3, or any server that speaks its protocol (Ceph, MinIO, moto)."""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import boto3
import botocore.exceptions as errors
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from cluster.bucket_errors import PastTheEndError, TakenError, check_endpoint, endpoint_url, plain_errors
from cluster.errors import UserError
from cluster.folder import whole_file
from cluster.storage import StoredFile, StoredFiles, missing, safe_path, too_short

_ATTEMPTS = 8  # with botocore's exponential backoff: about a minute of throttling or outage
_BODY_ATTEMPTS = 5  # a body that breaks off is not retried by botocore
_BLOCK_BYTES = 1 << 20
_PART_BYTES = 32 << 20
_BROKEN_BODY = (errors.IncompleteReadError, errors.ReadTimeoutError, errors.ResponseStreamingError)


class BucketStorage:
    """Objects under `s3://bucket/prefix/`.

    The client is made when it is first used, once a process: neither it nor any credential is ever pickled. boto3
    addresses buckets by path wherever an endpoint is set, which servers other than AWS need.
    """

    def __init__(self, bucket: str, prefix: str = ""):
        if not re.fullmatch(r"[A-Za-z0-9._-]{3,255}", bucket):
            raise UserError(f"{bucket!r} is no bucket name; give s3://bucket/prefix")
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        if self.prefix:
            safe_path(self.prefix, f"s3://{bucket}")
        self._lock = threading.Lock()
        self._made: tuple[int, Any] | None = None  # process id and client

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketStorage, (self.bucket, self.prefix)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        sink = io.BytesIO()
        self._fetch(path, sink)
        return sink.getvalue()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        if not length:
            return b""
        sink = io.BytesIO()
        if self._fetch(path, sink, first=offset, last=offset + length - 1) != length:
            raise too_short(f"{self.uri}/{path}", offset, length)
        return sink.getvalue()

    def write(self, path: str, data: bytes) -> None:
        """See `Storage.write`."""
        with self._plain_errors(path):
            self._client().put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def write_new(self, path: str, data: bytes) -> bool:
        """See `Storage.write_new`.

        Where the answer to our own successful put is lost, botocore's retry finds the name taken. The mark in the
        object's metadata tells that it was us.
        """
        mark = uuid.uuid4().hex
        try:
            with self._plain_errors(path):
                self._client().put_object(
                    Bucket=self.bucket,
                    Key=self._key(path),
                    Body=data,
                    IfNoneMatch="*",
                    Metadata={"writer": mark},
                )
        except TakenError:
            with self._plain_errors(path):
                there = self._client().head_object(Bucket=self.bucket, Key=self._key(path))
            return there["Metadata"].get("writer") == mark
        return True

    def exists(self, path: str) -> bool:
        """See `Storage.exists`. By listing: a HEAD cannot tell a missing object from a missing bucket or right."""
        key = self._key(path)
        with self._plain_errors(path):
            found = self._client().list_objects_v2(Bucket=self.bucket, Prefix=key, MaxKeys=1)
        return any(item["Key"] == key for item in found.get("Contents", []))

    def list(self, prefix: str = "") -> StoredFiles:
        """See `Storage.list`."""
        root = f"{self.prefix}/" if self.prefix else ""
        found = []
        with self._plain_errors(prefix):
            pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    if not item["Key"].endswith("/"):  # consoles make such empty objects to show folders
                        found.append(StoredFile(item["Key"].removeprefix(root), item["Size"]))
        return sorted(found)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with self._plain_errors(path):
            self._client().delete_object(Bucket=self.bucket, Key=self._key(path))

    def upload(self, local: Path, path: str, on_bytes: Callable[[int], object] | None = None) -> None:
        """See `Storage.upload`: in parts above 32 MiB, several at a time."""
        if not local.is_file():
            raise missing(str(local))
        config = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=8)
        with self._plain_errors(path):
            self._client().upload_file(str(local), self.bucket, self._key(path), Config=config, Callback=on_bytes)

    def download(self, path: str, local: Path) -> None:
        """See `Storage.download`.

        Not by boto3's transfer manager: its ranged reads send `If-Match` with a quoted ETag, which Ceph refuses.
        """
        with whole_file(local) as file:
            self._fetch(path, file)

    def local_path(self, path: str) -> None:
        """See `Storage.local_path`."""

    def _key(self, path: str) -> str:
        safe_path(path, self.uri)
        return f"{self.prefix}/{path}" if self.prefix else path

    def _plain_errors(self, path: str) -> AbstractContextManager[None]:
        return plain_errors(self.bucket, f"{self.uri}/{path}".rstrip("/"))

    def _client(self) -> Any:
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():  # connections do not survive a fork
                self._made = os.getpid(), _make_client()
            return self._made[1]

    def _fetch(self, path: str, sink: BinaryIO, first: int = 0, last: int | None = None) -> int:
        """Stream bytes `first` to `last` (inclusive) into `sink`; a broken body goes on where it broke off.

        Returns:
            How many bytes came: as many as the first answer promised.
        """
        key, received = self._key(path), 0
        promised: int | None = None
        version = None
        for attempt in range(_BODY_ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, 0.2 * 2**attempt))
            begin = first + received
            span = {"Range": f"bytes={begin}-{'' if last is None else last}"} if begin or last is not None else {}
            try:
                with self._plain_errors(path):
                    answer = self._client().get_object(Bucket=self.bucket, Key=key, **span)
            except PastTheEndError:
                raise too_short(f"{self.uri}/{path}", begin, 1) from None
            if promised is None:
                promised, version = answer["ContentLength"], answer["ETag"]
            elif answer["ETag"] != version:
                raise UserError(f"{self.uri}/{path} was replaced while it was read; start again with the new one")
            with suppress(*_BROKEN_BODY):
                for block in answer["Body"].iter_chunks(_BLOCK_BYTES):
                    sink.write(block)
                    received += len(block)
            if received == promised:
                return received
        raise UserError(
            f"{self.uri}/{path} broke off after {received} of {promised} bytes in {_BODY_ATTEMPTS} attempts; "
            "check the network to the storage and start again"
        )


def _make_client() -> Any:
    # AWS_MAX_ATTEMPTS and AWS_RETRY_MODE stay in force where they are set.
    retries: dict[str, Any] = {}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = _ATTEMPTS
    if "AWS_RETRY_MODE" not in os.environ:
        # Not "standard": there all requests of a process share a quota of retries, which an outage soon uses up.
        retries["mode"] = "legacy"
    config = Config(
        signature_version="s3v4",
        retries=retries,
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        tcp_keepalive=True,
        # Newer checksum trailers are unknown to Ceph and moto.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of our own: boto3's default one is not safe to use from several threads.
    client = boto3.session.Session().client("s3", endpoint_url=endpoint_url(), config=config)
    check_endpoint(client.meta.endpoint_url)  # a profile may name one, too
    return client
