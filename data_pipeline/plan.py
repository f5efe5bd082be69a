"""What goes into which shard: splits, tail and body, and the cut into files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.sources import RawSample
from data_pipeline.splits import assign_splits, join_near_duplicates
from data_pipeline.survey import Note
from data_pipeline.tar import member_bytes

MIB = 2**20
SMALLEST_STD = 1 / 255
"""Of a channel that never changes; the normalisation divides by it."""
NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class PlannedSample:
    """One sample as it will be stored; `group` has near-duplicates joined."""

    raw: RawSample
    note: Note
    label: int
    group: str
    split: str

    @property
    def files(self) -> dict[str, bytes]:
        """What is stored beside the image, by suffix."""
        meta = {
            "file": self.raw.name,
            "label": self.raw.label,
            "group": self.raw.group,
            "width": self.note.width,
            "height": self.note.height,
        }
        return {"cls": str(self.label).encode(), "json": json.dumps(meta, ensure_ascii=False).encode()}


@dataclass(frozen=True)
class PlannedShard:
    """One tar file: its samples in their order."""

    path: str
    split: str
    kind: Literal["body", "tail", "whole"]
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class Plan:
    """All that is known before the first shard is written."""

    classes: tuple[str, ...]
    shards: tuple[PlannedShard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    joined_groups: int
    """Groups that near-duplicates made one with another."""
    mixed_groups: int
    """Groups with samples of more than one class."""


def make_plan(raw: Sequence[RawSample], notes: Sequence[Note], data: DataConfig, seed: int) -> Plan:
    """Plan the shards; a pure function of its arguments.

    Args:
        raw: The samples in the source's order, damaged ones included.
        notes: A note a sample.
        data: Splits, tail budget, shard size, tolerated damage.
        seed: Draws the splits and the order of the training samples.

    Raises:
        UserError: Too many images are damaged, a class has none left, or too few groups to split.
    """
    classes = tuple(sorted({sample.label for sample in raw}))
    check_damage(notes, data.max_damaged)
    whole = [(sample, note) for sample, note in zip(raw, notes, strict=True) if note.damage is None]
    gone = sorted(set(classes) - {sample.label for sample, _ in whole})
    if gone:
        raise UserError(f"class {gone[0]!r} has no image that can be read; mend its images or leave the class out")
    labels = np.array([classes.index(sample.label) for sample, _ in whole])
    before = np.array([sample.group for sample, _ in whole], dtype=object)
    hashes = np.array([note.phash for _, note in whole], dtype=np.uint64)
    groups = join_near_duplicates(before, hashes, data.split.near_duplicate_bits)
    splits = assign_splits(labels, groups, data.split, seed, classes)
    samples = [
        PlannedSample(sample, note, label, group, split)
        for (sample, note), label, group, split in zip(
            whole, labels.tolist(), groups.tolist(), splits.tolist(), strict=True
        )
    ]
    classes_per_group = Counter(group for group, _ in {(sample.group, sample.label) for sample in samples})
    mean, std = _statistics([sample.note for sample in samples if sample.split == "train"])
    return Plan(
        classes=classes,
        shards=tuple(_cut(samples, data, seed)),
        mean=mean,
        std=std,
        joined_groups=len(set(before)) - len(set(groups)),
        mixed_groups=sum(number > 1 for number in classes_per_group.values()),
    )


def check_damage(notes: Sequence[Note], max_damaged: int) -> None:
    """Stop where more images than that cannot be read."""
    damaged = [f"{note.name} ({note.damage})" for note in notes if note.damage is not None]
    if len(damaged) > max_damaged:
        first = ", ".join(damaged[:NAMED_IN_ERRORS]) + (", ..." if len(damaged) > NAMED_IN_ERRORS else "")
        raise UserError(
            f"{len(damaged)} image{'s' * (len(damaged) != 1)} cannot be read, more than data.max_damaged = "
            f"{max_damaged}: {first}; mend or remove them, or raise data.max_damaged"
        )


def _statistics(notes: Sequence[Note]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of R, G and B over the training images at full size, each image weighing the same."""
    mean = np.array([note.mean for note in notes]).mean(axis=0)
    mean_square = np.array([note.mean_square for note in notes]).mean(axis=0)
    std = np.sqrt(np.maximum(mean_square - mean**2, 0))
    return tuple(mean.round(6).tolist()), tuple(np.maximum(std, SMALLEST_STD).round(6).tolist())


def _cut(samples: list[PlannedSample], data: DataConfig, seed: int) -> list[PlannedShard]:
    """Shards in the order of the index: body, tail, val, test. Training samples are shuffled once, by the seed."""
    by_key = sorted(samples, key=lambda sample: sample.raw.key)
    train = [sample for sample in by_key if sample.split == "train"]
    train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))]
    tail = _tail_classes(train, data.tail_budget_mib * MIB)
    limit = data.shard_mib * MIB
    return [
        *_shards("train/body-", "body", [sample for sample in train if sample.label not in tail], limit),
        *_shards("train/tail-", "tail", [sample for sample in train if sample.label in tail], limit),
        *_shards("val/", "whole", [sample for sample in by_key if sample.split == "val"], limit),
        *_shards("test/", "whole", [sample for sample in by_key if sample.split == "test"], limit),
    ]


def _shards(
    prefix: str, kind: Literal["body", "tail", "whole"], samples: Sequence[PlannedSample], limit_bytes: float
) -> Iterator[PlannedShard]:
    """Consecutive samples as shards of at most `limit_bytes`, or of one sample."""
    first, size, number = 0, 0, 0
    for i, sample in enumerate(samples):
        needed = member_bytes(sample.note.bytes) + sum(member_bytes(len(data)) for data in sample.files.values())
        if size + needed > limit_bytes and i > first:
            yield PlannedShard(f"{prefix}{number:06d}.tar", sample.split, kind, tuple(samples[first:i]))
            first, size, number = i, 0, number + 1
        size += needed
    if samples:
        yield PlannedShard(f"{prefix}{number:06d}.tar", samples[0].split, kind, tuple(samples[first:]))


def _tail_classes(train: Sequence[PlannedSample], budget_bytes: float) -> set[int]:
    """The rarest classes, whole ones, whose encoded images together fit the budget."""
    count: dict[int, int] = {}
    size: dict[int, int] = {}
    for sample in train:
        count[sample.label] = count.get(sample.label, 0) + 1
        size[sample.label] = size.get(sample.label, 0) + sample.note.bytes
    tail: set[int] = set()
    for label in sorted(count, key=lambda label: (count[label], label)):
        budget_bytes -= size[label]
        if budget_bytes < 0:
            break
        tail.add(label)
    return tail
