"""Does the test set hold what was trained on? Shared groups, near-duplicates, contradicting labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from cluster.errors import UserError
from cluster.storage import open_storage
from data_pipeline.config import SourceConfig
from data_pipeline.dataset import DAMAGED_FILE, DATASET_FILE, SPLITS, open_dataset
from data_pipeline.sources import read_source
from data_pipeline.splits import near_pairs
from data_pipeline.survey import survey

CONFLICTS_LISTED = 100


@dataclass(frozen=True)
class ClassAudit:
    """One class; the dicts are by split."""

    name: str
    samples: dict[str, int]
    groups: dict[str, int]
    shared_groups: dict[str, int]
    """Samples outside of training whose group is in training."""
    shared_duplicates: dict[str, int]
    """Samples outside of training that show, but for a few bits of the hash, an image of training."""
    leaked: dict[str, int]
    """Samples to which either applies."""


@dataclass(frozen=True)
class AuditReport:
    """What an audit found."""

    what: tuple[str, ...]
    splits: tuple[str, ...]
    near_duplicate_bits: int
    classes: tuple[ClassAudit, ...]
    conflicts: int
    """Samples of which a near-duplicate is labelled otherwise."""
    first_conflicts: tuple[tuple[str, str, str, str], ...]
    """Key, class, near-duplicate's key, its class; at most 100."""
    unreadable: tuple[tuple[str, str], ...]
    """File, reason."""

    @property
    def leaks(self) -> bool:
        """Whether any sample of val or test has its group or a near-duplicate in training."""
        return any(sum(entry.leaked.values()) for entry in self.classes)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"leaks": self.leaks, **asdict(self)}

    def to_table(self) -> Table:
        """A row a class: samples (groups) by split, and the leaked share of each split that is not trained on."""
        title = f"Audit of {' against '.join(self.what)}"
        found = (
            f"{self.conflicts} samples with a near-duplicate of another class, {len(self.unreadable)} unreadable files"
        )
        table = Table(title=title, caption=found)
        table.add_column("class")
        held_out = [split for split in self.splits if split != "train"]
        for split in self.splits:
            table.add_column(f"{split} samples (groups)", justify="right")
        for split in held_out:
            table.add_column(f"{split}: group in train", justify="right")
            table.add_column("near-duplicate in train", justify="right")
            table.add_column("leaked", justify="right")
        for entry in self.classes:
            cells = [f"{entry.samples[split]} ({entry.groups[split]})" for split in self.splits]
            for split in held_out:
                number = entry.samples[split]
                cells += [str(entry.shared_groups[split]), str(entry.shared_duplicates[split])]
                cells.append(f"{entry.leaked[split] / number:.1%}" if number else "-")
            table.add_row(entry.name, *cells, style="red" if sum(entry.leaked.values()) else None)
        return table


class _Samples(NamedTuple):
    """Columns of all samples under audit, [N] each."""

    key: np.ndarray
    label: np.ndarray
    group: np.ndarray
    split: np.ndarray
    phash: np.ndarray


