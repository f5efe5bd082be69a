"""Does the test set hold what was trained on? Shared groups, near-duplicates, contradicting labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cluster.errors import UserError
from cluster.storage import open_storage
from data_pipeline.audit_report import AuditReport, ClassAudit
from data_pipeline.config import SourceConfig
from data_pipeline.dataset import DAMAGED_FILE, DATASET_FILE, SPLITS, Dataset, open_dataset
from data_pipeline.raw import RawSample
from data_pipeline.sources import read_source
from data_pipeline.splits import near_pairs
from data_pipeline.survey import survey
from data_pipeline.workers import ImageWorkers

CONFLICTS_LISTED = 100


class _Samples(NamedTuple):
    """Columns of all samples under audit, [N] each, and those that cannot be used."""

    key: np.ndarray
    label: np.ndarray
    group: np.ndarray
    split: np.ndarray
    phash: np.ndarray
    unreadable: list[tuple[str, str, str]]
    """File, reason, class or ''."""


def audit(
    path: str,
    test: str | None = None,
    source: SourceConfig | None = None,
    near_duplicate_bits: int = 2,
    verify: bool = False,
    progress: bool = True,
) -> AuditReport:
    """Look for leaks between the splits of one set, or from a training set into a test set.

    A set is a packed dataset, or anything that can be packed: a table of labels (with its images in `source.path`, or
    beside it), class folders, an `.npz`, shards. Of a single one that is not packed the given splits are looked at; of
    a pair, all samples of each.

    Args:
        path: The only set, or the training set of a pair.
        test: The test set of a pair.
        source: Names of a table's columns. Groups are compared only where there is a group column.
        near_duplicate_bits: Largest distance of 64-bit perceptual hashes that counts as a near-duplicate; -1 = none.
        verify: Compare the SHA-256 of every shard of packed datasets too.
        progress: Show progress bars while images are read.

    Raises:
        UserError: A set is missing or wrong, or a single one gives no splits.
    """
    source = source or SourceConfig()
    if test is None:
        samples = _one_set(path, None, source, verify, progress)
    else:
        parts = [_one_set(one, split, source, verify, progress) for one, split in ((path, "train"), (test, "test"))]
        samples = _both(*parts)
    splits = SPLITS if test is None else ("train", "test")
    duplicate, contradicted, examples = _near_duplicates(samples, near_duplicate_bits)
    return AuditReport(
        what=(str(path),) if test is None else (str(path), str(test)),
        splits=splits,
        near_duplicate_bits=near_duplicate_bits,
        classes=tuple(_by_class(samples, splits, duplicate, contradicted)),
        conflicts=int(contradicted.sum()),
        first_conflicts=examples,
        unreadable=tuple((file, reason) for file, reason, _ in samples.unreadable),
    )


def _one_set(path: str, split: str | None, source: SourceConfig, verify: bool, progress: bool) -> _Samples:
    """A set; as one of a pair all of it is one split, and groups that are not named are none of the other set's."""
    if not Path(path).is_file() and not has_magic(path) and open_storage(path).exists(DATASET_FILE):
        dataset = open_dataset(path, verify)
        samples = _packed(dataset)
        named = (dataset.made.get("source") or {}).get("group_column") is not None
    else:
        samples, named = _listed(path, source, split is None, progress), True
    if split is None:
        return samples
    group = samples.group if named else np.array([f"{split}:{key}" for key in samples.key], dtype=object)
    return samples._replace(split=np.full(len(group), split, dtype=object), group=group)


def _both(train: _Samples, test: _Samples) -> _Samples:
    columns = ("key", "label", "group", "split", "phash")
    joined = {name: np.concatenate([getattr(train, name), getattr(test, name)]) for name in columns}
    return _Samples(**joined, unreadable=train.unreadable + test.unreadable)


def _packed(dataset: Dataset) -> _Samples:
    damaged = json.loads(dataset.storage.read(DAMAGED_FILE)) if dataset.storage.exists(DAMAGED_FILE) else []
    indices = [dataset.index(split) for split in SPLITS]
    return _Samples(
        key=np.concatenate([index.key for index in indices]),
        label=np.array(dataset.classes, dtype=object)[np.concatenate([index.label for index in indices])],
        group=np.concatenate([index.group for index in indices]),
        split=np.repeat(np.array(SPLITS, dtype=object), [len(index) for index in indices]),
        phash=np.concatenate([index.phash for index in indices]),
        unreadable=[(entry["file"], entry["reason"], entry.get("label", "")) for entry in damaged],
    )


