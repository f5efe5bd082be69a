"""The cache on the local disk: bounded, shared by processes, checked, and what happens when the disk is full."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.shard_cache import ShardCache, cache_folder
from data_pipeline.shards import ShardReader
from tests import faulty_s3
from tests.packed import assert_reads_every_image, write_packed

ROOT = Path(__file__).parent.parent
COUNTS = {"train": [20, 9, 4], "val": [3, 3, 3]}
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def bucket(moto_s3, tmp_path, request):
    """A packed dataset in a bucket, and a configuration with a cache of its own."""
    dataset = write_packed(f"{moto_s3}/{request.node.name}", COUNTS, tail_classes=[2], samples_per_shard=5)
    return dataset, DataConfig(cache_dir=str(tmp_path / "cache"))


def cached(config):
    return sorted(path.name for path in cache_folder(config).rglob("*.tar"))


def files_of(config):
    """Path and inode -> bytes of what is or will be in the cache; files and folders may vanish meanwhile."""
    found = {}
    for folder, _, names in os.walk(cache_folder(config)):
        for name in names:
            with suppress(FileNotFoundError):
                stat = os.stat(os.path.join(folder, name))
                found[folder, name, stat.st_ino] = 0 if name == "room" else stat.st_size
    return found


def cached_bytes(config):
    """What surely lay on the disk at one moment: the files that a first and a second look have both found."""
    first, second = files_of(config), files_of(config)
    return sum(min(first[file], second[file]) for file in first.keys() & second.keys())


def fill(dataset, config):
    cache = ShardCache(dataset, config)
    for shard in dataset.shards:
        cache.open(shard)
        time.sleep(0.01)  # the time of use has the clock's steps


def test_damaged_copy_in_the_cache_is_downloaded_again(bucket):
    dataset, config = bucket
    fill(dataset, config)
    for number, path in enumerate(cache_folder(config).rglob("*.tar")):
        path.write_bytes(bytes(path.stat().st_size) if number % 2 else b"short")
    assert_reads_every_image(dataset, ShardReader(dataset, config))


def test_cache_is_bounded_and_keeps_what_is_open_or_was_used_last(bucket):
    dataset, config = bucket
    largest = max(shard.bytes for shard in dataset.shards)
    config = config.model_copy(update={"cache_gib": (3 * largest + 1000) / 2**30})
    held_open = ShardCache(dataset, config).open(dataset.shards[0])
    fill(dataset, config)
    assert cached_bytes(config) <= 3 * largest + 1000
    names = [Path(shard.path).name for shard in dataset.shards]
    assert sorted(cached(config)) == sorted([names[0], *names[-2:]])
    del held_open


def test_cache_smaller_than_a_shard(bucket):
    dataset, config = bucket
    with pytest.raises(
        UserError, match=r"data\.cache_gib = 1e-06 is smaller than a shard of s3://.*; raise data.cache_gib"
    ):
        ShardReader(dataset, config.model_copy(update={"cache_gib": 1e-6}))


def read_all(uri, config, ready, log, order):
    dataset = open_dataset(uri)
    download = dataset.storage.download

    def noted(path, local):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        download(path, local)

    dataset.storage.download = noted
    reader = ShardReader(dataset, config)
    ready.wait()
    for epoch in range(3 if order else 1):
        assert_reads_every_image(dataset, reader, order=order * 100 + epoch if order else -1)
    reader.settle()
    reader.close()


def run_workers(dataset, config, log, orders, watch=lambda: None):
    ready = SPAWN.Barrier(len(orders))
    workers = [SPAWN.Process(target=read_all, args=(dataset.uri, config, ready, log, order)) for order in orders]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        watch()
        time.sleep(0.01)
    assert [worker.exitcode for worker in workers] == [0] * len(orders)
    return log.read_text().split()


def test_workers_of_a_machine_download_once(bucket, tmp_path):
    dataset, config = bucket
    downloads = run_workers(dataset, config, tmp_path / "downloads", [0, 0, 0])
    assert sorted(downloads) == sorted(shard.path for shard in dataset.shards if shard.split == "train")


def test_workers_share_a_cache_that_is_too_small_for_them(moto_s3, tmp_path, request):
    """Each reads in its own order and compares every image, while others make room: 33 shards, room for 20."""
    dataset = write_packed(f"{moto_s3}/{request.node.name}", COUNTS, samples_per_shard=1)
    bound = 20 * max(shard.bytes for shard in dataset.shards)
    config = DataConfig(cache_dir=str(tmp_path / "cache"), cache_gib=bound / 2**30)
    peak = [0]

    def watch():
        peak[0] = max(peak[0], cached_bytes(config))

    downloads = run_workers(dataset, config, tmp_path / "downloads", [1, 2], watch)
    assert len(downloads) > len(set(downloads))  # some were removed and came again
    assert 0 < peak[0] <= bound


def open_first(uri, config):
    dataset = open_dataset(uri)
    ShardCache(dataset, config).open(dataset.shards[0])


def test_what_a_killed_download_leaves_is_removed(moto_s3, bucket, monkeypatch):
    dataset, config = bucket
    with faulty_s3.proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        stopped = []

        def half_a_shard(handler):
            if not handler.is_whole_shard:
                return faulty_s3.pass_on(handler)
            answer, body = handler.ask()
            handler.answer(answer.status, [h for h in answer.getheaders() if h[0] != "Connection"], body[: 1 << 12])
            handler.wfile.flush()
            stopped.append(True)
            time.sleep(30)

        proxy.rule = half_a_shard
        worker = SPAWN.Process(target=open_first, args=(dataset.uri, config))
        worker.start()
        while not stopped:
            assert worker.is_alive()
            time.sleep(0.01)
        (coming,) = cache_folder(config).rglob("*.coming")
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert (coming / "room").stat().st_size == dataset.shards[0].bytes
    cache = ShardCache(dataset, config)
    cache.open(dataset.shards[1])  # making room for another shard finds it
    assert not list(cache_folder(config).rglob("*.coming"))
    cache.open(dataset.shards[0])
    assert cached(config) == ["body-000000.tar", "body-000001.tar"]


FULL_DISK = """
import sys
from pathlib import Path
from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.shard_cache import ShardCache

