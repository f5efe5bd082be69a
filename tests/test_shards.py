import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.shards import ShardCache, ShardReader, cache_folder
from tests.packed import drawn_jpeg, hash_of, write_packed

COUNTS = {"train": [20, 9, 4], "val": [3, 3, 3]}


def expected_image(index, row):
    return drawn_jpeg(hash_of(index.key[row]), index.width[row], index.height[row])


def assert_reads_every_image(dataset, reader, split="train"):
    index = dataset.index(split)
    for row in range(len(index)):
        data = reader.read(index.shard[row], index.offset[row], index.length[row])
        assert data.tobytes() == expected_image(index, row)


def shard_number(dataset, path):
    return [shard.path for shard in dataset.shards].index(path)


@pytest.fixture
def bucket(moto_s3, tmp_path, request):
    """A packed dataset in a bucket, and a configuration with a cache of its own."""
    dataset = write_packed(f"{moto_s3}/{request.node.name}", COUNTS, tail_classes=[2], samples_per_shard=5)
    return dataset, DataConfig(cache_dir=str(tmp_path / "cache"))


def cached(config):
    return sorted(path.name for path in cache_folder(config).rglob("*.tar"))


def test_folder_is_read_in_place_and_tail_from_memory(tmp_path):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2], samples_per_shard=5)
    reader = ShardReader(dataset, DataConfig())
    reader.prefetch(range(3))
    assert_reads_every_image(dataset, reader, "val")
    tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
    reader.hold(tail)
    for number in tail:
        (tmp_path / dataset.shards[number].path).unlink()
    assert_reads_every_image(dataset, reader)
    reader.close()


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
            data = reader.read(index.shard[row], index.offset[row], index.length[row])
            assert data.tobytes() == expected_image(index, row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_truncated_shard_in_a_folder(tmp_path):
    dataset = write_packed(tmp_path, COUNTS)
    index = dataset.index("train")
    row = int(np.argmax(np.where(index.shard == 0, index.offset, 0)))
    os.truncate(tmp_path / dataset.shards[0].path, int(index.offset[row]) + 10)
    with pytest.raises(
        UserError, match=r"^train/body-000000\.tar of the packed dataset .* is truncated; download or pack"
    ):
        ShardReader(dataset, DataConfig()).read(0, index.offset[row], index.length[row])
    with pytest.raises(UserError, match=r"^train/body-000000\.tar of the packed dataset .* is truncated"):
        ShardReader(dataset, DataConfig()).hold([0])


def test_missing_and_altered_shards_in_a_folder(tmp_path):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2])
    tail = shard_number(dataset, "train/tail-000000.tar")
    content = bytearray((tmp_path / "train/tail-000000.tar").read_bytes())
    content[700] ^= 1
    (tmp_path / "train/tail-000000.tar").write_bytes(content)
    with pytest.raises(
        UserError, match=r"^train/tail-000000\.tar of the packed dataset .* is altered; download or pack"
    ):
        ShardReader(dataset, DataConfig()).hold([tail])
    (tmp_path / "train/tail-000000.tar").unlink()
    with pytest.raises(
        UserError, match=r"^train/tail-000000\.tar of the packed dataset .* is missing; download or pack"
    ):
        ShardReader(dataset, DataConfig()).hold([tail])


def test_bucket_is_read_through_the_cache(bucket):
    dataset, config = bucket
    reader = ShardReader(dataset, config)
    reader.hold([number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"])
    reader.prefetch(range(len(dataset.shards)))
    assert_reads_every_image(dataset, reader)
    reader.close()
    assert len(cached(config)) == len(dataset.shards)
    for shard in dataset.shards:  # once downloaded, the bucket is not asked again
        dataset.storage.delete(shard.path)
    assert_reads_every_image(dataset, ShardReader(dataset, config))


def test_shard_that_changed_in_the_bucket(bucket):
    dataset, config = bucket
    shard = dataset.shards[0]
    content = bytearray(dataset.storage.read(shard.path))
    content[700] ^= 1
    dataset.storage.write(shard.path, bytes(content))
    reader = ShardReader(dataset, config)
    with pytest.raises(
        UserError, match=r"^train/body-000000\.tar of the packed dataset s3://.* is altered; download or"
    ):
        reader.read(0, 0, 10)
    assert not cached(config)
    dataset.storage.delete(shard.path)
    with pytest.raises(UserError, match=r"s3://.*train/body-000000\.tar does not exist"):
        reader.read(0, 0, 10)
    reader.prefetch([0, 1])  # what fails in the background is told to whoever reads
    with pytest.raises(UserError, match=r"s3://.*train/body-000000\.tar does not exist"):
        reader.read(0, 0, 10)
    reader.close()


def test_damaged_copy_in_the_cache_is_downloaded_again(bucket):
    dataset, config = bucket
    assert_reads_every_image(dataset, ShardReader(dataset, config))
    for path in cache_folder(config).rglob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert_reads_every_image(dataset, ShardReader(dataset, config))


def test_cache_is_bounded_and_keeps_what_is_open(bucket):
    dataset, config = bucket
    bodies = [number for number, shard in enumerate(dataset.shards) if shard.kind == "body"]
    largest = max(shard.bytes for shard in dataset.shards)
    bound = 3 * largest + 1000
    config = config.model_copy(update={"cache_gib": bound / 2**30})
    reader = ShardReader(dataset, config)
    assert_reads_every_image(dataset, reader)
    reader.close()
    held_open = ShardCache(dataset, config).open(dataset.shards[bodies[0]])
    for number in bodies[1:]:
        ShardReader(dataset, config).read(number, 0, 10)
        time.sleep(0.01)  # the time of use has the clock's steps
    assert sum(path.stat().st_size for path in cache_folder(config).rglob("*.tar")) <= bound
    assert "body-000000.tar" in cached(config)
    assert cached(config)[-1] == f"body-{len(bodies) - 1:06d}.tar"  # the one used last
    del held_open


def test_cache_smaller_than_a_shard(bucket):
    dataset, config = bucket
    with pytest.raises(
        UserError, match=r"data\.cache_gib = 1e-06 is smaller than a shard of s3://.*; raise data.cache_gib"
    ):
        ShardReader(dataset, config.model_copy(update={"cache_gib": 1e-6}))


def read_all(uri, config, ready, log):
    dataset = open_dataset(uri)
    download = dataset.storage.download

    def noted(path, local):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        download(path, local)

    dataset.storage.download = noted
    reader = ShardReader(dataset, config)
    ready.wait()
    assert_reads_every_image(dataset, reader)


def test_workers_of_a_machine_download_once(bucket, tmp_path):
    dataset, config = bucket
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    arguments = (dataset.uri, config, ready, tmp_path / "downloads")
    workers = [context.Process(target=read_all, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    used = [shard.path for shard in dataset.shards if shard.split == "train"]
    assert sorted((tmp_path / "downloads").read_text().split()) == sorted(used)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder(DataConfig())) == "/somewhere/rarelens/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder(DataConfig())) == os.path.expanduser("~/.cache/rarelens/shards")
    assert str(cache_folder(DataConfig(cache_dir="~/x"))) == os.path.expanduser("~/x")
