"""A folder of images and a table of their labels, as CSV or Parquet."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cluster.config import nearest
from cluster.errors import UserError
from data_pipeline.config import SourceConfig
from data_pipeline.raw import FilePlace
from data_pipeline.sources.rows import Row, counted, first

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_SUFFIXES = (".parquet", ".pq")
COLUMNS = ("image_column", "label_column", "group_column", "split_column")
"""Settings that name columns; of the last two either may be none."""


def read_table(root: Path, images: list[str], config: SourceConfig, listed_only: bool) -> list[Row]:
    """Images with what the table says of them.

    The image column holds a path below `root`, a file name, or either without suffix; images may lie in sub-folders.

    Args:
        root: The folder of the images.
        images: Their paths below it.
        config: The table and its columns.
        listed_only: Pass over images that the table does not list: several tables may share one folder.

    Raises:
        UserError: Table and images do not fit; all offending rows or images are counted and the first named.
    """
    path = root / str(config.labels)
    columns = _read_columns(path, config)
    entries = columns["image_column"]
    names = _resolve(path, entries, images)
    for setting in ("label_column", "split_column"):
        empty = [entry for entry, value in zip(entries, columns.get(setting, entries), strict=True) if not value]
        if empty and setting in columns:
            raise UserError(
                f"{path}: {counted(len(empty), 'row')} without a {getattr(config, setting)} ({first(empty)}); "
                "fill the column in, or take the rows and their images out"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: {counted(len(twice), 'image')} listed more than once ({first(twice)}); keep one row an image"
        )
    unlisted = sorted(set(images) - set(names))
    if unlisted and not listed_only:
        raise UserError(
            f"{path}: {counted(len(unlisted), 'image')} in {root} without a row ({first(unlisted)}); "
            "add rows for them, or move them out of the folder"
        )
    nothing = [""] * len(names)
    return [
        Row(name, label, FilePlace(str(root), name), group, split)
        for name, label, group, split in zip(
            names,
            columns["label_column"],
            columns.get("group_column", nothing),
            columns.get("split_column", nothing),
            strict=True,
        )
    ]


def read_all_columns(path: Path) -> dict[str, list[str]]:
    """Every column of text or whole numbers, stripped, '' where there is no value: to guess what each of them is.

    Raises:
        UserError: The file cannot be read as what its suffix says.
    """
    if not path.is_file():
        raise UserError(f"there is no table {path}; give a CSV or Parquet file relative to the folder of the images")
    if path.suffix.lower() in PARQUET_SUFFIXES:
        schema = _read_schema(path)
        names = [name for name in schema.names if _is_text_or_whole(schema.field(name).type)]
        return _read_parquet(path, {name: name for name in names})
    return _read_csv(path, {name: name for name in _csv_names(path)})


def _read_columns(path: Path, config: SourceConfig) -> dict[str, list[str]]:
    """The values of each configured column, stripped; '' where there is none."""
    if not path.is_file():
        raise UserError(
            f"source.labels = {config.labels}: there is no file {path}; give a CSV or Parquet file relative to "
            "source.path"
        )
    wanted = {setting: getattr(config, setting) for setting in COLUMNS if getattr(config, setting) is not None}
    is_parquet = path.suffix.lower() in PARQUET_SUFFIXES
    columns = _read_parquet(path, wanted) if is_parquet else _read_csv(path, wanted)
    if not columns["image_column"]:
        raise UserError(f"{path} has no rows; add one an image")
    return columns


def _csv_names(path: Path) -> list[str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [name for name in next(csv.reader(file), []) if name]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_csv(path, error) from None


def _no_csv(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a CSV in UTF-8 ({error}); save it as one")


def _read_csv(path: Path, wanted: dict[str, str]) -> dict[str, list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            _check_columns(path, wanted, list(reader.fieldnames or []))
            columns: dict[str, list[str]] = {setting: [] for setting in wanted}
            for row in reader:
                for setting, name in wanted.items():
                    columns[setting].append(row[name].strip())
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_csv(path, error) from None
    return columns


def _read_schema(path: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from None


def _no_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a Parquet file that can be read ({' '.join(str(error).split())}); write it again")


def _is_text_or_whole(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def _read_parquet(path: Path, wanted: dict[str, str]) -> dict[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_columns(path, wanted, _read_schema(path).names)
    try:
        table = pq.read_table(path, columns=sorted(set(wanted.values())))
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(path, error) from None
    columns = {}
    for setting, name in wanted.items():
        kind = table.schema.field(name).type
        if not _is_text_or_whole(kind):
            raise UserError(
                f"{path}: column {name!r} (source.{setting}) holds {kind}; write names or whole numbers into it"
            )
        columns[setting] = ["" if value is None else str(value).strip() for value in table[name].to_pylist()]
    return columns


def _check_columns(path: Path, wanted: dict[str, str], known: list[str]) -> None:
    for setting, column in wanted.items():
        if column not in known:
            raise UserError(f"{path} has no column {column!r} (source.{setting}); {nearest(column, known)}")


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
            f"{path}: {counted(len(missing), 'row')} without an image ({first(missing)}); "
            "add the images below source.path, or take the rows out"
        )
    return names