def audit(
    path: str,
    test: str | None = None,
    source: SourceConfig | None = None,
    near_duplicate_bits: int = 2,
    progress: bool = True,
) -> AuditReport:
    """Look for leaks between the splits of one packed dataset, or from a training set into a test set.

    A set of a pair is a packed dataset (all of its samples), a CSV of labels (with its images in `source.path`, or
    beside it), or a folder with one folder a class.

    Args:
        path: A packed dataset, or the training set of a pair.
        test: The test set of a pair.
        source: Names of a CSV's columns. Groups of lists are compared only where there is a group column.
        near_duplicate_bits: Largest distance of 64-bit perceptual hashes that counts as a near-duplicate; -1 = none.
        progress: Show progress bars while images of lists are read.

    Raises:
        UserError: A set is missing or wrong.
    """
    source = source or SourceConfig()
    unreadable: list[tuple[str, str]] = []
    if test is None:
        samples = _packed(path, unreadable)
    else:
        parts = [
            _one_set(path, "train", source, unreadable, progress),
            _one_set(test, "test", source, unreadable, progress),
        ]
        samples = _Samples(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    splits = SPLITS if test is None else ("train", "test")
    duplicate, contradicted, examples = _near_duplicates(samples, near_duplicate_bits)
    return AuditReport(
        what=(str(path),) if test is None else (str(path), str(test)),
        splits=splits,
        near_duplicate_bits=near_duplicate_bits,
        classes=tuple(_by_class(samples, splits, duplicate)),
        conflicts=contradicted,
        first_conflicts=examples,
        unreadable=tuple(unreadable),
    )


def _packed(path: str, unreadable: list[tuple[str, str]]) -> _Samples:
    dataset = open_dataset(path)
    damaged = json.loads(dataset.storage.read(DAMAGED_FILE)) if dataset.storage.exists(DAMAGED_FILE) else []
    unreadable += [(entry["file"], entry["reason"]) for entry in damaged]
    indices = [dataset.index(split) for split in SPLITS]
    return _Samples(
        key=np.concatenate([index.key for index in indices]),
        label=np.array(dataset.classes, dtype=object)[np.concatenate([index.label for index in indices])],
        group=np.concatenate([index.group for index in indices]),
        split=np.repeat(np.array(SPLITS, dtype=object), [len(index) for index in indices]),
        phash=np.concatenate([index.phash for index in indices]),
    )


def _one_set(
    path: str, split: str, source: SourceConfig, unreadable: list[tuple[str, str]], progress: bool
) -> _Samples:
    """One set of a pair. Samples without a named group get one that the other set cannot have."""
    if not Path(path).is_file() and open_storage(path).exists(DATASET_FILE):
        samples = _packed(path, unreadable)
        named = (open_dataset(path).made.get("source") or {}).get("group_column") is not None
        group = samples.group if named else np.array([f"{split}:{key}" for key in samples.key], dtype=object)
        return samples._replace(split=np.full(len(group), split, dtype=object), group=group)
    raw = read_source(_as_source(path, source), listed_only=True)
    notes = survey(raw, None, progress=progress)
    unreadable += [(str(sample.path), note.damage) for sample, note in zip(raw, notes, strict=True) if note.damage]
    named = source.group_column is not None and Path(path).is_file()
    groups = [sample.group if named and sample.group != sample.name else f"{split}:{sample.name}" for sample in raw]
    return _Samples(
        key=np.array([sample.name for sample in raw], dtype=object),
        label=np.array([sample.label for sample in raw], dtype=object),
        group=np.array(groups, dtype=object),
        split=np.full(len(raw), split, dtype=object),
        phash=np.array([note.phash for note in notes], dtype=np.uint64),
    )


def _as_source(path: str, source: SourceConfig) -> SourceConfig:
    if Path(path).is_file():
        folder = source.path or str(Path(path).parent)
        return source.model_copy(update={"path": folder, "labels": str(Path(path).resolve())})
    if not Path(path).is_dir():
        raise UserError(f"{path}: there is no such packed dataset, CSV or folder; give the path of one")
    return source.model_copy(update={"path": path, "labels": None})


def _near_duplicates(samples: _Samples, max_bits: int) -> tuple[np.ndarray, int, tuple[tuple[str, str, str, str], ...]]:
    """Which samples have a near-duplicate in training, bool [N]; how many contradict one in label; the first of those.

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
    return near_train[which], int(torn[which].sum()), shown


def _by_class(samples: _Samples, splits: Sequence[str], duplicate: np.ndarray) -> Iterator[ClassAudit]:
    trained_groups = samples.group[samples.split == "train"]
    shared = np.isin(samples.group.astype(str), trained_groups.astype(str))
    for name in sorted(set(samples.label)):
        ours = samples.label == name
        parts = {split: ours & (samples.split == split) for split in splits}
        held_out = {split: part for split, part in parts.items() if split != "train"}
        yield ClassAudit(
            name=name,
            samples={split: int(part.sum()) for split, part in parts.items()},
            groups={split: len(set(samples.group[part])) for split, part in parts.items()},
            shared_groups={split: int(shared[part].sum()) for split, part in held_out.items()},
            shared_duplicates={split: int(duplicate[part].sum()) for split, part in held_out.items()},
            leaked={split: int((shared | duplicate)[part].sum()) for split, part in held_out.items()},
        )
