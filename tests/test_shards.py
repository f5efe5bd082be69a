"""Shards of a folder: read in place."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.shards import ShardReader
from tests.packed import assert_reads_every_image, expected_image, read_row, write_packed

COUNTS = {"train": [20, 9, 4], "val": [3, 3, 3]}


def tail_of(dataset):
    return [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]


def test_folder_is_read_in_place_and_tail_from_memory(tmp_path):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2], samples_per_shard=5)
    reader = ShardReader(dataset, DataConfig())
    reader.prefetch(range(3))
    assert_reads_every_image(dataset, reader, "val")
    reader.hold(tail_of(dataset))
    for number in tail_of(dataset):
        (tmp_path / dataset.shards[number].path).unlink()
    assert_reads_every_image(dataset, reader)
    reader.settle()
    reader.close()


def test_many_ranges_in_one_go_keep_their_order(tmp_path):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2], samples_per_shard=5)
    reader = ShardReader(dataset, DataConfig())
    reader.hold(tail_of(dataset))
    index = dataset.index("train")
    rows = np.random.default_rng(0).integers(0, len(index), 100)
    ranges = list(
        zip(index.shard[rows].tolist(), index.offset[rows].tolist(), index.length[rows].tolist(), strict=True)
    )
    assert [data.tobytes() for data in reader.read(ranges)] == [expected_image(index, row) for row in rows]
    assert not any(data.flags.writeable for data in reader.read(ranges))


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_FILES", 2)
    dataset = write_packed(tmp_path, COUNTS, samples_per_shard=2)
    reader = ShardReader(dataset, DataConfig())
    before = len(os.listdir("/proc/self/fd"))
    assert_reads_every_image(dataset, reader)
    assert len(os.listdir("/proc/self/fd")) - before <= 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_many_threads_read_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.shards.MAX_OPEN_FILES", 2)
    dataset = write_packed(tmp_path, COUNTS, samples_per_shard=2)
    reader = ShardReader(dataset, DataConfig())
    index = dataset.index("train")

    def read(seed):
        for row in np.random.default_rng(seed).integers(0, len(index), 300).tolist():
            assert read_row(reader, index, row) == expected_image(index, row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_truncated_shard_in_a_folder(tmp_path):
    dataset = write_packed(tmp_path, COUNTS)
    index = dataset.index("train")
    row = int(np.argmax(np.where(index.shard == 0, index.offset, 0)))
    opened = ShardReader(dataset, DataConfig())
    read_row(opened, index, int(np.flatnonzero(index.shard == 0)[0]))
    os.truncate(tmp_path / dataset.shards[0].path, int(index.offset[row]) + 10)
    message = r"^train/body-000000\.tar of the packed dataset .* is truncated; download or pack the dataset again$"
    for reader in (opened, ShardReader(dataset, DataConfig())):  # cut while it was read, and before
        with pytest.raises(UserError, match=message):
            read_row(reader, index, row)
    with pytest.raises(UserError, match=message):
        ShardReader(dataset, DataConfig()).hold([0])


def test_missing_and_altered_shards_in_a_folder(tmp_path):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2])
    (tail,) = tail_of(dataset)
    path = tmp_path / "train/tail-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    altered = r"^train/tail-000000\.tar of the packed dataset .* is altered; download or pack the dataset again$"
    with pytest.raises(UserError, match=altered):
        ShardReader(dataset, DataConfig()).hold([tail])
    assert ShardReader(dataset, DataConfig()).is_altered(tail) and not ShardReader(dataset, DataConfig()).is_altered(0)
    path.write_bytes(bytes(content) + b"more")
    with pytest.raises(UserError, match=altered):
        ShardReader(dataset, DataConfig()).read([(tail, 0, 10)])
    path.unlink()
    with pytest.raises(UserError, match=r"^train/tail-000000\.tar of the packed dataset .* is missing; download or"):
        ShardReader(dataset, DataConfig()).hold([tail])
    assert ShardReader(dataset, DataConfig()).is_altered(tail)
