"""Augmented views that are kept: pure functions of seed, row and view, whatever else differs."""

import numpy as np
import pytest
import torch

from data_pipeline.augment import draw_views
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.decode import Decoder
from data_pipeline.passes import VIEWS_EPOCH, augmented_batches, decoder_settings
from tests.packed import drawn_jpeg, hash_of, write_packed

CPU = torch.device("cpu")
AUGMENT = AugmentConfig(flip_vertical=True, rotate_deg=20, hue_deg=30)
DATA = DataConfig(image_px=24, decode_threads=1, augment=AUGMENT)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    counts = {"train": [9, 5, 3], "val": [2, 1, 1]}
    return write_packed(tmp_path_factory.mktemp("packed"), counts, tail_classes=[2], samples_per_shard=6)


def images_of(dataset, views, world=1, batch_size=4, seed=3):
    """Rows [N], and images [N, V, 3, px, px]."""
    rows, images = [], []
    for rank in range(world):
        for batch in augmented_batches(
            dataset, DATA, "train", views=views, seed=seed, batch_size=batch_size, rank=rank, world=world, device=CPU
        ):
            rows += batch.rows.tolist()
            images.append(batch.images.view(views, len(batch.rows), 3, 24, 24).transpose(0, 1))
    return rows, torch.cat(images)


def test_ranks_batches_and_the_number_of_views_change_nothing(dataset):
    rows, images = images_of(dataset, views=3)
    assert rows == list(range(17))
    for options in ({"world": 2}, {"world": 3, "batch_size": 2}, {"batch_size": 17}):
        other_rows, other = images_of(dataset, views=3, **options)
        assert other_rows == rows and torch.equal(other, images)
    assert torch.equal(images_of(dataset, views=1)[1], images[:, :1])


def test_seeds_and_views_differ(dataset):
    images = images_of(dataset, views=2)[1]
    assert not torch.equal(images[:, 0], images[:, 1])
    assert not torch.equal(images, images_of(dataset, views=2, seed=4)[1])


def test_a_view_is_the_training_graph_s_of_that_row(dataset):
    images, index = images_of(dataset, views=2)[1], dataset.index("train")
    from dataclasses import replace

    decoder = Decoder(replace(decoder_settings(dataset, DATA, 1, CPU), augment=AUGMENT, views=2))
    for row in (0, 8, 16):
        size = index.width[[row]], index.height[[row]]
        views = draw_views(AUGMENT, 24, (3, VIEWS_EPOCH), np.array([row]), 2, size)
        data = drawn_jpeg(hash_of(index.key[row]), int(size[0][0]), int(size[1][0]))
        decoder.submit([np.frombuffer(data, dtype=np.uint8)], views)
        assert torch.equal(decoder.result(), images[row])
