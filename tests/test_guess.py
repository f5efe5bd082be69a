"""What files are taken for: each rule of data_pipeline/guess.py, and that what cannot be told is not guessed."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from data_pipeline.guess import guess_source
from data_pipeline.sources import read_source
from tests.raw import medmnist, pattern, sample_members, save, write_csv, write_tar

NAMES = [f"img_{number}" for number in range(8)]
CLASSES = ["a", "b"] * 4


@pytest.fixture
def images(tmp_path):
    for number, name in enumerate(NAMES):
        save(tmp_path / "pictures" / f"{name}.jpg", pattern(number))
    return tmp_path


def guessed(folder, **given):
    """The settings of the source that are not defaults, without its path."""
    return guess_source(str(folder), given).source.model_dump(exclude_defaults=True, exclude={"path"})


def write(folder, columns, name="labels.csv"):
    write_csv(folder / name, list(columns), zip(*columns.values(), strict=True))


def test_columns_are_told_by_what_they_hold_and_how_they_are_called(images):
    patients = ["p1", "p1", "p2", "p2", "p3", "p3", "p4", "p4"]
    lesions = ["l1", "l2", "l3", "l3", "l4", "l5", "l6", "l7"]
    fold = ["train"] * 5 + ["valid", "test", "test"]
    columns = {"file": NAMES, "sex": ["f"] * 4 + ["m"] * 4, "lesion_id": lesions, "Patient ID": patients}
    write(images, {**columns, "part": fold, "dx": CLASSES})
    assert guessed(images) == {
        "labels": "labels.csv",
        "image_column": "file",
        "label_column": "dx",
        "group_column": "Patient ID",  # a patient has several lesions: the coarser one
        "split_column": "part",
    }
    samples = read_source(guess_source(str(images)).source)
    assert {sample.split for sample in samples} == {"train", "val", "test"}
    assert {sample.group for sample in samples} == set(patients)


def test_each_guess_has_its_reason(images):
    write(images, {"file": NAMES, "patient": ["p1", "p2"] * 4, "dx": CLASSES})
    assert guess_source(str(images)).reasons == {
        "labels": "names 8 of 8 images",
        "image_column": "100% of its values name images",
        "group_column": "called like a patient or lesion; 2 values",
        "label_column": "called like a class; 2 values",
    }


def test_what_is_given_is_not_guessed(images):
    write(images, {"file": NAMES, "dx": CLASSES, "second_opinion": CLASSES[::-1]})
    guess = guess_source(str(images), {"label_column": "second_opinion", "group_column": None})
    assert guess.source.label_column == "second_opinion"
    assert "label_column" not in guess.reasons and guess.source.group_column is None


@pytest.mark.parametrize("entries", [NAMES, [f"{n}.jpg" for n in NAMES], [f"./pictures/{n}.jpg" for n in NAMES]])
def test_stems_file_names_and_paths_name_images(images, entries):
    write(images, {"x": entries, "label": CLASSES})
    assert guessed(images)["image_column"] == "x"


def test_the_table_that_names_most_images_is_taken(images):
    write(images, {"image": NAMES[:4], "label": CLASSES[:4]}, "a_few.csv")
    write(images, {"image": ["x"] * 8, "label": CLASSES}, "others.csv")
    write(images, {"image": NAMES, "width": list("12345678")}, "sizes.csv")  # nothing in it can be classes
    (images / "notes.csv").write_bytes(b"\xff\xfe no table")
    (images / "sub").mkdir()
    pq.write_table(pa.table({"image": NAMES, "target": CLASSES, "score": [0.5] * 8}), images / "sub" / "all.parquet")
    assert guessed(images) == {"labels": "sub/all.parquet", "label_column": "target"}


def test_without_a_table_folders_are_classes(tmp_path):
    for number in range(4):
        save(tmp_path / "ab"[number % 2] / f"{number}.png", pattern(number))
    assert guessed(tmp_path) == {}
    assert guess_source(str(tmp_path)).reasons == {"labels": "no table names the images: each folder is a class"}


def test_the_only_column_that_can_hold_classes_is_taken(images):
    write(images, {"image": NAMES, "what": CLASSES, "age": list("12345678"), "remark": ["", "x"] * 4})
    assert guessed(images)["label_column"] == "what"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sex": CLASSES, "side": CLASSES}, r"sex, side may; give it as --label-column"),
        (
            {"MEL": ["1.0", "0.0"] * 4, "NV": ["0.0", "1.0"] * 4},
            r"spread over columns of 0 and 1 \(MEL, NV\); write one column",
        ),
    ],
)
def test_a_column_of_classes_that_cannot_be_told_is_asked_for(images, columns, message):
    write(images, {"image": NAMES, **columns})
    with pytest.raises(UserError, match=message):
        guess_source(str(images))


def test_a_table_that_is_named_and_holds_no_classes_is_told(images):
    write(images, {"image": NAMES, "age": list("12345678")})
    with pytest.raises(UserError, match=r"none of age can; give it as --label-column"):
        guess_source(str(images), {"labels": "labels.csv"})
    with pytest.raises(UserError, match=r"there is no table .*other.csv; give a CSV or Parquet file"):
        guess_source(str(images), {"labels": "other.csv"})


def test_fields_of_shards_are_columns(tmp_path):
    def described(number):
        json = f'{{"dx": "{CLASSES[number]}", "patient": "p{number // 2}", "age": 4.5}}'.encode()
        return [sample_members(f"k{number}", number, 0)[0], (f"k{number}.json", json)]

    write_tar(tmp_path / "s-0000.tar", [member for number in range(8) for member in described(number)])
    source = guess_source(str(tmp_path / "s-*.tar")).source
    assert (source.label_column, source.group_column) == ("dx", "patient")
    assert {sample.group for sample in read_source(source)} == {"p0", "p1", "p2", "p3"}


def test_shards_with_cls_and_medmnist_need_no_guess(tmp_path):
    write_tar(tmp_path / "tars" / "s.tar", [m for n in range(4) for m in sample_members(f"k{n}", n, n % 2)])
    medmnist(tmp_path / "m.npz", {"train": 3, "val": 3, "test": 3})
    assert guessed(tmp_path / "tars") == {} == guessed(tmp_path / "m.npz")


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "there is no such folder"), ("", "there is no image in it"), ("x-*.tar", "no shard matches")],
)
def test_what_is_not_there_is_told_by_whoever_reads_it(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        read_source(guess_source(str(tmp_path / name)).source)
    with pytest.raises(UserError, match="images are read from local disks"):
        read_source(guess_source("s3://bucket/skin").source)
