"""Raw samples -> packed dataset: in parallel, in bounded memory, and resumable at any moment.

Two passes. The first reads every image once and notes what it is (size, hash, damage); from the notes alone splits,
tail and shards are planned. The second writes the shards, one after the other. Both leave their notes below `packing/`
in the destination, and a second run takes them up: killed and repeated, it writes the same bytes as undisturbed.
`dataset.json` comes last, and `packing/` goes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import flatten
from cluster.errors import UserError
from cluster.progress import console
from cluster.storage import Storage, open_storage
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import (
    DAMAGED_FILE,
    DATASET_FILE,
    INDEX_FILE,
    INDEX_SCHEMA,
    SPLITS,
    Dataset,
    Shard,
    describe,
    open_dataset,
)
from data_pipeline.plan import Plan, PlannedSample, PlannedShard, make_plan
from data_pipeline.sources import RawSample, read_source
from data_pipeline.survey import Journal, Note, bar, image_threads, ordered_map, packed_bytes, survey
from data_pipeline.tar import TarWriter, new_file

WORK_FOLDER = "packing/"
SETTINGS = ("pack_px", "shard_mib", "tail_budget_mib", "split")
"""Fields of DataConfig that change the packed bytes."""


def pack(source: SourceConfig, data: DataConfig, destination: str, seed: int, progress: bool = True) -> Dataset:
    """Pack a source, or open what the same settings packed before.

    Without `source.path` the dataset at the destination is taken as it is. Images that cannot be read are listed in
    `damaged.json` with the reason.

    Args:
        source: Images and labels.
        data: Splits, sizes, tolerated damage.
        destination: Folder or `s3://bucket/prefix`.
        seed: Draws splits and order.
        progress: Show progress bars.

    Raises:
        UserError: The source is wrong (see `read_source`, `make_plan`), the destination was packed with other settings,
            it is full or not writable, or an image changed meanwhile. What is done is kept for the next run.
    """
    storage = open_storage(destination)
    settings = {"source": source.model_dump(), "data": data.model_dump(include=set(SETTINGS)), "seed": seed}
    if storage.exists(DATASET_FILE):
        dataset = open_dataset(destination)
        if source.path is not None:
            _check_settings(dataset, settings)
        return dataset
    raw = read_source(source)
    with _says_how_to_go_on():
        _remove_parts(storage)
        notes = survey(raw, data.pack_px, _journal(storage, source, data), progress)
        plan = make_plan(raw, notes, data, seed)
        shards, offsets = _write_shards(storage, plan, data.pack_px, progress)
        counts, index = _write_index(storage, plan, offsets)
        damaged = _write_damaged(storage, raw, notes)
        made = settings | {
            "software": f"rarelens {_version()}",
            "damaged": damaged,
            "joined_groups": plan.joined_groups,
            "mixed_groups": plan.mixed_groups,
        }
        dataset = Dataset(str(destination), data.name, plan.classes, shards, plan.mean, plan.std, made, storage)
        storage.write(DATASET_FILE, describe(dataset, counts, index))
        _remove_work(storage, {shard.path for shard in shards})
    if damaged and progress:
        console.print(f"{damaged} damaged images were left out, see {DAMAGED_FILE} in {destination}")
    return open_dataset(destination)


def _check_settings(dataset: Dataset, settings: dict[str, Any]) -> None:
    before = flatten({key: dataset.made.get(key) for key in settings})
    now = flatten(settings)
    differing = [
        f"{key} = {_shown(before.get(key))}, now {_shown(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not (key == "source.path" and _same_path(before.get(key), now[key]))
    ]
    if differing:
        raise UserError(
            f"dataset at {dataset.uri} was packed with {'; '.join(differing)}; choose another data.packed or delete it "
            "(without source.path it is taken as it is)"
        )


def _write_shards(
    storage: Storage, plan: Plan, short_side_px: int | None, progress: bool
) -> tuple[tuple[Shard, ...], list[np.ndarray]]:
    """Write the shards that are not there yet; the shards, and the images' offsets in each."""
    shards: list[Shard] = []
    offsets: list[np.ndarray] = []
    done = 0
    there = {stored.path: stored.bytes for stored in storage.list()}
    with bar("writing shards", sum(len(shard.samples) for shard in plan.shards), progress) as shown:
        for planned in plan.shards:
            digest = _plan_digest(planned)
            record = _read_record(storage, planned.path) if planned.path in there else None
            if record is None or record["plan"] != digest or record["bytes"] != there[planned.path]:
                record = {"plan": digest, **_write_shard(storage, planned, short_side_px)}
                storage.write(_record_path(planned.path), json.dumps(record).encode())
            size, sha256 = record["bytes"], record["sha256"]
            shards.append(Shard(planned.path, planned.split, planned.kind, len(planned.samples), size, sha256))
            offsets.append(np.array(record["offsets"], dtype=np.int64))
            done += len(planned.samples)
            shown.update(done, planned.path)
    return tuple(shards), offsets


