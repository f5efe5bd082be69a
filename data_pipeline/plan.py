"""What goes into which shard: splits, tail and body, and the cut into files. Shapes: N samples, C classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import SPLITS
from data_pipeline.notes import Note, Notes
from data_pipeline.raw import RawSample
from data_pipeline.splits import assign_splits, complete_splits, cut_fold, join_near_duplicates, long_tail
from data_pipeline.tar import member_bytes

MIB = 2**20
SMALLEST_STD = 1 / 255
"""Of a channel that never changes; the normalisation divides by it."""
NAMED_IN_ERRORS = 3


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """One tar file: the numbers of its samples, in their order, int64 [K]."""

    path: str
    split: str
    kind: Literal["body", "tail", "whole"]
    samples: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is known before the first shard is written; a sample's number is its place in the source."""

    classes: tuple[str, ...]
    label: np.ndarray
    """int64 [N]: into `classes`; -1 for a sample that cannot be used."""
    group: np.ndarray
    """object [N]: with near-duplicates joined, where splits are cut here."""
    split: np.ndarray
    """object [N]; empty for a sample that is not packed."""
    shards: tuple[PlannedShard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    joined_groups: int
    """Groups that near-duplicates made one with another."""
    mixed_groups: int
    """Groups with samples of more than one class."""
    given_splits: tuple[str, ...]
    """Those that the source gave, and that were kept."""
    thinned: int
    """Training samples that were left out for a long tail."""


def make_plan(raw: Sequence[RawSample], notes: Notes, classes: tuple[str, ...], data: DataConfig, seed: int) -> Plan:
    """Plan the shards; a pure function of its arguments.

    Args:
        raw: The samples in the source's order, damaged ones included.
        notes: A note a sample.
        classes: In the order of their labels.
        data: Splits, tail budget, shard size.
        seed: Draws the splits and the order of the training samples.

    Raises:
        UserError: A class has no sample left or none to learn from, or too few groups to split.
    """
    whole = notes.whole()
    number_of = {name: label for label, name in enumerate(classes)}
    label = np.full(len(raw), -1, dtype=np.int64)
    group, split = (np.full(len(raw), "", dtype=object) for _ in range(2))
    label[whole] = [number_of[raw[i].label] for i in whole]
    gone = np.flatnonzero(np.bincount(label[whole], minlength=len(classes)) == 0)
    if len(gone):
        raise UserError(
            f"class {classes[gone[0]]!r} has no image that can be read; mend its images or leave the class out"
        )
    before = np.array([raw[i].group for i in whole], dtype=object)
    pooled = data.split.pool_given
    given = np.array([(not pooled and raw[i].split) or "" for i in whole], dtype=object)
    joined = before
    if set(given) != set(SPLITS) or data.split.folds > 1:  # something is to be cut
        joined = join_near_duplicates(before, notes.column("phash")[whole], data.split.near_duplicate_bits)
    if any(given):
        split[whole] = complete_splits(given, label[whole], joined, data.split, seed, classes)
        group[whole] = before  # of given splits the source's own groups tell the leaks
    else:
        split[whole] = assign_splits(label[whole], joined, data.split, seed, classes)
        group[whole] = joined
    if data.split.folds > 1:
        split[whole] = cut_fold(split[whole], label[whole], joined, data.split, seed, classes)
    thinned = _thinned(raw, label, group, split, data, seed)
    split[thinned] = ""
    used = np.flatnonzero(split != "")
    pairs = np.unique(np.stack([np.unique(group[used], return_inverse=True)[1], label[used]]), axis=1)
    mean, std = _statistics(notes, np.flatnonzero(split == "train"))
    return Plan(
        classes=classes,
        label=label,
        group=group,
        split=split,
        shards=tuple(_cut(raw, notes, label, split, data, seed)),
        mean=mean,
        std=std,
        joined_groups=len(set(before)) - len(set(joined)),
        mixed_groups=int((np.bincount(pairs[0]) > 1).sum()),
        given_splits=tuple(name for name in SPLITS if name in set(given) and (name == "test" or data.split.folds == 1)),
        thinned=len(thinned),
    )


def _thinned(
    raw: Sequence[RawSample], label: np.ndarray, group: np.ndarray, split: np.ndarray, data: DataConfig, seed: int
) -> np.ndarray:
    """Numbers of the training samples that are left out for a long tail."""
    train = np.flatnonzero(split == "train")
    if data.split.train_imbalance is None:
        return train[:0]
    keys = np.array([raw[i].key for i in train.tolist()], dtype=object)
    return train[~long_tail(label[train], group[train], keys, data.split.train_imbalance, seed)]


def side_files(raw: RawSample, label: int, note: Note) -> dict[str, bytes]:
    """What is stored beside an image, by suffix."""
    meta = {"file": raw.name, "label": raw.label, "group": raw.group, "width": note.width, "height": note.height}
    return {"cls": str(label).encode(), "json": json.dumps(meta, ensure_ascii=False).encode()}


def check_damage(raw: Sequence[RawSample], notes: Notes, max_damaged: int, listed_in: str) -> None:
    """Stop where more samples than that cannot be used.

    Raises:
        UserError: There are; the first are named with their reasons.
    """
    number = len(notes.damage)
    if number > max_damaged:
        named = [f"{raw[i].name} ({notes.damage[i]})" for i in sorted(notes.damage)[:NAMED_IN_ERRORS]]
        first = ", ".join(named) + (", ..." if number > NAMED_IN_ERRORS else "")
        raise UserError(
            f"{number} sample{'s' * (number != 1)} cannot be used, more than data.max_damaged = {max_damaged}: "
            f"{first}; mend or remove them (all are in {listed_in}), or raise data.max_damaged"
        )


def _statistics(notes: Notes, train: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of R, G and B over the training images at full size, each image weighing the same."""
    mean = notes.column("mean")[train].mean(axis=0)
    mean_square = notes.column("mean_square")[train].mean(axis=0)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return tuple(mean.round(6).tolist()), tuple(np.maximum(std, SMALLEST_STD).round(6).tolist())


def _cut(
    raw: Sequence[RawSample], notes: Notes, label: np.ndarray, split: np.ndarray, data: DataConfig, seed: int
) -> list[PlannedShard]:
    """Shards in the order of the index: body, tail, val, test. Training samples are shuffled once, by the seed."""
    by_key = np.array(sorted(notes.whole().tolist(), key=lambda i: raw[i].key), dtype=np.int64)
    train = by_key[split[by_key] == "train"]
    train = train[np.random.default_rng(seed).permutation(len(train))]
    in_tail = np.isin(label[train], sorted(_tail_classes(label[train], notes.column("bytes")[train], data)))
    needed = np.zeros(len(raw), dtype=np.int64)
    for i in by_key.tolist():
        note = notes[i]
        files = side_files(raw[i], int(label[i]), note).values()
        needed[i] = member_bytes(note.bytes) + sum(member_bytes(len(content)) for content in files)
    limit = data.shard_mib * MIB
    return [
        *_shards("train/body-", "train", "body", train[~in_tail], needed, limit),
        *_shards("train/tail-", "train", "tail", train[in_tail], needed, limit),
        *_shards("val/", "val", "whole", by_key[split[by_key] == "val"], needed, limit),
        *_shards("test/", "test", "whole", by_key[split[by_key] == "test"], needed, limit),
    ]


def _shards(
    prefix: str,
    split: str,
    kind: Literal["body", "tail", "whole"],
    samples: np.ndarray,
    needed: np.ndarray,
    limit_bytes: float,
) -> Iterator[PlannedShard]:
    """Consecutive samples as shards of at most `limit_bytes`, or of one sample."""
    first, size, number = 0, 0, 0
    for i, bytes_needed in enumerate(needed[samples].tolist()):
        if size + bytes_needed > limit_bytes and i > first:
            yield PlannedShard(f"{prefix}{number:06d}.tar", split, kind, samples[first:i])
            first, size, number = i, 0, number + 1
        size += bytes_needed
    if len(samples):
        yield PlannedShard(f"{prefix}{number:06d}.tar", split, kind, samples[first:])


def _tail_classes(label: np.ndarray, image_bytes: np.ndarray, data: DataConfig) -> set[int]:
    """The rarest classes, whole ones, whose encoded training images together fit the budget."""
    count = np.bincount(label)
    size = np.bincount(label, weights=image_bytes)
    budget_bytes = data.tail_budget_mib * MIB
    tail: set[int] = set()
    for c in sorted(np.flatnonzero(count).tolist(), key=lambda c: (count[c], c)):
        budget_bytes -= size[c]
        if budget_bytes < 0:
            break
        tail.add(c)
    return tail
