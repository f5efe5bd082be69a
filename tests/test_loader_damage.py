"""Images that turn out damaged in a run: named, counted, replaced by the next of their class, and a limit to them."""

import json

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from data_pipeline.config import AugmentConfig, DataConfig, SamplingConfig
from data_pipeline.stream import TrainStream
from tests.packed import train_loader, write_packed
from tests.raw import hundred_megapixels

COUNTS = {"train": [30, 14, 5], "val": [1, 1, 1]}
DAMAGED = ["train_1_3", "train_2_1", "train_2_2"]
DATA = DataConfig(image_px=24, streams=4, decode_threads=1, max_damaged=3, augment=AugmentConfig(rotate_deg=20))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed"), COUNTS, tail_classes=[2], samples_per_shard=6)


@pytest.fixture(scope="module")
def damaged_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    return write_packed(folder, COUNTS, tail_classes=[2], samples_per_shard=6, damage=DAMAGED)


@pytest.fixture
def make_loader(damaged_dataset):
    """Makes loaders, and closes them."""
    made = []

    def make(dataset=damaged_dataset, data=DATA, rank=0, world=1, **options):
        made.append(train_loader(dataset, data, rank, world, **options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


@pytest.mark.parametrize("views", [1, 2])
def test_damaged_images_are_named_and_replaced_by_their_class(make_loader, dataset, damaged_dataset, views):
    told = []
    loader, whole = make_loader(views=views, warn=told.append), make_loader(dataset, views=views)
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
                    assert torch.equal(batch.images[place :: len(batch.keys)], plan.images[place :: len(batch.keys)])
    assert replaced > 3
    assert sorted(key for key, _ in loader.damaged) == sorted(DAMAGED)
    assert all("no image format that is known" in reason for _, reason in loader.damaged)
    told_once = "{} of split train is damaged, the next of its class takes its place: no image format that is known"
    assert sorted(told) == [told_once.format(key) for key in sorted(DAMAGED)]


def spoilt(kind, image):
    return {
        "cut in its header": image[:30],
        "cut in its pixels": image[: len(image) // 2],
        "empty": b"",
        "not an image": b"text " * 200,
        "100 megapixels": hundred_megapixels(),
    }[kind]


REASONS = {
    "cut in its header": "truncated",
    "cut in its pixels": "image file is truncated",
    "empty": "the file is empty",
    "not an image": "no image format that is known",
    "100 megapixels": "10000 x 10000 pixels, more than the",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("views", [1, 2])
def test_one_damaged_image_in_a_large_batch_of_any_kind(tmp_path, make_loader, kind, views):
    """DALI itself crashes on some of them, once a batch is larger than a few images."""
    dataset = write_packed(tmp_path, {"train": [120, 80, 56], "val": [1, 1, 1]}, samples_per_shard=64, distinct=16)
    index = dataset.index("train")
    row = int(np.flatnonzero(index.key == "train_1_5")[0])
    with (tmp_path / dataset.shards[index.shard[row]].path).open("r+b") as file:
        file.seek(int(index.offset[row]))
        image = spoilt(kind, file.read(int(index.length[row])))
        index.length[row] = len(image)  # as if it had been packed so
        file.seek(int(index.offset[row]))
        file.write(image)
    data = DATA.model_copy(update={"max_damaged": 1, "decode_threads": 2, "streams": 8})
    loader = make_loader(dataset, data, views=views, batch_size=128)
    for epoch in range(4):
        for batch in loader.epoch(epoch):
            assert batch.images.shape[0] == views * 128 and "train_1_5" not in batch.keys
    ((key, reason),) = loader.damaged
    assert key == "train_1_5" and REASONS[kind] in reason.lower()


def test_no_image_of_a_batch_is_black_or_a_copy_of_another_place(make_loader):
    for batch in make_loader(views=2).epoch(0):
        assert (batch.images.std(dim=(1, 2, 3)) > 0.1).all()


def test_damage_known_or_not_the_batches_are_the_same(make_loader):
    loader = make_loader()
    first = list(loader.epoch(0))
    resumed = make_loader()
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.damaged == loader.damaged
    for one, other in zip(first, resumed.epoch(0), strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)


def test_every_world_size_replaces_alike(make_loader):
    ranks = [make_loader(rank=rank, world=4) for rank in range(4)]
    alone = make_loader()
    for whole, *parts in zip(alone.epoch(0), *(loader.epoch(0) for loader in ranks), strict=True):
        assert sorted(key for part in parts for key in part.keys) == sorted(whole.keys)
    met = [set(loader.damaged) for loader in ranks]
    assert set().union(*met) == set(alone.damaged)
    assert any(one != set(alone.damaged) for one in met)  # no rank has met all


def test_damage_told_of_changes_no_batch(make_loader):
    told, alone = make_loader(), make_loader()
    told.add_damaged([("train_1_3", "no image"), ("key of another split", "passed over")])
    assert told.damaged == [("train_1_3", "no image")]
    for one, other in zip(told.epoch(0), alone.epoch(0), strict=True):
        assert one.keys == other.keys and torch.equal(one.images, other.images)


def test_too_many_damaged_images_stop_with_the_list(make_loader):
    loader = make_loader(data=DATA.model_copy(update={"max_damaged": 1}))
    message = (
        r"more than data\.max_damaged = 1 damaged images: train_\d_\d \(no image format.*\); train_\d_\d \(.*\); "
        "pack the dataset again, or raise data.max_damaged$"
    )
    with pytest.raises(UserError, match=message):
        list(loader.epoch(0))
    with pytest.raises(UserError, match=r"more than data\.max_damaged = 1 damaged images"):
        make_loader(data=DATA.model_copy(update={"max_damaged": 1})).load_state_dict(
            {"epoch": 0, "step": 0, "damaged": [["train_1_3", "x"], ["train_2_1", "x"]]}
        )


def test_a_class_of_damaged_images_alone_stops(tmp_path, make_loader):
    keys = [f"train_2_{number}" for number in range(5)]
    dataset = write_packed(tmp_path, COUNTS, damage=keys)
    loader = make_loader(dataset, DATA.model_copy(update={"max_damaged": 9}))
    with pytest.raises(
        UserError, match=r"all 5 training images of class 'class 2' in .* are damaged; pack the dataset"
    ):
        list(loader.epoch(0))


def test_a_shard_that_was_spoilt_after_packing_is_named_with_its_images(tmp_path, make_loader):
    dataset = write_packed(tmp_path, COUNTS, tail_classes=[2], samples_per_shard=6)
    index = dataset.index("train")
    row = int(np.flatnonzero(index.shard == 0)[0])
    with (tmp_path / dataset.shards[0].path).open("r+b") as file:
        file.seek(int(index.offset[row]))
        file.write(bytes(int(index.length[row])))
    message = (
        rf"more than data\.max_damaged = 0 damaged images: {index.key[row]} \(no image format that is known; "
        rf"train/body-000000\.tar has changed since it was packed\); pack"
    )
    with pytest.raises(UserError, match=message):
        list(make_loader(dataset, DATA.model_copy(update={"max_damaged": 0}), sampling=SamplingConfig()).epoch(0))


@pytest.mark.parametrize("damage", [[], ["train_2_3"]])
def test_five_images_in_the_rarest_of_ten_thousand_are_drawn_as_planned(tmp_path, make_loader, damage):
    """Draws of each class equal the plan exactly; of the five images they differ by one, the damaged one's go on."""
    counts = {"train": [9_600, 395, 5], "val": [1, 1, 1]}
    dataset = write_packed(tmp_path, counts, [1, 2], samples_per_shard=500, damage=damage, distinct=25)
    data = DataConfig(image_px=8, streams=10, max_damaged=1, augment=AugmentConfig(scale_min=0.9))
    index, sampling = dataset.index("train"), SamplingConfig(power=0.5)
    tail = [number for number, shard in enumerate(dataset.shards) if shard.kind == "tail"]
    loader = make_loader(dataset, data, batch_size=100, sampling=sampling)
    planned = TrainStream(index, dataset.classes, 100, sampling, 10, 7, tail)
    rows, labels = [], []
    for batch in loader.epoch(0):
        rows += batch.rows.tolist()
        labels += batch.labels.tolist()
    assert np.bincount(labels).tolist() == planned.draws_per_class(0).tolist()
    weights = np.sqrt(counts["train"])
    np.testing.assert_allclose(np.bincount(labels), weights / weights.sum() * 10_000, atol=1)
    visits = np.bincount(rows, minlength=len(index))
    plan = np.bincount(planned.plan(0), minlength=len(index))
    rarest = np.flatnonzero(index.label == 2)
    assert plan[rarest].max() - plan[rarest].min() <= 1
    if damage:
        (bad,) = np.flatnonzero(index.key == damage[0])
        following = np.roll(rarest, -1)[rarest == bad]
        plan[following] += plan[bad]
        plan[bad] = 0
    assert visits.tolist() == plan.tolist()
