"""Plan -> files: shards, the index and the list of what was left out. Each shard's record lets a later run skip it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.storage import Storage
from data_pipeline.dataset import DAMAGED_FILE, INDEX_FILE, INDEX_SCHEMA, SPLITS, Shard
from data_pipeline.notes import Notes
from data_pipeline.plan import Plan, PlannedShard, side_files
from data_pipeline.raw import RawSample
from data_pipeline.survey import bar, packed_images
from data_pipeline.tar import ShardFiles, TarWriter
from data_pipeline.workers import ImageWorkers

WORK_FOLDER = "packing/"
IMAGES_PER_UPDATE = 64
"""Of the progress bar."""


class Writer:
    """Writes one plan into one storage."""

    def __init__(self, storage: Storage, raw: Sequence[RawSample], notes: Notes, plan: Plan):
        """Args: storage: the destination; raw: all samples; notes: of all samples; plan: what goes where."""
        self._storage, self._raw, self._notes, self._plan = storage, raw, notes, plan

    def shards(
        self, short_side_px: int | None, workers: ImageWorkers, progress: bool
    ) -> tuple[tuple[Shard, ...], np.ndarray]:
        """Write all shards but those that an earlier run wrote from the same plan.

        Args:
            short_side_px: As in `prepare_image`.
            workers: Who reads the images.
            progress: Show a progress bar.

        Returns:
            The shards, and the offset of every image in its shard in the order of the shards, int64 [N].

        Raises:
            UserError: An image has changed since it was noted, or the destination is full.
        """
        records: dict[str, dict[str, Any]] = {}
        known = {stored.path: stored.bytes for stored in self._storage.list()}
        total, done = sum(len(planned.samples) for planned in self._plan.shards), 0
        with bar("writing shards", total, progress) as shown, ShardFiles(self._storage) as files:
            for planned in self._plan.shards:
                digest = self._digest(planned)
                record = _read_record(self._storage, planned.path) if _record_path(planned.path) in known else None
                if record is None or record["plan"] != digest or known.get(planned.path) != record["bytes"]:
                    record = {"plan": digest}
                    images = packed_images(self._raw, self._notes, planned.samples, short_side_px, workers)
                    for written in self._write(planned, record, files, images):
                        shown.update(done + written, planned.path)
                records[planned.path] = record
                done += len(planned.samples)
                shown.update(done, planned.path)
        shards = tuple(
            Shard(planned.path, planned.split, planned.kind, len(planned.samples), record["bytes"], record["sha256"])
            for planned, record in ((planned, records[planned.path]) for planned in self._plan.shards)
        )
        offsets = [np.array(records[planned.path]["offsets"], dtype=np.int64) for planned in self._plan.shards]
        return shards, np.concatenate(offsets)

    def index(self, offsets: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Write `index.parquet`.

        Args:
            offsets: As `shards` returns them.

        Returns:
            Samples of each class by split, [C], and the file's size and SHA-256.
        """
        plan, raw, notes = self._plan, self._raw, self._notes
        order = np.concatenate([planned.samples for planned in plan.shards])
        columns = {
            "key": [raw[i].key for i in order],
            "split": plan.split[order],
            "label": plan.label[order],
            "group": plan.group[order],
            "shard": np.repeat(np.arange(len(plan.shards)), [len(planned.samples) for planned in plan.shards]),
            "offset": offsets,
            "length": notes.column("bytes")[order],
            "width": notes.column("width")[order],
            "height": notes.column("height")[order],
            "phash": notes.column("phash")[order],
        }
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), buffer, compression="zstd")
        content = buffer.getvalue()
        self._storage.write(INDEX_FILE, content)
        counts = {split: np.bincount(plan.label[plan.split == split], minlength=len(plan.classes)) for split in SPLITS}
        return counts, {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def _write(
        self, planned: PlannedShard, record: dict[str, Any], files: ShardFiles, images: Iterator[bytes | None]
    ) -> Iterator[int]:
        """Write one shard, and fill its record in, which is stored when the shard is; yields how far it has come."""
        store = partial(self._store_record, planned.path, record)
        offsets: list[int] = []
        with files.new(planned.path, store) as file:
            tar = TarWriter(file)
            for number, image in zip(planned.samples.tolist(), images, strict=True):
                raw, note = self._raw[number], self._notes[number]
                if image is None:
                    raise UserError(f"{raw.place} changed while it was packed; leave the images alone and pack again")
                offsets.append(tar.add(f"{raw.key}.{note.suffix}", image))
                for suffix, content in side_files(raw, int(self._plan.label[number]), note).items():
                    tar.add(f"{raw.key}.{suffix}", content)
                if len(offsets) % IMAGES_PER_UPDATE == 0:
                    yield len(offsets)
            record |= {"sha256": tar.close(), "bytes": tar.bytes, "offsets": offsets}

    def _store_record(self, path: str, record: dict[str, Any]) -> None:
        self._storage.write(_record_path(path), json.dumps(record).encode())

    def _digest(self, planned: PlannedShard) -> str:
        """Of all that goes into a shard."""
        digest = hashlib.sha256()
        for number in planned.samples.tolist():
            raw, note = self._raw[number], self._notes[number]
            digest.update(f"{raw.key}.{note.suffix} {note.sha256}\n".encode())
            digest.update(b"\n".join(side_files(raw, int(self._plan.label[number]), note).values()))
        return digest.hexdigest()


def write_damaged(storage: Storage, raw: Sequence[RawSample], notes: Notes) -> None:
    """List what cannot be used, each with its reason."""
    damaged = [
        {
            "key": raw[number].key,
            "file": raw[number].name,
            "label": raw[number].label,
            "split": raw[number].split,
            "reason": notes.damage[number],
        }
        for number in sorted(notes.damage)
    ]
    storage.write(DAMAGED_FILE, json.dumps(damaged, indent=2, ensure_ascii=False).encode())


def remove_work(storage: Storage, current: set[str]) -> None:
    """Remove the notes, and shards that an earlier run with other settings wrote and recorded."""
    stale = {_record_path(stored.path): stored.path for stored in storage.list() if stored.path not in current}
    for stored in storage.list(WORK_FOLDER):
        if stored.path in stale:
            storage.delete(stale[stored.path])
        storage.delete(stored.path)


def _record_path(shard_path: str) -> str:
    return f"{WORK_FOLDER}shard-{shard_path.replace('/', '-')}.json"


def _read_record(storage: Storage, shard_path: str) -> dict[str, Any]:
    return json.loads(storage.read(_record_path(shard_path)))