def _write_shard(storage: Storage, planned: PlannedShard, short_side_px: int | None) -> dict[str, Any]:
    def encoded(sample: PlannedSample) -> bytes:
        data = packed_bytes(sample.raw, sample.note, short_side_px)
        if data is None:
            raise UserError(f"{sample.raw.path} changed while it was packed; leave the images alone and pack again")
        return data

    offsets = []
    with new_file(storage, planned.path) as file, image_threads() as pool:
        tar = TarWriter(file)
        for sample, image in zip(planned.samples, ordered_map(pool, encoded, planned.samples), strict=True):
            offsets.append(tar.add(f"{sample.raw.key}.{sample.note.suffix}", image))
            for suffix, content in sample.files.items():
                tar.add(f"{sample.raw.key}.{suffix}", content)
        sha256 = tar.close()
    return {"bytes": tar.bytes, "sha256": sha256, "offsets": offsets}


def _write_index(
    storage: Storage, plan: Plan, offsets: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write `index.parquet`; class counts by split, and its size and hash."""
    rows = [(number, sample) for number, shard in enumerate(plan.shards) for sample in shard.samples]
    columns = {
        "key": [sample.raw.key for _, sample in rows],
        "split": [sample.split for _, sample in rows],
        "label": [sample.label for _, sample in rows],
        "group": [sample.group for _, sample in rows],
        "shard": [number for number, _ in rows],
        "offset": np.concatenate(offsets),
        "length": [sample.note.bytes for _, sample in rows],
        "width": [sample.note.width for _, sample in rows],
        "height": [sample.note.height for _, sample in rows],
        "phash": np.array([sample.note.phash for _, sample in rows], dtype=np.uint64),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), buffer, compression="zstd")
    content = buffer.getvalue()
    storage.write(INDEX_FILE, content)
    label, split = np.array(columns["label"]), np.array(columns["split"])
    counts = {name: np.bincount(label[split == name], minlength=len(plan.classes)) for name in SPLITS}
    return counts, {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _write_damaged(storage: Storage, raw: Sequence[RawSample], notes: Sequence[Note]) -> int:
    damaged = [
        {"key": sample.key, "file": sample.name, "reason": note.damage}
        for sample, note in zip(raw, notes, strict=True)
        if note.damage is not None
    ]
    storage.write(DAMAGED_FILE, json.dumps(damaged, indent=2, ensure_ascii=False).encode())
    return len(damaged)


def _journal(storage: Storage, source: SourceConfig, data: DataConfig) -> Journal:
    """Notes are of use to a run on the same folder with the same image size, whatever the other settings are."""
    what = f"{Path(str(source.path)).resolve()}\n{data.pack_px}"
    return Journal(storage, f"{WORK_FOLDER}notes-{hashlib.sha256(what.encode()).hexdigest()[:16]}-")


def _plan_digest(planned: PlannedShard) -> str:
    digest = hashlib.sha256()
    for sample in planned.samples:
        digest.update(f"{sample.raw.key}.{sample.note.suffix} {sample.note.sha256}\n".encode())
        digest.update(b"\n".join(sample.files.values()))
    return digest.hexdigest()


def _record_path(shard_path: str) -> str:
    return f"{WORK_FOLDER}shard-{shard_path.replace('/', '-')}.json"


def _read_record(storage: Storage, shard_path: str) -> dict[str, Any] | None:
    path = _record_path(shard_path)
    return json.loads(storage.read(path)) if storage.exists(path) else None


def _remove_work(storage: Storage, current: set[str]) -> None:
    """Remove the notes, and shards that an earlier run with other settings wrote and recorded."""
    stale = {_record_path(stored.path): stored.path for stored in storage.list() if stored.path not in current}
    for stored in storage.list(WORK_FOLDER):
        if stored.path in stale:
            storage.delete(stale[stored.path])
        storage.delete(stored.path)
    folder = storage.local_path(WORK_FOLDER.rstrip("/"))
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()


def _remove_parts(storage: Storage) -> None:
    """Remove the unfinished files of a run that was killed, from a local destination."""
    for folder in ("train", "val", "test", WORK_FOLDER.rstrip("/")):
        local = storage.local_path(folder)
        for part in local.glob(".*.part") if local is not None else ():
            part.unlink(missing_ok=True)


@contextmanager
def _says_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{error}; what is packed is kept, and packing again goes on from there") from cause
        raise


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _same_path(before: Any, now: Any) -> bool:
    return before is not None and Path(before).resolve() == Path(now).resolve()


def _version() -> str:
    try:
        return version("rarelens")
    except PackageNotFoundError:
        return "unknown"
