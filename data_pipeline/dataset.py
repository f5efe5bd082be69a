"""The packed dataset: what `pack` writes, opened and verified by path or `s3://` URI.

Format (version 1), readable by any WebDataset reader:

    dataset.json     classes, class counts, shards with bytes and SHA-256, image mean and std, how it was made
    index.parquet    a row a sample: key, split, label, group, shard, offset, length, width, height, phash
    train/body-000000.tar ...  train/tail-000000.tar ...  val/000000.tar ...  test/000000.tar ...
    damaged.json     samples that could not be used at packing: key, file, label, split, reason

`dataset.json` is written last: where it is, the dataset is whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.storage import Storage, open_storage
from data_pipeline.strings import Strings

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
DAMAGED_FILE = "damaged.json"
SPLITS = ("train", "val", "test")
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("label", pa.int64()),
        ("group", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.uint64()),
    ]
)
HASH_BLOCK_BYTES = 8 * 2**20
PACK_AGAIN = "pack the dataset again"


@dataclass(frozen=True)
class Shard:
    """One tar file of the dataset; `sha256` is of the whole file, in hex."""

    path: str
    split: str
    kind: Literal["body", "tail", "whole"]
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one split, column by column; row i is the split's i-th sample in `index.parquet`."""

    key: Strings
    """[N]: unique in the dataset."""
    label: np.ndarray
    """int64 [N]: into `Dataset.classes`."""
    group: Strings
    """[N]: patient or lesion; no group is in two splits, unless splits were given that leak."""
    shard: np.ndarray
    """int32 [N]: into `Dataset.shards`."""
    offset: np.ndarray
    """int64 [N]: first byte of the encoded image in the shard."""
    length: np.ndarray
    """int64 [N]: bytes of the encoded image."""
    width: np.ndarray
    """int32 [N], pixels."""
    height: np.ndarray
    """int32 [N], pixels."""
    phash: np.ndarray
    """uint64 [N]: perceptual hash, 0 = none (an image without structure)."""

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened packed dataset. `mean` and `std` are RGB in units of 0..1."""

    uri: str
    name: str
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    made: dict[str, Any]
    storage: Storage = field(repr=False)

    def index(self, split: str) -> Index:
        """The samples of a split, read once.

        Raises:
            UserError: `split` is none of train, val, test.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is not known; known: {', '.join(SPLITS)}")
        return self._indices[split]

    def class_counts(self, split: str) -> np.ndarray:
        """Samples of each class in a split, int64 [C]."""
        return np.bincount(self.index(split).label, minlength=len(self.classes)).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `dataset.json`, and with it of every shard and of the index."""
        return hashlib.sha256(self.storage.read(DATASET_FILE)).hexdigest()

    @cached_property
    def _indices(self) -> dict[str, Index]:
        table = pq.read_table(io.BytesIO(self.storage.read(INDEX_FILE)), schema=INDEX_SCHEMA)
        split = _split_numbers(table)
        _check_index(self, table, split)
        masks = {name: split == number for number, name in enumerate(SPLITS)}
        indices: dict[str, dict[str, Any]] = {name: {} for name in SPLITS}
        for column in [name for name in table.column_names if name != "split"]:
            is_text = column in ("key", "group")
            values = Strings(table[column]) if is_text else table[column].to_numpy()
            table = table.drop_columns([column])  # ten million rows: each column is let go of once it is cut
            for name, mask in masks.items():
                indices[name][column] = values.filter(mask) if isinstance(values, Strings) else values[mask]
        return {name: Index(**columns) for name, columns in indices.items()}


def open_dataset(uri: str, verify: bool = False) -> Dataset:
    """Open a packed dataset and check that it is whole.

    Args:
        uri: Folder or `s3://bucket/prefix`.
        verify: Read every shard and compare its SHA-256, and compare all keys; without it sizes are compared.

    Raises:
        UserError: There is no packed dataset, its format is newer or broken, or a file is missing, truncated or
            altered; the message names the file.
    """
    storage = open_storage(uri)
    if not storage.exists(DATASET_FILE):
        raise UserError(
            f"no packed dataset at {uri}: it holds no {DATASET_FILE}; make one with `rarelens pack SOURCE {uri}`"
        )
    description = _parse(uri, storage.read(DATASET_FILE))
    shards = tuple(Shard(**{f.name: entry[f.name] for f in fields(Shard)}) for entry in description["shards"])
    _check_files(uri, storage, shards, description["index"], verify)
    dataset = Dataset(
        uri=str(uri),
        name=description["name"],
        classes=tuple(description["classes"]),
        shards=shards,
        mean=tuple(description["mean"]),
        std=tuple(description["std"]),
        made=description["made"],
        storage=storage,
    )
    if verify:
        _check_keys(dataset)
    return dataset


def describe(dataset: Dataset, counts: dict[str, np.ndarray], index: dict[str, Any]) -> bytes:
    """The bytes of `dataset.json`.

    Args:
        dataset: What is described.
        counts: Samples of each class by split, [C].
        index: `bytes` and `sha256` of `index.parquet`.
    """
    description = {
        "format": "rarelens-packed-dataset",
        "version": FORMAT_VERSION,
        "name": dataset.name,
        "classes": list(dataset.classes),
        "class_counts": {split: counts[split].tolist() for split in SPLITS},
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "index": index,
        "shards": [{f.name: getattr(shard, f.name) for f in fields(Shard)} for shard in dataset.shards],
        "made": dataset.made,
    }
    return json.dumps(description, indent=2, ensure_ascii=False).encode()


def _parse(uri: str, data: bytes) -> dict[str, Any]:
    remedy = PACK_AGAIN
    try:
        description = json.loads(data)
        version = description["version"]
        complete = {"name", "classes", "mean", "std", "index", "shards", "made"} <= description.keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{uri}/{DATASET_FILE} is no description of a packed dataset; {remedy}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{uri}/{DATASET_FILE} has format version {version}, this rarelens reads version {FORMAT_VERSION}; {remedy}"
        )
    if not complete:
        raise UserError(f"{uri}/{DATASET_FILE} is incomplete; {remedy}")
    if not _is_shaped(description):
        raise UserError(f"{uri}/{DATASET_FILE} holds values of another kind than packing writes; {remedy}")
    for shard in description["shards"]:
        path = PurePosixPath(shard["path"])
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"{uri}/{DATASET_FILE} names shard {shard['path']!r} outside of the dataset; {remedy}")
    return description


def _is_shaped(description: dict[str, Any]) -> bool:
    """Whether the values are of the kinds that `describe` writes: the file may come from anybody."""
    kinds = {"path": str, "split": str, "kind": str, "samples": int, "bytes": int, "sha256": str}
    index, shards, classes = (description[name] for name in ("index", "shards", "classes"))
    return (
        isinstance(description["name"], str)
        and isinstance(description["made"], dict)
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and all(_is_rgb(description[name]) for name in ("mean", "std"))
        and isinstance(index, dict)
        and isinstance(index.get("bytes"), int)
        and isinstance(shards, list)
        and all(isinstance(s, dict) and all(isinstance(s.get(n), k) for n, k in kinds.items()) for s in shards)
        and all(shard["split"] in SPLITS for shard in shards)
    )


def _is_rgb(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)


def _check_files(uri: str, storage: Storage, shards: tuple[Shard, ...], index: dict[str, Any], verify: bool) -> None:
    remedy = "download or pack the dataset again"
    found = {stored.path: stored.bytes for stored in storage.list()}
    expected = [(shard.path, shard.bytes, shard.sha256) for shard in shards]
    for path, size, _ in [(INDEX_FILE, index["bytes"], index.get("sha256")), *expected]:
        if path not in found:
            raise UserError(f"{path} of the packed dataset {uri} is missing; {remedy}")
        if found[path] != size:
            state = "truncated" if found[path] < size else "altered"
            raise UserError(
                f"{path} of the packed dataset {uri} is {state}: {found[path]} bytes instead of {size}; {remedy}"
            )
    # The index is small and every read depends on it: it is always checked whole.
    for path, size, sha256 in [(INDEX_FILE, index["bytes"], index.get("sha256")), *(expected if verify else [])]:
        if _sha256(storage, path, size) != sha256:
            raise UserError(
                f"{path} of the packed dataset {uri} is altered: its SHA-256 is not the one in {DATASET_FILE}; {remedy}"
            )


def _split_numbers(table: pa.Table) -> np.ndarray:
    """Each row's place in `SPLITS`, -1 for another name."""
    found = pc.index_in(table["split"], value_set=pa.array(SPLITS))
    return pc.fill_null(found, -1).to_numpy()