dataset, config = open_dataset(sys.argv[2]), DataConfig(cache_dir=sys.argv[1])
cache = ShardCache(dataset, config)
for shard in dataset.shards:
    cache.open(shard)
files = sorted(path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file() and path.suffix != ".lock")
print(len(dataset.shards), len(files), files[-1])
filler = open(f"{sys.argv[1]}/other-data", "wb", buffering=0)
for path in Path(sys.argv[1]).rglob("*.tar"):
    path.unlink()
try:
    while True:
        filler.write(bytes(4096))
except OSError:
    pass
try:
    cache.open(dataset.shards[0])
except UserError as error:
    print(error)
print([path.name for path in Path(sys.argv[1]).rglob("*.coming")])
"""


def test_a_full_disk_makes_room_in_the_cache_and_is_named_when_that_is_not_enough(bucket, tmp_path):
    dataset, _ = bucket
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 3 * max(shard.bytes for shard in dataset.shards) + 64 * 1024
    mount = f'mount -t tmpfs -o size={size} none "$1" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, str(disk), dataset.uri, FULL_DISK]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    first, error, left = result.stdout.splitlines()
    shards, files, last = first.split()
    assert int(shards) > int(files) >= 3 and last.endswith(".tar")
    assert error == (
        f"no space left in {disk} for {dataset.shards[0].path} of {dataset.uri} "
        f"({dataset.shards[0].bytes / 2**20:.1f} MiB); free some, or set data.cache_dir to a folder on another disk"
    )
    assert left == "[]"


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder(DataConfig())) == "/somewhere/rarelens/shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder(DataConfig())) == os.path.expanduser("~/.cache/rarelens/shards")
    assert str(cache_folder(DataConfig(cache_dir="~/x"))) == os.path.expanduser("~/x")
