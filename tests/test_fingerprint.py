"""The fingerprint of small sets whose every figure is known."""

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import SourceConfig, SplitConfig
from data_pipeline.fingerprint import Spread, bits_per_channel, take_fingerprint
from data_pipeline.fingerprint_report import describe, obstacles, remarks
from data_pipeline.splits import assign_splits
from tests.raw import encoded, medmnist, pattern, sample_members, save, table_source, write_csv, write_tar
from tests.test_dicom import RAMP_12, dataset, file_of


def fingerprint(source, **options):
    return take_fingerprint(source, progress=False, **options)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """12 pictures of a, 6 of b and 2 of c, two a patient; a copy of another class; one file that is no image."""
    folder = tmp_path_factory.mktemp("set")
    source = table_source(folder, {"a": 12, "b": 6, "c": 2})
    images = folder / "images"
    save(images / "img_0001.jpg", pattern(1, side_px=30), quality=90)
    save(images / "img_0012.jpg", pattern(0), quality=90)  # of b, and shows what the first of a shows
    (images / "img_0005.jpg").write_bytes(b"torn")
    return fingerprint(source)


def test_every_figure_of_a_known_set(found):
    assert found.classes == {"a": 11, "b": 6, "c": 2}
    assert found.images == 19 and found.imbalance == 5.5
    assert found.groups == 10 and found.images_per_group == Spread(1, 2, 2)
    assert found.independent == {"a": 6, "b": 3, "c": 1}
    assert found.splits == {}
    assert found.width_px == found.height_px == found.short_px == Spread(24, 24, 30)
    assert found.bits == {8: 19} and not found.all_grey
    assert (found.near_duplicates, found.contradictions) == (2, 2)
    assert found.unusable == (("images/img_0005.jpg", "no image format that is known"),)
    assert found.read == 20 and found.read_all


def test_it_is_told_in_words(found):
    lines = describe(found)
    assert lines[:3] == [
        "images: 19 of 3 classes, imbalance 5.5",
        "images of each class: a 11, b 6, c 2",
        "groups: 10, images each: 1 to 2, median 2",
    ]
    assert "near-duplicates: 2, 2 of them with another class" in lines
    assert obstacles(found) == [
        "1 class with fewer groups (patients or lesions, near-duplicates joined) than there are splits to cut, 3: "
        "c (1); add images of other patients or lesions, or take the class out"
    ]
    said = remarks(found)
    assert said[0].startswith("fewer than 20 images: a (11), b (6), c (2);")
    assert said[1].startswith("1 image cannot be used, the first images/img_0005.jpg: no image format that is known;")
    assert said[2].startswith("2 images have a near-duplicate of another class;")
    assert len(said) == 3 and all("; " in text for text in said)


def test_near_duplicates_join_groups_before_they_are_counted(tmp_path):
    """Three patients of which two have the same picture: what `assign_splits` refuses is an obstacle."""
    source = table_source(tmp_path, {"a": 8, "b": 6})
    save(tmp_path / "images" / "img_0010.jpg", pattern(8), quality=90)  # second patient of b, the first one's picture
    found = fingerprint(source)
    assert found.independent == {"a": 4, "b": 2}
    assert "b (2)" in obstacles(found)[0]
    assert fingerprint(source, near_duplicate_bits=-1).independent == {"a": 4, "b": 3}
    labels, groups = np.repeat([0, 1], [4, 2]), np.array(list("stuvwx"), dtype=object)
    with pytest.raises(ValueError, match="too few groups"):
        assign_splits(labels, groups, SplitConfig(), 0, ("a", "b"))


def test_given_splits_ask_for_fewer_groups(tmp_path):
    for number in range(6):
        folder = ("train", "test")[number % 2]
        save(tmp_path / folder / "ab"[number // 3] / f"{number}.png", pattern(number))
    found = fingerprint(SourceConfig(path=str(tmp_path)))
    assert found.splits == {"train": 3, "test": 3} and found.groups is None
    assert obstacles(found) == []  # train keeps one part and val gets one: two of each class are enough
    assert "no groups are named" in remarks(found)[-1]


def test_a_part_of_the_images_stands_for_all(tmp_path):
    source = table_source(tmp_path, {"a": 12, "b": 8})
    found = fingerprint(source, max_read=5)
    assert found.read == 5 and not found.read_all and found.images == 20
    assert describe(found)[4].endswith("(of 5 that were looked at)")


def test_medmnist_shards_and_dicom_have_one_too(tmp_path):
    medmnist(tmp_path / "m.npz", {"train": 6, "val": 3, "test": 3}, channels=None)
    grey = fingerprint(SourceConfig(path=str(tmp_path / "m.npz")))
    assert grey.all_grey and grey.short_px == Spread(28, 28, 28)
    assert grey.splits == {"train": 6, "val": 3, "test": 3} and grey.classes == {"0": 4, "1": 4, "2": 4}
    write_tar(tmp_path / "s.tar", [m for n in range(4) for m in sample_members(f"k{n}", n, n % 2)])
    assert fingerprint(SourceConfig(path=str(tmp_path / "s.tar"))).classes == {"0": 2, "1": 2}
    for number in range(2):
        file = tmp_path / "dicom" / "ab"[number] / "x.dcm"
        file.parent.mkdir(parents=True)
        file.write_bytes(file_of(dataset(RAMP_12 + number, bits=12)))
    x_rays = fingerprint(SourceConfig(path=str(tmp_path / "dicom")))
    assert x_rays.bits == {12: 2} and x_rays.all_grey and x_rays.width_px == Spread(20, 20, 20)


@pytest.mark.parametrize(
    ("image", "kind", "bits"),
    [
        (pattern(0), "JPEG", 8),
        (pattern(0), "PNG", 8),
        (Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "PNG", 16),
        (Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "TIFF", 16),
        (pattern(0), "TIFF", 8),
        (Image.new("1", (4, 4)), "PNG", 1),
    ],
)
def test_bits_are_the_header_s(image, kind, bits):
    assert bits_per_channel(encoded(image, kind)) == bits


def test_images_of_which_none_can_be_read_are_refused(tmp_path):
    for name in ("a/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(
        UserError, match=r"none of the 2 images of .* can be read, a/1.jpg: no image format .*; mend them"
    ):
        fingerprint(SourceConfig(path=str(tmp_path)))


def test_colour_that_is_grey_is_grey(tmp_path):
    for number in range(4):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", pattern(number).convert("L").convert("RGB"))
    assert fingerprint(SourceConfig(path=str(tmp_path))).all_grey


def test_many_classes_are_told_by_the_largest_and_the_smallest(tmp_path):
    rows = []
    for number in range(24):
        save(tmp_path / f"{number}.png", pattern(number))
        rows.append((str(number), f"class {number // 2:02}"))
    write_csv(tmp_path / "labels.csv", ["image", "label"], rows)
    told = describe(fingerprint(SourceConfig(path=str(tmp_path), labels="labels.csv")))[1]
    assert told.count(",") == 8 and ", ..., " in told