def _check_index(dataset: Dataset, table: pa.Table, split: np.ndarray) -> None:
    """What the rows say must fit the classes and shards; the file's own checksum has been compared already."""
    shards = dataset.shards
    label, shard, offset, length = (table[name].to_numpy() for name in ("label", "shard", "offset", "length"))
    in_range = (shard >= 0) & (shard < len(shards))
    held_by = np.where(in_range, shard, 0)
    size = np.array([entry.bytes for entry in shards], dtype=np.int64)[held_by]
    wrong = {
        "a label that is none of the classes": (label < 0) | (label >= len(dataset.classes)),
        "a shard that is not there": ~in_range,
        "bytes outside of its shard": (offset < 0) | (length < 0) | (offset + length > size),
        "another split than its shard": split != np.array([SPLITS.index(entry.split) for entry in shards])[held_by],
    }
    found = [(what, np.flatnonzero(rows)[0]) for what, rows in wrong.items() if rows.any()]
    for what, row in found:
        raise UserError(
            f"{INDEX_FILE} of the packed dataset {dataset.uri} gives sample {table['key'][int(row)].as_py()!r} {what}; "
            f"{PACK_AGAIN}"
        )


def _check_keys(dataset: Dataset) -> None:
    """No key twice. Half a second a million: part of verifying, since packing has seen to it and the hash vouches."""
    keys = pq.read_table(io.BytesIO(dataset.storage.read(INDEX_FILE)), columns=["key"])["key"]
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = keys.value_counts()
        key = counts.field("values")[pc.index(counts.field("counts"), pc.max(counts.field("counts"))).as_py()]
        raise UserError(
            f"{INDEX_FILE} of the packed dataset {dataset.uri} has the key {key.as_py()!r} twice; {PACK_AGAIN}"
        )


def _sha256(storage: Storage, path: str, size: int) -> str:
    digest = hashlib.sha256()
    for offset in range(0, size, HASH_BLOCK_BYTES):
        digest.update(storage.read_range(path, offset, min(HASH_BLOCK_BYTES, size - offset)))
    return digest.hexdigest()
