"""Packed datasets for tests, written file by file: any sizes, any damage, a folder or a bucket."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import open_storage
from data_pipeline.config import DataConfig, SamplingConfig
from data_pipeline.dataset import INDEX_SCHEMA, Dataset, Index, Shard, describe, open_dataset
from data_pipeline.shards import ShardReader

if TYPE_CHECKING:
    from data_pipeline.loader import TrainLoader


@cache
def drawn_jpeg(seed: int, width: int = 48, height: int = 40) -> bytes:
    """A smooth picture with some texture: JPEG keeps it well, and no two seeds look alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_packed(
    destination: Path | str,
    counts: dict[str, list[int]],
    tail_classes: Collection[int] = (),
    samples_per_shard: int = 16,
    damage: Collection[str] = (),
    distinct: int | None = None,
) -> Dataset:
    """Write and open a packed dataset.

    Args:
        destination: Folder or URI.
        counts: Split -> samples of each class.
        tail_classes: Classes whose training samples lie in tail shards.
        samples_per_shard: At which a new shard begins.
        damage: Keys whose image is replaced by zeros of the same length.
        distinct: Different pictures of a class; none = every sample is another one. Drawing them takes the time.
    """
    storage = open_storage(destination)
    num_classes = len(next(iter(counts.values())))
    rows, shards = [], []
    for split, numbers in counts.items():
        for kind in ("body", "tail") if split == "train" else ("whole",):
            chosen = [c for c in range(num_classes) if kind == "whole" or (c in tail_classes) == (kind == "tail")]
            samples = [(c, k) for c in chosen for k in range(numbers[c])]
            np.random.default_rng(0).shuffle(samples)
            for first in range(0, len(samples), samples_per_shard):
                path = f"{split}/{'' if kind == 'whole' else kind + '-'}{first // samples_per_shard:06d}.tar"
                data = io.BytesIO()
                with tarfile.open(fileobj=data, mode="w") as tar:
                    for label, number in samples[first : first + samples_per_shard]:
                        row = _add(tar, split, int(label), int(number), damage, distinct)
                        rows.append(row | {"shard": len(shards)})
                content = data.getvalue()
                storage.write(path, content)
                count = len(samples[first : first + samples_per_shard])
                shards.append(Shard(path, split, kind, count, len(content), hashlib.sha256(content).hexdigest()))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), table)
    storage.write("index.parquet", table.getvalue())
    dataset = Dataset(
        uri=str(destination),
        name="test",
        classes=tuple(f"class {c}" for c in range(num_classes)),
        shards=tuple(shards),
        mean=(0.5, 0.45, 0.4),
        std=(0.25, 0.22, 0.2),
        made={},
        storage=storage,
    )
    whole = table.getvalue()
    every = {split: np.array(counts.get(split, [0] * num_classes)) for split in ("train", "val", "test")}
    entry = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    storage.write("dataset.json", describe(dataset, every, entry))
    return open_dataset(str(destination))


def bare_index(labels: np.ndarray, shards: np.ndarray) -> Index:
    """An index for planning alone: nothing can be read by it."""
    numbers = np.zeros(len(labels), dtype=np.int64)
    keys = np.array([f"k{row}" for row in range(len(labels))], dtype=object)
    return Index(
        key=keys,
        label=labels.astype(np.int64),
        group=keys,
        shard=shards.astype(np.int32),
        offset=numbers,
        length=numbers,
        width=numbers.astype(np.int32),
        height=numbers.astype(np.int32),
        phash=numbers.astype(np.uint64),
    )


def _add(
    tar: tarfile.TarFile, split: str, label: int, number: int, damage: Collection[str], distinct: int | None
) -> dict[str, object]:
    key = f"{split}_{label}_{number}"
    picture = number if distinct is None else number % distinct
    width, height = 48 + 4 * (picture % 3), 40 + 8 * (label % 2)
    image = drawn_jpeg(hash_of(f"{split}_{label}_{picture}"), width, height)
    if key in damage:
        image = bytes(len(image))
    offset = 0
    for suffix, data in (("jpg", image), ("cls", str(label).encode()), ("json", json.dumps({"key": key}).encode())):
        info = tarfile.TarInfo(f"{key}.{suffix}")
        info.size = len(data)
        if suffix == "jpg":
            offset = tar.offset + tarfile.BLOCKSIZE
        tar.addfile(info, io.BytesIO(data))
    return {
        "key": key,
        "split": split,
        "label": label,
        "group": key,
        "offset": offset,
        "length": len(image),
        "width": width,
        "height": height,
        "phash": 0,
    }


def train_loader(
    dataset: Dataset,
    data: DataConfig,
    rank: int = 0,
    world: int = 1,
    views: int = 1,
    sampling: SamplingConfig | None = None,
    **options: Any,
) -> TrainLoader:
    """A rank's loader on the CPU: 8 images a global batch, balanced and of seed 7 unless told otherwise."""
    import torch  # here: processes that only read shards start faster without it

    from data_pipeline.loader import TrainLoader

    settings = {"batch_size": 8, "seed": 7, "device": torch.device("cpu")} | options
    sampling = sampling or SamplingConfig(power=0.0)
    return TrainLoader(dataset, data, views=views, sampling=sampling, rank=rank, world=world, **settings)


def expected_image(index: Index, row: int) -> bytes:
    """What `write_packed` has written for a row."""
    return drawn_jpeg(hash_of(index.key[row]), index.width[row], index.height[row])


def read_row(reader: ShardReader, index: Index, row: int) -> bytes:
    """A row's encoded image."""
    (data,) = reader.read([(int(index.shard[row]), int(index.offset[row]), int(index.length[row]))])
    return data.tobytes()


def assert_reads_every_image(dataset: Dataset, reader: ShardReader, split: str = "train", order: int = -1) -> None:
    """Read a split, in index order or shuffled by a seed, and compare each image."""
    index = dataset.index(split)
    rows = np.arange(len(index)) if order < 0 else np.random.default_rng(order).permutation(len(index))
    for row in rows.tolist():
        assert read_row(reader, index, row) == expected_image(index, row)


def hash_of(key: str) -> int:
    """A seed for a key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")
