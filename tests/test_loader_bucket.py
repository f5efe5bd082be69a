"""Training and evaluation from an S3 server that fails, throttles, cuts off, changes and forgets."""

import os
import threading

import pytest
import torch

from cluster.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.passes import evaluation_batches
from tests import faulty_s3
from tests.packed import train_loader, write_packed

COUNTS = {"train": [30, 14, 5], "val": [9, 5, 3]}
DATA = DataConfig(image_px=24, streams=4, decode_threads=1, augment=AugmentConfig(rotate_deg=20))


@pytest.fixture
def proxy(moto_s3, monkeypatch):
    """Stands before the S3 server for the storages that the test opens."""
    with faulty_s3.proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def bucket(proxy, moto_s3, tmp_path, request):
    """A packed dataset in a bucket behind the proxy, the same in a folder, and a configuration with a cache."""
    name = request.node.name.replace("[", "-").replace("]", "")
    kept = [
        write_packed(place, COUNTS, tail_classes=[2], samples_per_shard=6)
        for place in (f"{moto_s3}/{name}", tmp_path / "packed")
    ]
    return *kept, DATA.model_copy(update={"cache_dir": str(tmp_path / "cache")})


@pytest.fixture
def make_loader():
    """Makes loaders, and closes them."""
    made = []

    def make(dataset, data):
        made.append(train_loader(dataset, data, epochs=2))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def assert_same(batches, others):
    for batch, same in zip(batches, others, strict=True):
        assert batch.keys == same.keys and torch.equal(batch.images, same.images)


class EveryThird:
    """Spoils every third answer that carries images, in turn."""

    def __init__(self):
        self.lock, self.answers = threading.Lock(), 0
        self.spoilt = []

    def __call__(self, handler):
        faults = [faulty_s3.half_a_body, faulty_s3.refusal(503, "SlowDown"), faulty_s3.reset]
        faults.append(faulty_s3.half_a_body_and_reset)
        with self.lock:
            if not (handler.is_whole_shard or handler.is_part_of_shard) or len(self.spoilt) == 9:
                fault = faulty_s3.pass_on
            else:
                self.answers += 1
                fault = faulty_s3.pass_on if self.answers % 3 else faults[self.answers // 3 % 4]
                if fault is not faulty_s3.pass_on:
                    self.spoilt.append("whole" if handler.is_whole_shard else "part")
        fault(handler)


def test_training_through_faults_gives_the_same_bits_as_from_a_folder(bucket, proxy, make_loader):
    dataset, local, data = bucket
    proxy.rule = rule = EveryThird()
    loader, same = make_loader(dataset, data), make_loader(local, DATA)
    for epoch in range(2):
        assert_same(loader.epoch(epoch), same.epoch(epoch))
    assert len(rule.spoilt) >= 4  # each of the four faults
    loader.close()
    proxy.rule = faulty_s3.refusal(403, "AccessDenied")  # all is in the cache now
    again = make_loader(dataset, data)
    assert_same(again.epoch(0), make_loader(local, DATA).epoch(0))


def test_training_goes_on_by_ranges_while_no_shard_has_come(bucket, proxy, make_loader):
    dataset, local, data = bucket
    release = threading.Event()

    def slow_shards(handler):
        if handler.is_whole_shard:
            release.wait(60)
        faulty_s3.pass_on(handler)

    proxy.rule = slow_shards
    loader, same = make_loader(dataset, data), make_loader(local, DATA)
    batches = loader.epoch(0)
    assert_same([next(batches) for _ in range(loader.steps_per_epoch)], same.epoch(0))
    release.set()
    assert next(batches, None) is None  # the epoch ends when all that it has read is checked
    assert_same(loader.epoch(1), same.epoch(1))


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluation_through_faults(bucket, proxy, split):
    dataset, local, data = bucket
    proxy.rule = rule = EveryThird()
    assert_same(
        evaluation_batches(dataset, data, split, batch_size=4), evaluation_batches(local, DATA, split, batch_size=4)
    )
    assert rule.spoilt


def vanish(dataset, path):
    dataset.storage.delete(path)


def change(dataset, path):
    content = bytearray(dataset.storage.read(path))
    content[-20_000] ^= 1
    dataset.storage.write(path, bytes(content))


@pytest.mark.parametrize(("act", "state"), [(vanish, "missing"), (change, "altered")])
@pytest.mark.parametrize("path", ["train/body-000003.tar", "train/tail-000000.tar"])
def test_an_object_that_vanishes_or_changes_under_the_run_stops_it(bucket, make_loader, act, state, path):
    dataset, _, data = bucket
    dataset.index("train")
    act(dataset, path)
    with pytest.raises(
        UserError, match=rf"^{path} of the packed dataset s3://\S+ is {state}; download or pack the dataset again$"
    ):
        for _ in make_loader(dataset, data).epoch(0):
            pass


def test_a_server_that_stays_away_is_named(bucket, proxy, make_loader, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    packed, _, data = bucket
    dataset = open_dataset(packed.uri)  # with a client of its own, which gives up early
    loader = make_loader(dataset, data)
    proxy.rule = faulty_s3.no_answer
    server = proxy.url.removeprefix("http://")
    with pytest.raises(UserError, match=rf"^S3 server {server} cannot be reached for s3://\S+ \(\w+\); check the"):
        for _ in loader.epoch(0):
            pass
