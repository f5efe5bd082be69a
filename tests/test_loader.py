"""Training batches: the planned samples, the same bits at every world size and from every point on."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig, DataConfig, MixConfig, SamplingConfig
from data_pipeline.mix import mix_batch
from data_pipeline.stream import TrainStream
from tests.packed import train_loader, write_packed

COUNTS = {"train": [30, 14, 5], "val": [1, 1, 1]}
BATCH, SEED = 8, 7
DATA = DataConfig(
    image_px=24, streams=4, decode_threads=1, augment=AugmentConfig(rotate_deg=20, flip_vertical=True, hue_deg=10)
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed"), COUNTS, tail_classes=[2], samples_per_shard=6)


@pytest.fixture
def make_loader(dataset):
    """Makes loaders, and closes them."""
    made = []

    def make(rank=0, world=1, views=2, data=DATA, **options):
        made.append(train_loader(options.pop("dataset", dataset), data, rank, world, views, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


BALANCED = SamplingConfig(power=0.0)


def stream_of(dataset, sampling=BALANCED, streams=4, epochs=1):
    tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
    return TrainStream(dataset.index("train"), dataset.classes, BATCH, sampling, streams, SEED, tail, epochs)


def test_batches_are_what_the_stream_says(make_loader, dataset):
    loader, index, stream = make_loader(), dataset.index("train"), stream_of(dataset)
    assert loader.steps_per_epoch == 49 // BATCH
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert [(batch.epoch, batch.step) for batch in batches] == [(epoch, step) for step in range(6)]
        for batch in batches:
            assert batch.rows.tolist() == stream.rank_rows(epoch, batch.step)[0].tolist()
            assert batch.keys == index.key[batch.rows].tolist()
            assert batch.labels.tolist() == index.label[batch.rows].tolist()
            assert batch.images.shape == (2 * BATCH, 3, 24, 24) and batch.images.dtype == torch.float32
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert batch.mix is None
    assert loader.wait_s > 0


def test_the_tail_is_held_in_memory(tmp_path, make_loader, dataset):
    """Once the loader is there, its tail shards are not needed any more."""
    same = write_packed(tmp_path, COUNTS, tail_classes=[2], samples_per_shard=6)
    loader = make_loader(dataset=same)
    tails = list((tmp_path / "train").glob("tail-*.tar"))
    for tail in tails:
        tail.unlink()
    assert tails
    for batch, other in zip(loader.epoch(0), make_loader().epoch(0), strict=True):
        assert batch.keys == other.keys and torch.equal(batch.images, other.images)


def test_a_schedule_over_epochs_reaches_the_batches(make_loader, dataset):
    sampling = SamplingConfig(power=1.0, power_last=0.0)
    loader, stream = make_loader(sampling=sampling, epochs=3), stream_of(dataset, sampling, epochs=3)
    rare = []
    for epoch in range(3):
        batches = list(loader.epoch(epoch))
        assert [batch.rows.tolist() for batch in batches] == [stream.rank_rows(epoch, s)[0].tolist() for s in range(6)]
        rare.append(sum((batch.labels == 2).sum().item() for batch in batches))
    assert rare[0] < rare[1] < rare[2] == 16  # balanced in the end: a third of 48


def test_two_views_differ_and_come_again(make_loader):
    first = [batch.images for batch in make_loader().epoch(1)]
    again = [batch.images for batch in make_loader().epoch(1)]
    other_epoch = [batch.images for batch in make_loader().epoch(2)]
    for images, same, other in zip(first, again, other_epoch, strict=True):
        assert torch.equal(images, same)
        assert not torch.equal(images, other)
        assert ((images[:BATCH] - images[BATCH:]).abs().mean(dim=(1, 2, 3)) > 0.01).all()


def test_threads_change_nothing(make_loader):
    many = make_loader(data=DATA.model_copy(update={"decode_threads": 5}))
    for batch, other in zip(make_loader().epoch(0), many.epoch(0), strict=True):
        assert batch.keys == other.keys and torch.equal(batch.images, other.images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_that_was_asked_for(make_loader, dtype):
    for batch, exact in zip(make_loader(dtype=dtype).epoch(0), make_loader().epoch(0), strict=True):
        assert batch.images.dtype == dtype and batch.images.is_contiguous(memory_format=torch.channels_last)
        precision = torch.finfo(dtype).eps
        torch.testing.assert_close(batch.images.float(), exact.images, rtol=precision, atol=precision / 8)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("mix", [MixConfig(), MixConfig(mixup_alpha=0.4, cutmix_alpha=1)])
def test_images_are_the_same_bits_at_every_world_size(make_loader, world, views, mix):
    data = DATA.model_copy(update={"mix": mix})
    alone = list(make_loader(views=views, data=data).epoch(3))
    ranks = [list(make_loader(rank, world, views, data).epoch(3)) for rank in range(world)]
    stream_of_position = np.arange(BATCH) % data.streams
    for step, whole in enumerate(alone):
        images = whole.images.unflatten(0, (views, BATCH))
        for rank in range(world):
            mine = np.flatnonzero(stream_of_position * world // data.streams == rank)
            part = ranks[rank][step]
            assert part.keys == [whole.keys[place] for place in mine]
            assert torch.equal(part.images.unflatten(0, (views, len(mine))), images[:, mine])
            assert (part.mix is None) == (whole.mix is None) == (mix == MixConfig())
            if part.mix is not None:
                assert torch.equal(part.mix.labels, whole.mix.labels[mine])
                assert torch.equal(part.mix.share, whole.mix.share[mine])


def test_mixed_batches_are_the_plain_ones_mixed(make_loader):
    mix = MixConfig(mixup_alpha=0.4)
    data = DATA.model_copy(update={"mix": mix})
    for mixed, plain in zip(make_loader(data=data).epoch(1), make_loader().epoch(1), strict=True):
        positions = np.arange(mixed.step * BATCH, (mixed.step + 1) * BATCH)
        images, expected = mix_batch(plain.images, plain.labels, positions, DATA.streams, mix, SEED, 1)
        assert torch.equal(mixed.labels, plain.labels) and torch.equal(mixed.images, images)
        assert torch.equal(mixed.mix.labels, expected.labels) and torch.equal(mixed.mix.share, expected.share)
        assert mixed.mix.share.min() < 1


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 8, 12])
def test_resume_gives_the_same_bits(make_loader, steps):
    unbroken = [batch for epoch in range(3) for batch in make_loader().epoch(epoch)]
    loader = make_loader()
    for _ in islice((batch for epoch in range(3) for batch in loader.epoch(epoch)), steps):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    assert divmod(steps, 6) == (state["epoch"], state["step"])
    resumed = make_loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    batch = next(resumed.epoch(state["epoch"], state["step"]))
    assert batch.keys == unbroken[steps].keys
    assert torch.equal(batch.images, unbroken[steps].images)


def steps_of(loader, state, count):
    """The keys of the next steps, over the ends of epochs, and the state after them."""
    loader.load_state_dict(state)
    keys = []
    while len(keys) < count:
        keys += [batch.keys for batch in islice(loader.epoch(state["epoch"], state["step"]), count - len(keys))]
        state = json.loads(json.dumps(loader.state_dict()))
    return keys, state


def test_a_hundred_stops_each_with_another_world_size_repeat_and_lose_nothing(tmp_path):
    """Keys in the ranks' own order, unsorted; after each stop another number of ranks goes on from one rank's state."""
    counts = {"train": [700, 90, 12], "val": [1, 1, 1]}
    dataset = write_packed(tmp_path, counts, tail_classes=[2], samples_per_shard=40, distinct=20)
    data = DataConfig(image_px=8, streams=8, decode_threads=1, augment=AugmentConfig(scale_min=0.9))
    worlds = {world: [train_loader(dataset, data, rank, world) for rank in range(world)] for world in (1, 2, 4, 8)}
    stream, key = stream_of(dataset, streams=8), dataset.index("train").key
    rng = np.random.default_rng(0)
    state: dict = {"epoch": 0, "step": 0, "damaged": []}
    for _ in range(100):
        world, count = int(rng.choice(list(worlds))), int(rng.integers(1, 4))
        runs = [steps_of(loader, state, count) for loader in worlds[world]]
        for number in range(count):
            epoch, step = divmod(state["epoch"] * stream.steps_per_epoch + state["step"] + number, 100)
            expected = [key[stream.rank_rows(epoch, step, rank, world)[0]].tolist() for rank in range(world)]
            assert [keys[number] for keys, _ in runs] == expected
        assert all(after == runs[0][1] for _, after in runs)  # any rank's state will do
        state = runs[0][1]
    assert (state["epoch"], state["step"]) > (1, 50)
    for loaders in worlds.values():
        for loader in loaders:
            loader.close()


def test_an_epoch_left_early_does_not_leak_into_the_next(make_loader):
    loader = make_loader()
    next(loader.epoch(0))
    images = [batch.images for batch in loader.epoch(1)]
    assert all(torch.equal(a, b.images) for a, b in zip(images, make_loader().epoch(1), strict=True))
