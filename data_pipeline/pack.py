"""Raw samples -> packed dataset: in parallel, in bounded memory, and resumable at any moment.

Two passes. The first reads every image once and notes what it is (size, hash, damage); from the notes alone splits,
tail and shards are planned. The second writes the shards, one after the other. Both leave their notes below `packing/`
in the destination, and a second run takes them up: killed and repeated, it writes the same bytes as undisturbed.
`dataset.json` comes last, and `packing/` goes.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import flatten
from cluster.errors import UserError
from cluster.progress import console
from cluster.storage import Storage, open_storage
from data_pipeline.audit import audit
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.dataset import DAMAGED_FILE, DATASET_FILE, Dataset, describe, open_dataset
from data_pipeline.notes import Journal, Notes
from data_pipeline.plan import check_damage, make_plan
from data_pipeline.raw import RawSample
from data_pipeline.sources import class_order, read_source
from data_pipeline.sources.rows import counted
from data_pipeline.survey import survey
from data_pipeline.workers import ImageWorkers
from data_pipeline.write import WORK_FOLDER, Writer, remove_work, write_damaged

SETTINGS = ("pack_px", "shard_mib", "tail_budget_mib", "split")
"""Fields of DataConfig that change the packed bytes."""
JOURNAL_VERSION = 2


def pack(source: SourceConfig, data: DataConfig, destination: str, seed: int, progress: bool = True) -> Dataset:
    """Pack a source, or open what the same settings packed before.

    Without `source.path` the dataset at the destination is taken as it is. Samples that cannot be used are listed in
    `damaged.json` with the reason, whether the packing goes on or stops because there are too many.

    Args:
        source: Images and labels.
        data: Splits, sizes, tolerated damage.
        destination: Folder or `s3://bucket/prefix`.
        seed: Draws splits and order.
        progress: Show progress bars, and say what was left out and what leaks.

    Raises:
        UserError: The source is wrong (see `read_source`, `make_plan`), too many samples cannot be used, the
            destination was packed with other settings, is full or not writable, or an image changed meanwhile. What is
            done is kept for the next run.
    """
    storage = open_storage(destination)
    settings = {"source": source.model_dump(), "data": data.model_dump(include=set(SETTINGS)), "seed": seed}
    if storage.exists(DATASET_FILE):
        dataset = open_dataset(destination)
        if source.path is not None:
            _check_settings(dataset, settings)
        return dataset
    raw = read_source(source)
    with _says_how_to_go_on(), ImageWorkers(len(raw)) as workers:
        _remove_parts(storage)
        notes = survey(raw, data.pack_px, workers, _journal(storage, source, data), progress)
        _pack_noted(storage, raw, notes, settings, data, workers, progress)
    dataset = open_dataset(destination)
    if progress:
        _tell(dataset, data.split.near_duplicate_bits)
    return dataset


def _pack_noted(
    storage: Storage,
    raw: list[RawSample],
    notes: Notes,
    settings: dict[str, Any],
    data: DataConfig,
    workers: ImageWorkers,
    progress: bool,
) -> None:
    """The second pass: plan and write."""
    write_damaged(storage, raw, notes)
    check_damage(raw, notes, data.max_damaged, f"{storage.uri}/{DAMAGED_FILE}")
    plan = make_plan(raw, notes, class_order(raw, settings["source"]["class_names"]), data, settings["seed"])
    writer = Writer(storage, raw, notes, plan)
    shards, offsets = writer.shards(data.pack_px, workers, progress)
    counts, index = writer.index(offsets)
    made = settings | {
        "software": f"rarelens {_version()}",
        "damaged": len(notes.damage),
        "joined_groups": plan.joined_groups,
        "mixed_groups": plan.mixed_groups,
        "given_splits": list(plan.given_splits),
        "thinned": plan.thinned,
    }
    dataset = Dataset(storage.uri, data.name, plan.classes, shards, plan.mean, plan.std, made, storage)
    storage.write(DATASET_FILE, describe(dataset, counts, index))
    remove_work(storage, {shard.path for shard in shards})
    _remove_empty(storage)


def _tell(dataset: Dataset, near_duplicate_bits: int) -> None:
    """What whoever packs should know: what was left out, classes that a split lacks, leaks of given splits."""
    made = dataset.made
    if made["damaged"]:
        left_out = f"left out: {counted(made['damaged'], 'sample')}, see {DAMAGED_FILE} in {dataset.uri}"
        console.print(left_out, highlight=False)
    if not made["given_splits"]:
        return  # what was cut here has neither
    for split in ("val", "test"):
        lacking = [dataset.classes[c] for c in np.flatnonzero(dataset.class_counts(split) == 0).tolist()]
        if lacking:
            without = f"{split} has no sample of {', '.join(lacking)}: its means leave such classes out"
            console.print(without, highlight=False)
    report = audit(dataset.uri, near_duplicate_bits=near_duplicate_bits)
    for split, (leaked, number) in report.leaked_by_split().items():
        if leaked:
            console.print(
                f"{leaked} of {number} {split} samples have their group or a near-duplicate in train; given splits "
                f"are kept, see `rarelens audit {dataset.uri}`",
                highlight=False,
            )


def _check_settings(dataset: Dataset, settings: dict[str, Any]) -> None:
    # A set of an earlier version lacks settings that came later: it has their defaults.
    defaults = {"source": SourceConfig().model_dump(), "data": DataConfig().model_dump(include=set(SETTINGS))}
    before = flatten(defaults) | flatten({key: dataset.made.get(key) for key in settings})
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


def _journal(storage: Storage, source: SourceConfig, data: DataConfig) -> Journal:
    """Notes are of use to a run on the same source with the same image size, whatever the other settings are."""
    what = f"{JOURNAL_VERSION}\n{Path(str(source.path)).resolve()}\n{data.pack_px}"
    return Journal(storage, f"{WORK_FOLDER}notes-{hashlib.sha256(what.encode()).hexdigest()[:16]}-")


def _remove_empty(storage: Storage) -> None:
    folder = storage.local_path(WORK_FOLDER.rstrip("/"))
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()


def _remove_parts(storage: Storage) -> None:
    """Remove the unfinished files of a run that was killed, from a local destination."""
    for folder in ("", "train", "val", "test", WORK_FOLDER.rstrip("/")):
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
