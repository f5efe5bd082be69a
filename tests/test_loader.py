import io
import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig, SamplingConfig
from data_pipeline.decode import ImageSettings
from data_pipeline.loader import TrainLoader, decode_files, evaluation_batches
from data_pipeline.stream import TrainStream
from tests.packed import drawn_jpeg, write_packed

CPU = torch.device("cpu")
COUNTS = {"train": [30, 14, 5], "val": [9, 5, 3], "test": [1, 1, 0]}
BATCH = 8
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

    def make(rank=0, world=1, views=2, data=DATA, dataset=dataset, **sampling):
        loader = TrainLoader(
            dataset,
            data,
            batch_size=BATCH,
            views=views,
            sampling=SamplingConfig(**({"power": 0.0} | sampling)),
            seed=7,
            rank=rank,
            world=world,
            device=CPU,
        )
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()


def test_batches_are_what_the_stream_says(make_loader, dataset):
    loader = make_loader()
    index = dataset.index("train")
    stream = TrainStream(
        index,
        3,
        BATCH,
        SamplingConfig(power=0.0),
        4,
        7,
        [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"],
    )
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
    assert loader.wait_s > 0


def test_two_views_differ_and_come_again(make_loader):
    first = [batch.images for batch in make_loader().epoch(1)]
    again = [batch.images for batch in make_loader().epoch(1)]
    other_epoch = [batch.images for batch in make_loader().epoch(2)]
    for images, same, other in zip(first, again, other_epoch, strict=True):
        assert torch.equal(images, same)
        assert not torch.equal(images, other)
        assert ((images[:BATCH] - images[BATCH:]).abs().mean(dim=(1, 2, 3)) > 0.01).all()


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("views", [1, 2])
def test_images_are_the_same_bits_at_every_world_size(make_loader, world, views):
    alone = list(make_loader(views=views).epoch(3))
    ranks = [list(make_loader(rank, world, views).epoch(3)) for rank in range(world)]
    stream_of_position = np.arange(BATCH) % DATA.streams
    for step, whole in enumerate(alone):
        images = whole.images.unflatten(0, (views, BATCH))
        for rank in range(world):
            mine = np.flatnonzero(stream_of_position * world // DATA.streams == rank)
            part = ranks[rank][step]
            assert part.keys == [whole.keys[place] for place in mine]
            assert torch.equal(part.images.unflatten(0, (views, len(mine))), images[:, mine])


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


def test_an_epoch_left_early_does_not_leak_into_the_next(make_loader):
    loader = make_loader()
    next(loader.epoch(0))
    images = [batch.images for batch in loader.epoch(1)]
    assert all(torch.equal(a, b.images) for a, b in zip(images, make_loader().epoch(1), strict=True))


DAMAGED = ["train_1_3", "train_2_1", "train_2_2"]


@pytest.fixture(scope="module")
def damaged_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return write_packed(folder, COUNTS, tail_classes=[2], samples_per_shard=6, damage=[*DAMAGED, "val_0_4"])


def test_damaged_images_are_named_and_replaced_by_their_class(make_loader, dataset, damaged_dataset):
    data = DATA.model_copy(update={"max_damaged": 3})
    loader, whole = make_loader(data=data, dataset=damaged_dataset), make_loader()
    index = damaged_dataset.index("train")
    replaced = 0
    for epoch in range(3):
        for batch, plan in zip(loader.epoch(epoch), whole.epoch(epoch), strict=True):
            assert batch.labels.tolist() == plan.labels.tolist() == index.label[batch.rows].tolist()
            assert not set(batch.keys) & set(DAMAGED)
            for place, (key, planned) in enumerate(zip(batch.keys, plan.keys, strict=True)):
                if planned in DAMAGED:
                    members = index.key[index.label == batch.labels[place].item()].tolist()
                    following = members[members.index(planned) + 1 :] + members
                    assert key == next(name for name in following if name not in DAMAGED)
                    replaced += 1
                else:
                    assert key == planned
                    assert torch.equal(batch.images[place], plan.images[place])
    assert replaced > 3
    assert sorted(key for key, _ in loader.damaged) == sorted(DAMAGED)
    assert all("no image format that is known" in reason for _, reason in loader.damaged)


def test_damage_known_or_not_the_batches_are_the_same(make_loader, damaged_dataset):
    data = DATA.model_copy(update={"max_damaged": 3})
    loader = make_loader(data=data, dataset=damaged_dataset)
    first = list(loader.epoch(0))
    resumed = make_loader(data=data, dataset=damaged_dataset)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.damaged == loader.damaged
    for one, other in zip(first, resumed.epoch(0), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)


def test_too_many_damaged_images_stop_with_the_list(make_loader, damaged_dataset):
    loader = make_loader(data=DATA.model_copy(update={"max_damaged": 1}), dataset=damaged_dataset)
    message = (
        r"more than data\.max_damaged = 1 damaged images: train_\d_\d \(no image format.*\); train_\d_\d \(.*raise data"
    )
    with pytest.raises(UserError, match=message):
        list(loader.epoch(0))


def test_a_class_of_damaged_images_alone_stops(tmp_path, make_loader):
    keys = [f"train_2_{number}" for number in range(5)]
    dataset = write_packed(tmp_path, COUNTS, damage=keys)
    loader = make_loader(data=DATA.model_copy(update={"max_damaged": 9}), dataset=dataset)
    with pytest.raises(
        UserError, match=r"all 5 training images of class 'class 2' in .* are damaged; pack the dataset"
    ):
        list(loader.epoch(0))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "train", "test"])
