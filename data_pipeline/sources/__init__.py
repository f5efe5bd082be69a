"""What users have -> raw samples: folders with a table, class folders, MedMNIST files, WebDataset shards.

| `source.path` | labels |
|---|---|
| folder, with `source.labels` | CSV or Parquet table (`table.py`) |
| folder of images | its folders' names (`folder.py`) |
| `.npz` | MedMNIST's arrays (`medmnist.py`) |
| `.tar`, a folder of them, or a pattern | `.cls` or `.json` members (`tars.py`) |
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from cluster.config import nearest
from cluster.errors import UserError
from cluster.plain import refuse_credentials
from data_pipeline.config import SourceConfig
from data_pipeline.raw import RawSample
from data_pipeline.sources.folder import find_files, read_class_folders
from data_pipeline.sources.medmnist import read_medmnist
from data_pipeline.sources.rows import IMAGE_SUFFIXES, SPLIT_NAMES, Row, counted, first, is_image, name_of
from data_pipeline.sources.table import read_table
from data_pipeline.sources.tars import find_shards, read_shards

__all__ = ["IMAGE_SUFFIXES", "class_order", "read_source"]


def read_source(config: SourceConfig, listed_only: bool = False) -> list[RawSample]:
    """List the images of a source with label, group and given split, sorted by name.

    Nothing is decoded. A sample without a group is a group of its own. What cannot be used is listed with its
    `problem`, never left out.

    Args:
        config: Where the images and labels are.
        listed_only: Pass over images that a table does not list: several tables may share one folder.

    Raises:
        UserError: Something is missing or contradictory; all offending rows or files are counted and the first named.
    """
    rows = [_by_name(row, config.class_names) for row in _read_rows(config, listed_only)]
    labels = sorted({row.label for row in rows if row.problem is None})
    if len(labels) < 2:
        has = f"one class only, {labels[0]!r}" if labels else "no sample that can be used"
        raise UserError(f"source {config.path} has {has}; a classifier needs at least two classes")
    splits = _given_splits(config, rows)
    keys = _make_keys(rows)
    samples = [
        RawSample(key, row.label, row.group or row.name, row.name, row.place, split, row.problem)
        for key, row, split in zip(keys, rows, splits, strict=True)
    ]
    return sorted(samples, key=lambda sample: sample.name)


def class_order(samples: Iterable[RawSample], class_names: Sequence[str] | None) -> tuple[str, ...]:
    """The classes in the order of their labels: as configured, else by number where all are numbers, else by name.

    Raises:
        UserError: A configured class has no sample.
    """
    found = {sample.label for sample in samples if sample.label}
    if class_names is None:
        numbers = all(name.isdecimal() for name in found)
        return tuple(sorted(found, key=lambda name: (int(name), name) if numbers else (0, name)))
    empty = [name for name in class_names if name not in found]
    if empty:
        raise UserError(
            f"class {empty[0]!r} of source.class_names has no sample; correct the name, or leave the class out"
        )
    return tuple(class_names)


def _read_rows(config: SourceConfig, listed_only: bool) -> list[Row]:
    if config.path is None:
        raise UserError("source.path is not set; give the folder with the images, e.g. source.path=DIR")
    refuse_credentials(config.path, "source", "path")  # the commands `pack` and `audit` have it from their arguments
    if "://" in config.path:
        raise UserError(f"source.path = {config.path}: images are read from local disks; copy them to one")
    root = Path(config.path)
    if config.labels is None and root.suffix.lower() == ".npz":
        return read_medmnist(root)
    is_pattern = any(sign in config.path for sign in "*?[{") and not root.exists()
    if config.labels is None and (root.suffix.lower() == ".tar" or is_pattern):
        return read_shards(find_shards(config.path), config)
    if not root.is_dir():
        raise UserError(f"source.path = {root}: there is no such folder; give the folder with the images")
    files = find_files(root)
    images = [name for name in files if is_image(name)]
    shards = find_shards(config.path) if not images and config.labels is None else []
    if shards:
        return read_shards(shards, config)
    if not images:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"source.path = {root}: there is no image in it; add some ({known})")
    if config.labels is not None:
        return read_table(root, images, config, listed_only)
    return read_class_folders(root, files)


def _by_name(row: Row, class_names: Sequence[str] | None) -> Row:
    """A label that is a number becomes the name that it stands for, where there are names."""
    if row.problem is not None:
        return row
    name = name_of(row.label, class_names)
    if class_names is None and not re.fullmatch(r"-\d+", name):
        return row
    if class_names is not None and name in class_names:
        return row._replace(label=name)
    if class_names is None:
        problem = f"label {row.label} is out of range: numbers begin at 0"
    elif row.label.removeprefix("-").isdecimal():
        problem = f"label {row.label} is out of range: source.class_names has {counted(len(class_names), 'name')}"
    else:
        problem = f"label {row.label!r} is none of source.class_names; {nearest(row.label, list(class_names))}"
    return row._replace(label="", problem=problem)


def _given_splits(config: SourceConfig, rows: Sequence[Row]) -> list[str | None]:
    """The splits that the source gives, in our words; None for all where it gives none."""
    usable = [row for row in rows if row.problem is None]
    if not any(row.split for row in usable):
        if config.split_column is not None:
            raise UserError(
                f"source {config.path} has no {config.split_column!r} (source.split_column) in any sample; "
                "correct the name, or leave source.split_column out"
            )
        return [None] * len(rows)
    unknown = [f"{row.name}: {row.split!r}" for row in usable if row.split.lower() not in SPLIT_NAMES]
    if unknown:
        raise UserError(
            f"source {config.path} gives {counted(len(unknown), 'sample')} a split that is not known "
            f"({first(unknown)}); known: {', '.join(SPLIT_NAMES)}"
        )
    return [SPLIT_NAMES.get(row.split.lower()) for row in rows]


def _make_keys(rows: Sequence[Row]) -> list[str]:
    """Keys without '.' and '/' from unique names; where two names come to one key, both get a piece of their hash."""
    plain = [(row.key or _without_suffix(row.name)).replace("/", "__").replace(".", "_") for row in rows]
    counts = Counter(key.casefold() for key in plain)  # tars are also unpacked where case does not count
    return [
        f"{key}~{hashlib.sha256(row.name.encode()).hexdigest()[:12]}" if counts[key.casefold()] > 1 else key
        for key, row in zip(plain, rows, strict=True)
    ]


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0] if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else name
