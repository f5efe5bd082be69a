import csv
import io
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.lesions import CLASSES, draw_picture
from data_pipeline.pack import pack
from data_pipeline.sources import read_source
from data_pipeline.synthetic import class_sizes, draw_synthetic, plan_pictures
from tests.raw import digests


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_synthetic(folder, seed=0, scale=0.06)


def test_the_whole_set_is_long_tailed_and_large_enough():
    sizes = class_sizes()
    assert sizes == sorted(sizes, reverse=True) and sizes[0] / sizes[-1] >= 50 and sum(sizes) >= 3000
    pictures = list(plan_pictures())
    assert Counter(picture.label for picture in pictures) == dict(enumerate(sizes))
    assert len({picture.name for picture in pictures}) == len(pictures)
    lesions = defaultdict(set)
    for picture in pictures:
        lesions[picture.lesion].add(picture.label)
    assert all(len(labels) == 1 for labels in lesions.values())
    groups = Counter(next(iter(labels)) for labels in lesions.values())
    assert min(groups.values()) >= 9
    assert set(Counter(picture.lesion for picture in pictures).values()) == {1, 2, 3, 4}


def test_four_families_each_with_common_and_rare_members_that_differ_in_detail_alone():
    families = [kind.family for kind in CLASSES]
    assert Counter(map(id, families)).most_common() == [(id(family), 4) for family in families[:4]]
    for start in range(0, 16, 4):
        assert len({id(family) for family in families[start : start + 4]}) == 4
    assert len({kind.name for kind in CLASSES}) == 16
    details = {(id(kind.family), kind.texture, kind.period_px, kind.sign, kind.rim) for kind in CLASSES}
    assert len(details) == 16


def test_a_scaled_set_is_what_its_table_says(drawn):
    folder, config = drawn
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert 180 <= len(rows) <= 260 and {row["label"] for row in rows} == {kind.name for kind in CLASSES}
    assert {path.name for path in (folder / "images").iterdir()} == {row["image"] for row in rows}
    assert all(Image.open(folder / "images" / row["image"]).size == (96, 96) for row in rows)
    assert len(read_source(config)) == len(rows)


def test_pixels_follow_from_the_seed_alone(drawn, tmp_path):
    folder, _ = drawn
    draw_synthetic(tmp_path / "again", seed=0, scale=0.06)
    assert digests(tmp_path / "again") == digests(folder)
    assert draw_picture(0, 3, 5, 1) == draw_picture(0, 3, 5, 1)
    assert len({draw_picture(seed, 3, lesion, view) for seed in (0, 1) for lesion in (5, 6) for view in (0, 1)}) == 8


def test_a_set_that_is_there_is_not_drawn_again_and_another_is_refused(drawn):
    folder, config = drawn
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert draw_synthetic(folder, seed=0, scale=0.06) == config
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError) as error:
        draw_synthetic(folder, seed=1, scale=0.06)
    assert str(error.value) == (
        f'{folder} holds a synthetic set drawn with {{"seed": 0, "scale": 0.06, "version": 1}}, not '
        f'{{"seed": 1, "scale": 0.06, "version": 1}}; choose another folder or delete it'
    )


def test_a_drawing_that_was_stopped_is_finished(drawn, tmp_path):
    folder, _ = drawn
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "img_00000.jpg").write_bytes(b"half a")
    draw_synthetic(tmp_path, seed=0, scale=0.06)
    assert digests(tmp_path) == digests(folder)


def test_lesions_stay_apart_when_near_duplicates_join(drawn, tmp_path):
    _, config = drawn
    dataset = pack(config, DataConfig(), str(tmp_path / "packed"), seed=0, progress=False)
    assert dataset.made["joined_groups"] == dataset.made["mixed_groups"] == 0
    for split in ("train", "val", "test"):
        assert dataset.class_counts(split).min() >= 1


def test_members_of_a_family_cannot_be_told_by_their_mean_colour():
    """The detail has mean 0: the colour of two members differs less than that of two lesions of one class."""
    colour = [
        [
            np.asarray(Image.open(io.BytesIO(draw_picture(0, label, lesion, 0))), float)[36:60, 36:60].mean((0, 1))
            for lesion in range(24)
        ]
        for label in (0, 4, 8)
    ]
    colour = np.array(colour)
    between = colour.mean(axis=1).std(axis=0)
    within = colour.std(axis=1).mean(axis=0)
    assert (between < within).all()
