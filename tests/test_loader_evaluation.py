"""Passes without augmentation: each sample of a split once at any world size, and loose files."""

import io
import os

import pytest
import torch
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.decode import ImageSettings
from data_pipeline.passes import decode_files, decoder_settings, evaluation_batches
from tests.packed import drawn_jpeg, write_packed

CPU = torch.device("cpu")
COUNTS = {"train": [30, 14, 5], "val": [9, 5, 3], "test": [1, 1, 0]}
DATA = DataConfig(image_px=24, decode_threads=1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed"), COUNTS, tail_classes=[2], samples_per_shard=6)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
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


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_leaves_damaged_images_out_and_says_so(tmp_path, caplog, world):
    dataset = write_packed(tmp_path, COUNTS, samples_per_shard=6, damage=["val_0_4"])
    data = DATA.model_copy(update={"max_damaged": 1})
    passes = [evaluation_batches(dataset, data, "val", batch_size=4, rank=rank, world=world) for rank in range(world)]
    keys = [key for batches in passes for batch in batches for key in batch.keys]
    assert keys == [key for key in dataset.index("val").key if key != "val_0_4"]
    assert "val_0_4 of split val is left out, it is damaged: no image format that is known" in caplog.text
    with pytest.raises(UserError, match=r"more than data\.max_damaged = 0 damaged images: val_0_4 \(no image format"):
        list(evaluation_batches(dataset, DATA, "val", batch_size=4))


def test_decoding_threads_are_the_cores_shared_out_over_the_workers_of_a_machine(dataset, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = decoder_settings(dataset, DataConfig(), 4, CPU).threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared = decoder_settings(dataset, DataConfig(), 4, CPU).threads
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    crowded = decoder_settings(dataset, DataConfig(), 4, CPU).threads
    assert (alone, shared, crowded) == (min(cores, 16), min(max(1, cores // 2), 16), 1)
    assert decoder_settings(dataset, DataConfig(decode_threads=3), 4, CPU).threads == 3


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
