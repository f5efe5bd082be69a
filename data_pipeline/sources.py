"""What users have: a folder with a CSV of labels, or one folder a class -> raw samples."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cluster.config import nearest
from cluster.errors import UserError
from data_pipeline.config import SourceConfig

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"})
NAMED_IN_ERRORS = 3


@dataclass(frozen=True)
class RawSample:
    """One labelled image of the source."""

    key: str
    """Unique, and safe as a WebDataset key: neither '.' nor '/'."""
    label: str
    group: str
    """Patient or lesion; the sample's own name where the source names none."""
    path: Path
    name: str
    """Path below the source folder, with '/'."""


def read_source(config: SourceConfig, listed_only: bool = False) -> list[RawSample]:
    """List the images of a source with label and group, sorted by name.

    With `config.labels` the CSV tells each image's label; its image column holds a file name, a path below
    `config.path`, or a name without suffix, and images may lie in sub-folders. Without it the first folder level below
    `config.path` is the label. A sample without a group is a group of its own.

    Args:
        config: Where the images and labels are.
        listed_only: Pass over images that the CSV does not list: several lists may share one folder.

    Raises:
        UserError: Something is missing or contradictory; all offending rows or files are counted and the first named.
    """
    if config.path is None:
        raise UserError("source.path is not set; give the folder with the images, e.g. source.path=DIR")
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(f"source.path = {config.path}: there is no such folder; give the folder with the images")
    images = _find_images(root)
    if not images:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"source.path = {config.path}: there is no image in it; add some ({known})")
    rows = _class_folders(root, images) if config.labels is None else _table(root, images, config, listed_only)
    labels = sorted({label for _, label, _ in rows})
    if len(labels) < 2:
        raise UserError(f"source {config.path} has one class only, {labels[0]!r}; a classifier needs at least two")
    keys = _make_keys([name for name, _, _ in rows])
    return [
        RawSample(key, label, group or name, root / name, name)
        for key, (name, label, group) in sorted(zip(keys, rows, strict=True), key=lambda item: item[1][0])
    ]


def _find_images(root: Path) -> list[str]:
    """Paths of all images below `root`, with '/', sorted; links are followed, hidden files and folders passed over."""
    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        names += [(inside / name).as_posix() for name in files if _is_image(name)]
    return sorted(names)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _class_folders(root: Path, images: list[str]) -> list[tuple[str, str, str]]:
    loose = [name for name in images if "/" not in name]
    if loose:
        raise UserError(
            f"{_images(len(loose))} directly in {root} ({_first(loose)}), outside of any class folder; "
            "move them into folders named after their classes, or give the CSV of labels as source.labels"
        )
    return [(name, name.partition("/")[0], "") for name in images]


def _table(root: Path, images: list[str], config: SourceConfig, listed_only: bool) -> list[tuple[str, str, str]]:
    """Rows of the CSV as (image's name, label, group); group is "" where there is none."""
    path = root / str(config.labels)
    rows = _read_csv(path, config)
    entries = [row[config.image_column].strip() for row in rows]
    names = _resolve(path, entries, images)
    unlabelled = [entry for entry, row in zip(entries, rows, strict=True) if not row[config.label_column].strip()]
    if unlabelled:
        raise UserError(
            f"{path}: {_rows(len(unlabelled))} without a {config.label_column} ({_first(unlabelled)}); "
            "fill the column in, or take the rows and their images out"
        )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: {_images(len(twice))} listed more than once ({_first(twice)}); keep one row an image")
    unlisted = sorted(set(images) - set(names))
    if unlisted and not listed_only:
        raise UserError(
            f"{path}: {_images(len(unlisted))} in {root} without a row ({_first(unlisted)}); "
            "add rows for them, or move them out of the folder"
        )
    labels = [row[config.label_column].strip() for row in rows]
    groups = [row[config.group_column].strip() if config.group_column else "" for row in rows]
    return list(zip(names, labels, groups, strict=True))


def _read_csv(path: Path, config: SourceConfig) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"source.labels = {config.labels}: there is no file {path}; give a CSV relative to source.path")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
            columns = list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV in UTF-8 ({error}); save it as one") from None
    for setting in ("image_column", "label_column", "group_column"):
        column = getattr(config, setting)
        if column is not None and column not in columns:
            raise UserError(f"{path} has no column {column!r} (source.{setting}); {nearest(column, columns)}")
    if not rows:
        raise UserError(f"{path} has no rows; add one an image")
    return rows


def _resolve(path: Path, entries: list[str], images: list[str]) -> list[str]:
    """The image that each entry means: a path below the folder, else a file name, else a name without suffix."""
    known = set(images)
    by_name: dict[str, list[str]] = defaultdict(list)
    for image in images:
        pure = PurePosixPath(image)
        # As a path, a path without suffix, a file name, a stem: the set keeps a top-level image from counting twice.
        for alias in {image, str(pure.with_suffix("")), pure.name, pure.stem}:
            by_name[alias].append(image)
    names, missing = [], []
    for entry in (entry.replace("\\", "/").removeprefix("./") for entry in entries):
        found = [entry] if entry in known else by_name.get(entry, [])
        if len(found) > 1:
            raise UserError(
                f"{path}: image {entry!r} is ambiguous, {found[0]} and {found[1]} both fit; "
                "write the path with its folder and suffix"
            )
        if found:
            names.append(found[0])
        else:
            missing.append(entry)
    if missing:
        raise UserError(
            f"{path}: {_rows(len(missing))} without an image ({_first(missing)}); "
            "add the images below source.path, or take the rows out"
        )
    return names


def _make_keys(names: Sequence[str]) -> list[str]:
    """Keys without '.' and '/' from unique names; where two names come to one key, both get a piece of their hash."""
    plain = [name.rpartition(".")[0].replace("/", "__").replace(".", "_") for name in names]
    counts = Counter(key.casefold() for key in plain)  # tars are also unpacked where case does not count
    return [
        f"{key}~{hashlib.sha256(name.encode()).hexdigest()[:12]}" if counts[key.casefold()] > 1 else key
        for key, name in zip(plain, names, strict=True)
    ]


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(name or "''" for name in names[:NAMED_IN_ERRORS])
    return shown if len(names) <= NAMED_IN_ERRORS else f"{shown}, ..."


def _rows(number: int) -> str:
    return f"{number} row{'s' * (number != 1)}"


def _images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"