def _listed(path: str, source: SourceConfig, by_given_splits: bool, progress: bool) -> _Samples:
    raw = read_source(_as_source(path, source), listed_only=True)
    if by_given_splits and not any(sample.split for sample in raw):
        raise UserError(
            f"{path} is no packed dataset and gives no splits; pack it first, name its column of splits, or give a "
            "training set and a test set"
        )
    with ImageWorkers(len(raw)) as workers:
        notes = survey(raw, None, workers, progress=progress)
    whole = notes.whole().tolist()

    def group(sample: RawSample) -> str:
        return sample.group if sample.group != sample.name else f"{path}:{sample.name}"

    return _Samples(
        key=np.array([raw[i].name for i in whole], dtype=object),
        label=np.array([raw[i].label for i in whole], dtype=object),
        group=np.array([group(raw[i]) for i in whole], dtype=object),
        split=np.array([raw[i].split for i in whole], dtype=object),
        phash=notes.column("phash")[whole],
        unreadable=[(str(raw[i].place), reason, raw[i].label) for i, reason in sorted(notes.damage.items())],
    )


def _as_source(path: str, source: SourceConfig) -> SourceConfig:
    if Path(path).is_file() and Path(path).suffix.lower() not in (".npz", ".tar"):
        folder = source.path or str(Path(path).parent)
        return source.model_copy(update={"path": folder, "labels": str(Path(path).resolve())})
    if not Path(path).exists() and not has_magic(path) and "{" not in path:
        raise UserError(f"{path}: there is no such packed dataset, table of labels, folder or file; give one's path")
    return source.model_copy(update={"path": path, "labels": None})


def _near_duplicates(
    samples: _Samples, max_bits: int
) -> tuple[np.ndarray, np.ndarray, tuple[tuple[str, str, str, str], ...]]:
    """Which samples have a near-duplicate in training; which contradict one in label, bool [N]; the first of those.

    U unique hashes stand for their samples. A hash whose samples have more than one class contradicts itself, and so
    do two near ones unless all samples of both have one class.
    """
    values, which = np.unique(samples.phash, return_inverse=True)
    _, label = np.unique(samples.label, return_inverse=True)
    lowest = np.full(len(values), len(label))
    highest = np.full(len(values), -1)
    np.minimum.at(lowest, which, label)
    np.maximum.at(highest, which, label)
    trained = np.zeros(len(values), dtype=bool)
    trained[which[samples.split == "train"]] = True
    hashed = (values != 0) & (max_bits >= 0)
    near_train, torn = trained & hashed, (lowest != highest) & hashed
    examples = [(i, lowest[i], i, highest[i]) for i in np.flatnonzero(torn)[:CONFLICTS_LISTED].tolist()]
    for pairs in near_pairs(values, max_bits) if max_bits >= 0 else ():
        left, right = pairs.T
        np.logical_or.at(near_train, left, trained[right])
        np.logical_or.at(near_train, right, trained[left])
        unlike = (lowest[left] != highest[right]) | (highest[left] != lowest[right])
        torn[pairs[unlike].ravel()] = True
        for i, j in np.sort(pairs[unlike], axis=1).tolist():
            example = (i, lowest[i], j, highest[j] if highest[j] != lowest[i] else lowest[j])
            if len(examples) < CONFLICTS_LISTED and example not in examples:  # a pair may come more than once
                examples.append(example)

    def sample_of(value: int, of_label: int) -> tuple[str, str]:
        row = np.flatnonzero((which == value) & (label == of_label))[0]
        return samples.key[row], samples.label[row]

    shown = tuple((*sample_of(i, a), *sample_of(j, b)) for i, a, j, b in examples)
    return near_train[which], torn[which], shown


def _by_class(
    samples: _Samples, splits: Sequence[str], duplicate: np.ndarray, contradicted: np.ndarray
) -> Iterator[ClassAudit]:
    unreadable = Counter(name for _, _, name in samples.unreadable)
    names = sorted({*samples.label, *unreadable} - {""})
    number_of = {name: number for number, name in enumerate(names)}
    label = np.array([number_of[name] for name in samples.label], dtype=np.int64)
    _, group = np.unique(samples.group, return_inverse=True)
    shared = np.isin(group, group[samples.split == "train"])

    def count(rows: np.ndarray) -> list[int]:
        return np.bincount(label[rows], minlength=len(names)).tolist()

    def count_groups(rows: np.ndarray) -> list[int]:
        pairs = np.unique(np.stack([label[rows], group[rows]]), axis=1)
        return np.bincount(pairs[0], minlength=len(names)).tolist()

    parts = {split: samples.split == split for split in splits}
    held_out = {split: part for split, part in parts.items() if split != "train"}
    sizes = {split: count(part) for split, part in parts.items()}
    groups = {split: count_groups(part) for split, part in parts.items()}
    by_group = {split: count(part & shared) for split, part in held_out.items()}
    by_duplicate = {split: count(part & duplicate) for split, part in held_out.items()}
    leaked = {split: count(part & (shared | duplicate)) for split, part in held_out.items()}
    conflicts = count(contradicted)
    for number, name in enumerate(names):
        yield ClassAudit(
            name=name,
            samples={split: counts[number] for split, counts in sizes.items()},
            groups={split: counts[number] for split, counts in groups.items()},
            shared_groups={split: counts[number] for split, counts in by_group.items()},
            shared_duplicates={split: counts[number] for split, counts in by_duplicate.items()},
            leaked={split: counts[number] for split, counts in leaked.items()},
            conflicts=conflicts[number],
            unreadable=unreadable[name],
        )