def test_evaluation_sees_each_sample_once(dataset, world, split):
    index = dataset.index(split)
    rows, images = [], []
    for rank in range(world):
        for step, batch in enumerate(
            evaluation_batches(dataset, DATA, split, batch_size=4, rank=rank, world=world, device=CPU)
        ):
            assert batch.step == step and len(batch.keys) <= 4
            assert batch.labels.tolist() == index.label[batch.rows].tolist()
            assert batch.keys == index.key[batch.rows].tolist()
            rows += batch.rows.tolist()
            images.append(batch.images)
    assert rows == list(range(len(index)))
    alone = torch.cat([batch.images for batch in evaluation_batches(dataset, DATA, split, batch_size=5)])
    assert torch.equal(torch.cat(images), alone)


def test_evaluation_leaves_damaged_images_out_and_says_so(damaged_dataset, caplog):
    data = DATA.model_copy(update={"max_damaged": 1})
    keys = [key for batch in evaluation_batches(damaged_dataset, data, "val", batch_size=4) for key in batch.keys]
    assert keys == [key for key in damaged_dataset.index("val").key if key != "val_0_4"]
    assert "val_0_4 of split val is left out, it is damaged: no image format that is known" in caplog.text
    with pytest.raises(UserError, match=r"more than data\.max_damaged = 0 damaged images: val_0_4 \(no image format"):
        list(evaluation_batches(damaged_dataset, DATA, "val", batch_size=4))


def test_loose_files_come_out_like_packed_ones(dataset, tmp_path):
    index = dataset.index("val")
    settings = ImageSettings(DATA.image_px, DATA.resize_ratio, dataset.mean, dataset.std)
    files = []
    for row in range(len(index)):
        shard = tmp_path.joinpath(f"{row}.jpg")
        data = dataset.storage.read_range(
            dataset.shards[index.shard[row]].path, int(index.offset[row]), int(index.length[row])
        )
        shard.write_bytes(data)
        files.append(data if row % 3 == 0 else shard if row % 3 == 1 else str(shard))
    batches = list(decode_files(files, settings, batch_size=5))
    assert [number for batch in batches for number in batch.numbers] == list(range(len(index)))
    packed = torch.cat([batch.images for batch in evaluation_batches(dataset, DATA, "val", batch_size=5)])
    assert torch.equal(torch.cat([batch.images for batch in batches]), packed)


def test_damaged_loose_files_are_reported(tmp_path):
    settings = ImageSettings(24, 1.0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    gif = io.BytesIO()
    Image.open(io.BytesIO(drawn_jpeg(1))).save(gif, "GIF")
    whole = drawn_jpeg(2)
    files = [whole, b"", whole[: len(whole) // 2], tmp_path / "nothing.png", gif.getvalue(), b"text"]
    batches = list(decode_files(files, settings, batch_size=2))
    assert [batch.numbers for batch in batches] == [[0], [], [4]]
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 3, 24, 24), (0, 3, 24, 24), (1, 3, 24, 24)]
    reasons = dict(pair for batch in batches for pair in batch.damaged)
    assert sorted(reasons) == [1, 2, 3, 5]
    assert reasons[1] == "the file is empty" and reasons[3] == "No such file or directory"


def test_training_from_a_bucket(moto_s3, tmp_path, make_loader):
    """Truncation, alteration and the cache are `test_shards.py`'s; here the whole way, prefetching included."""
    dataset = write_packed(f"{moto_s3}/training", COUNTS, tail_classes=[2], samples_per_shard=6)
    loader = make_loader(data=DATA.model_copy(update={"cache_dir": str(tmp_path)}), dataset=dataset)
    local = make_loader()
    for batch, same in zip(loader.epoch(0), local.epoch(0), strict=True):
        assert batch.keys == same.keys and torch.equal(batch.images, same.images)
