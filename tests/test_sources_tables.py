"""Parquet tables, given splits and names of the classes; `test_sources.py` has the folders and CSV tables."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from data_pipeline.config import SourceConfig
from data_pipeline.sources import class_order, read_source
from tests.raw import pattern, save, write_csv

ABC = ["a.jpg", "b.jpg", "c.jpg"]


def folder_of(tmp_path, names):
    for number, name in enumerate(names):
        save(tmp_path / name, pattern(number))


def with_table(tmp_path, names, rows, columns=("image", "label", "group"), **settings):
    folder_of(tmp_path, names)
    write_csv(tmp_path / "labels.csv", list(columns), rows)
    return SourceConfig(path=str(tmp_path), labels="labels.csv", **settings)


def parquet(tmp_path, columns, **settings):
    folder_of(tmp_path, [f"{name}.jpg" for name in columns["image"]])
    pq.write_table(pa.table(columns), tmp_path / "labels.parquet")
    return SourceConfig(path=str(tmp_path), labels="labels.parquet", **settings)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_parquet_table_reads_as_the_csv_does(tmp_path, kind):
    rows = [("a", "x", "p1"), ("b", " y ", None), ("c", "x", "p1")]
    label, group = (pa.array([row[i] for row in rows], kind) for i in (1, 2))
    columns = {"image": ["a", "b", "c"], "label": label, "group": group, "unread": [b"x"] * 3}
    source = parquet(tmp_path, columns, group_column="group")
    write_csv(tmp_path / "labels.csv", ["image", "label", "group"], [(a, b, c or "") for a, b, c in rows])
    assert read_source(source) == read_source(source.model_copy(update={"labels": "labels.csv"}))
    assert [(s.label, s.group) for s in read_source(source)] == [("x", "p1"), ("y", "b.jpg"), ("x", "p1")]


def test_whole_numbers_are_names_in_a_parquet_table_and_fractions_are_refused(tmp_path):
    source = parquet(tmp_path, {"image": ["a", "b", "c"], "label": [10, 9, 10], "weight": [0.5, 1.0, 2.0]})
    samples = read_source(source)
    assert [sample.label for sample in samples] == ["10", "9", "10"]
    assert class_order(samples, None) == ("9", "10")
    with pytest.raises(UserError) as error:
        read_source(source.model_copy(update={"label_column": "weight"}))
    assert str(error.value) == (
        f"{tmp_path}/labels.parquet: column 'weight' (source.label_column) holds double; write names or whole numbers "
        "into it"
    )


def test_parquet_tables_that_cannot_be_read(tmp_path):
    source = parquet(tmp_path, {"image": ["a", "b"], "labels": ["x", None]})
    with pytest.raises(UserError, match=r"has no column 'label' \(source.label_column\); did you mean 'labels'\?"):
        read_source(source)
    with pytest.raises(UserError, match=r"labels.parquet: 1 row without a labels \(b\); fill the column in"):
        read_source(source.model_copy(update={"label_column": "labels"}))
    (tmp_path / "labels.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"labels.parquet is not a Parquet file that can be read \(.+\); write"):
        read_source(source)


SPLIT_ROWS = [("a", "x", "train"), ("b", "y", "Training"), ("c", "x", "VALID"), ("d", "y", "test")]


def test_a_column_of_splits_is_kept_in_our_words(tmp_path):
    columns = ("image", "label", "part")
    source = with_table(tmp_path, [f"{n}.jpg" for n in "abcd"], SPLIT_ROWS, columns, split_column="part")
    assert [sample.split for sample in read_source(source)] == ["train", "train", "val", "test"]
    assert {sample.split for sample in read_source(source.model_copy(update={"split_column": None}))} == {None}


@pytest.mark.parametrize(
    "part, message",
    [
        (
            "fold 3",
            "source {root} gives 1 sample a split that is not known (d.jpg: 'fold 3'); known: train, training, val",
        ),
        ("", "{root}/labels.csv: 1 row without a part (d); fill the column in"),
    ],
)
def test_splits_that_are_not_known(tmp_path, part, message):
    rows = [*SPLIT_ROWS[:3], ("d", "y", part)]
    columns = ("image", "label", "part")
    source = with_table(tmp_path, [f"{n}.jpg" for n in "abcd"], rows, columns, split_column="part")
    with pytest.raises(UserError) as error:
        read_source(source)
    assert str(error.value).startswith(message.format(root=tmp_path))


def test_a_column_of_splits_that_nothing_has(tmp_path):
    folder_of(tmp_path, ["x/a.jpg", "y/b.jpg"])
    with pytest.raises(UserError, match=r"has no 'part' \(source.split_column\) in any sample; correct the name"):
        read_source(SourceConfig(path=str(tmp_path), split_column="part"))


def test_folders_of_splits_hold_class_folders(tmp_path):
    folder_of(tmp_path, ["Training/x/a.jpg", "Training/y/b.jpg", "Testing/x/a.jpg", "Testing/y/deep/c.jpg"])
    found = {sample.name: (sample.split, sample.label) for sample in read_source(SourceConfig(path=str(tmp_path)))}
    assert found == {
        "Training/x/a.jpg": ("train", "x"),
        "Training/y/b.jpg": ("train", "y"),
        "Testing/x/a.jpg": ("test", "x"),
        "Testing/y/deep/c.jpg": ("test", "y"),
    }


def test_classes_that_are_called_like_splits_stay_classes(tmp_path):
    folder_of(tmp_path, ["train/a.jpg", "car/b.jpg", "train/c.jpg"])
    assert [(s.label, s.split) for s in read_source(SourceConfig(path=str(tmp_path)))] == [
        ("car", None),
        ("train", None),
        ("train", None),
    ]


def test_configured_names_give_the_order_and_what_is_none_of_them_is_quarantined(tmp_path):
    rows = [("a", "zebra", ""), ("b", "ape", ""), ("c", "zebu", "")]
    source = with_table(tmp_path, ABC, rows, class_names=["zebra", "ape"])
    samples = read_source(source)
    assert class_order(samples, source.class_names) == ("zebra", "ape")
    assert [sample.problem for sample in samples] == [
        None,
        None,
        "label 'zebu' is none of source.class_names; did you mean 'zebra'?",
    ]
    with pytest.raises(UserError, match=r"class 'mole' of source.class_names has no sample; correct the name, or"):
        class_order(samples, ["zebra", "ape", "mole"])


@pytest.mark.parametrize("names", [["a", "a"], ["a"], ["a", ""]])
def test_names_of_classes_are_told_apart(names):
    with pytest.raises(ValueError, match="names must be two or more, none empty and none twice, not"):
        SourceConfig(class_names=names)
