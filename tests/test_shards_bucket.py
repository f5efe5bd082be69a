"""Shards of a bucket: read through the cache, and by range before they have come; objects that change or vanish."""

import os
import threading

import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.shard_cache import cache_folder
from data_pipeline.shards import EARLY_THREADS, PREFETCH_THREADS, ShardReader
from tests import faulty_s3
from tests.packed import assert_reads_every_image, expected_image, read_row, write_packed

COUNTS = {"train": [20, 9, 4], "val": [3, 3, 3]}


@pytest.fixture
def proxy(moto_s3, monkeypatch):
    """Stands before the S3 server for the storages that the test opens."""
    with faulty_s3.proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def bucket(proxy, moto_s3, tmp_path, request):
    """A packed dataset in a bucket behind the proxy, and a configuration with a cache of its own."""
    dataset = write_packed(f"{moto_s3}/{request.node.name}", COUNTS, tail_classes=[2], samples_per_shard=5)
    return dataset, DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def make_reader():
    made = []

    def make(dataset, config):
        made.append(ShardReader(dataset, config))
        return made[-1]

    yield make
    for reader in made:
        reader.close()


def cached(config):
    return sorted(path.name for path in cache_folder(config).rglob("*") if path.is_file() and path.suffix != ".lock")


def tail_of(dataset):
    return [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]


def alter(dataset, path):
    content = bytearray(dataset.storage.read(path))
    content[700] ^= 1
    dataset.storage.write(path, bytes(content))


def test_bucket_is_read_through_the_cache(bucket, make_reader):
    dataset, config = bucket
    reader = make_reader(dataset, config)
    reader.hold(tail_of(dataset))
    reader.prefetch(range(len(dataset.shards)))
    assert_reads_every_image(dataset, reader)
    reader.settle()
    reader.close()
    assert len(cached(config)) == len(dataset.shards)
    for shard in dataset.shards:  # once downloaded, the bucket is not asked again
        dataset.storage.delete(shard.path)
    again = make_reader(dataset, config)
    again.hold(tail_of(dataset))
    assert_reads_every_image(dataset, again)


def test_images_come_by_range_while_their_shards_are_on_their_way(bucket, proxy, make_reader):
    dataset, config = bucket
    release = threading.Event()

    def slow_shards(handler):
        if handler.is_whole_shard:
            release.wait(60)
        faulty_s3.pass_on(handler)

    proxy.rule = slow_shards
    reader = make_reader(dataset, config)
    reader.hold(tail_of(dataset))
    reader.prefetch(range(len(dataset.shards)))
    assert_reads_every_image(dataset, reader)  # no shard has come
    assert not [name for name in cached(config) if name.endswith(".tar")]
    release.set()
    reader.settle()
    ranges_before = sum(span is not None for _, _, span in proxy.seen)
    assert_reads_every_image(dataset, reader)  # now all have
    assert sum(span is not None for _, _, span in proxy.seen) == ranges_before
    whole = [path for method, path, span in proxy.seen if method == "GET" and path.endswith(".tar") and span is None]
    assert len(set(whole)) == len(whole) == len(dataset.shards)


class Crowd:
    """Counts who is there at a time, and tells when so many were there together."""

    def __init__(self, wanted):
        self.wanted, self.here, self.most = wanted, 0, 0
        self.changed = threading.Condition()

    def __enter__(self):
        with self.changed:
            self.here += 1
            self.most = max(self.most, self.here)
            self.changed.notify_all()

    def __exit__(self, *_):
        with self.changed:
            self.here -= 1

    def wait(self):
        with self.changed:
            self.changed.wait_for(lambda: self.most >= self.wanted, timeout=60)


def test_many_ranges_and_several_shards_are_read_at_a_time(bucket, proxy, make_reader):
    dataset, config = bucket
    index = dataset.index("train")
    ranges, shards = Crowd(EARLY_THREADS), Crowd(PREFETCH_THREADS)

    def held_up(handler):
        if handler.is_part_of_shard:
            with ranges:
                ranges.wait()
        elif handler.is_whole_shard:
            with shards:
                shards.wait()
                ranges.wait()  # else they would have come before they are read by range
        faulty_s3.pass_on(handler)

    proxy.rule = held_up
    reader = make_reader(dataset, config)
    reader.prefetch(range(len(dataset.shards)))
    read = reader.read(list(zip(index.shard.tolist(), index.offset.tolist(), index.length.tolist(), strict=True)))
    assert [data.tobytes() for data in read] == [expected_image(index, row) for row in range(len(index))]
    reader.settle()
    assert (ranges.most, shards.most) == (EARLY_THREADS, PREFETCH_THREADS)


def test_a_range_that_is_not_what_the_shard_holds_is_found_out(bucket, proxy, make_reader):
    dataset, config = bucket
    index = dataset.index("train")

    def other_bytes(handler):
        answer, body = handler.ask()
        headers = [header for header in answer.getheaders() if header[0] != "Connection"]
        handler.answer(answer.status, headers, body[:-1] + bytes([body[-1] ^ 1]) if handler.is_part_of_shard else body)

    proxy.rule = other_bytes
    reader = make_reader(dataset, config)
    path = dataset.shards[index.shard[0]].path
    with pytest.raises(UserError, match=rf"^{path} of the packed dataset s3://.* is altered; download or pack the"):
        read_row(reader, index, 0)
        reader.settle()


def test_a_shard_that_changed_under_the_run(bucket, make_reader):
    dataset, config = bucket
    alter(dataset, "train/body-000000.tar")
    message = r"^train/body-000000\.tar of the packed dataset s3://.* is altered; download or pack the dataset again$"
    reader = make_reader(dataset, config)
    reader.prefetch([0])
    with pytest.raises(UserError, match=message):
        while True:  # what fails in the background is told to whoever reads, even something else
            reader.read([(1, 0, 10)])
    with pytest.raises(UserError, match=message):
        reader.settle()
    assert "body-000000.tar" not in cached(config)


def test_a_shard_that_disappeared_under_the_run(bucket, make_reader):
    dataset, config = bucket
    dataset.storage.delete("train/body-000000.tar")
    message = r"^train/body-000000\.tar of the packed dataset s3://.* is missing; download or pack the dataset again$"
    with pytest.raises(UserError, match=message):
        make_reader(dataset, config).read([(0, 0, 10)])
    reader = make_reader(dataset, config)
    reader.prefetch([0, 1])
    with pytest.raises(UserError, match=message):
        while True:
            reader.read([(1, 0, 10)])


def test_a_dataset_that_was_packed_anew_or_removed_under_the_run(bucket, make_reader):
    dataset, config = bucket
    reader, index = make_reader(dataset, config), dataset.index("train")
    assert read_row(reader, index, 0) == expected_image(index, 0)
    reader.settle()
    write_packed(dataset.uri, {"train": [9, 9, 9], "val": [1, 1, 1]}, samples_per_shard=3)
    with pytest.raises(
        UserError, match=r"^the packed dataset s3://\S+ was packed anew while it was in use; start again with it$"
    ):
        for row in range(len(index)):
            read_row(reader, index, row)
        reader.settle()
    assert_reads_every_image(open_dataset(dataset.uri), make_reader(open_dataset(dataset.uri), config))

    dataset = open_dataset(dataset.uri)
    second, index = make_reader(dataset, DataConfig(cache_dir=f"{config.cache_dir}-2")), dataset.index("train")
    for stored in dataset.storage.list():
        dataset.storage.delete(stored.path)
    with pytest.raises(
        UserError, match=r"^the packed dataset s3://\S+ was removed while it was in use; upload or pack it again$"
    ):
        read_row(second, index, 0)
