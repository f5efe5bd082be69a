"""Splits and classes as the source gives them: nothing is moved, no label shifts, leaks are counted."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import UserError
from data_pipeline import pack as pack_module
from data_pipeline.audit import audit
from data_pipeline.config import DataConfig, SourceConfig, SplitConfig
from data_pipeline.pack import pack
from tests.raw import digests, pack_quietly, pattern, sample_members, save, table_source, write_csv, write_tar

SPLITS = ("train", "val", "test")


def with_splits(folder, rows, **settings):
    """A table source of (label, group, split, seed of the picture) rows."""
    names = []
    for number, (_, _, _, seed) in enumerate(rows):
        names.append(f"img_{number:04d}")
        save(folder / f"{names[-1]}.jpg", pattern(seed), quality=90)
    table = [(name, label, group, split) for name, (label, group, split, _) in zip(names, rows, strict=True)]
    write_csv(folder / "labels.csv", ["image", "label", "group", "split"], table)
    columns = {"group_column": "group", "split_column": "split"}
    return SourceConfig(path=str(folder), labels="labels.csv", **columns, **settings)


def plain_rows(counts):
    """`counts`: split -> class -> samples; every sample a patient and a picture of its own."""
    rows = []
    for split, by_class in counts.items():
        for label, number in by_class.items():
            rows += [(label, f"p{len(rows) + i}", split, len(rows) + i) for i in range(number)]
    return rows


FULL = {"train": {"a": 8, "b": 6, "c": 4}, "val": {"a": 3, "b": 2, "c": 1}, "test": {"a": 2, "b": 2, "c": 2}}


def told(monkeypatch):
    """What is printed while packing."""
    console = Console(file=io.StringIO(), width=300)
    monkeypatch.setattr(pack_module, "console", console)
    return console.file


def test_given_splits_are_kept_sample_by_sample(tmp_path):
    rows = plain_rows(FULL)
    dataset = pack_quietly(with_splits(tmp_path / "raw", rows), DataConfig(), tmp_path / "d")
    assert dataset.made["given_splits"] == list(SPLITS)
    for split in SPLITS:
        index = dataset.index(split)
        numbers = [int(key[-4:]) for key in index.key]
        assert [rows[number][2] for number in numbers] == [split] * len(numbers)
        assert [rows[number][0] for number in numbers] == [dataset.classes[label] for label in index.label]
        assert [rows[number][1] for number in numbers] == index.group.tolist()
    assert sum(len(dataset.index(split)) for split in SPLITS) == len(rows)


def test_the_seed_shuffles_and_moves_nothing(tmp_path):
    source = with_splits(tmp_path / "raw", plain_rows(FULL))
    one = pack_quietly(source, DataConfig(), tmp_path / "one", seed=1)
    two = pack_quietly(source, DataConfig(), tmp_path / "two", seed=2)
    for split in SPLITS:
        assert sorted(one.index(split).key) == sorted(two.index(split).key)
    assert one.index("train").key.tolist() != two.index("train").key.tolist()


@pytest.mark.parametrize("missing", ["val", "test"])
def test_a_split_that_is_not_given_is_cut_from_training(tmp_path, missing):
    counts = {"train": {"a": 20, "b": 12}, **{split: {"a": 3, "b": 2} for split in ("val", "test") if split != missing}}
    rows = plain_rows(counts)
    dataset = pack_quietly(with_splits(tmp_path / "raw", rows), DataConfig(), tmp_path / "d")
    assert dataset.made["given_splits"] == [split for split in SPLITS if split != missing]
    assert all(dataset.class_counts(missing) > 0)
    for split in SPLITS:
        allowed = {"train"} if split in ("train", missing) else {split}
        assert {rows[int(key[-4:])][2] for key in dataset.index(split).key} == allowed


@pytest.mark.parametrize("absent", ["val", "test"])
def test_a_class_that_val_or_test_lacks_shifts_no_label_and_is_told(tmp_path, monkeypatch, absent):
    counts = {split: dict(by_class) for split, by_class in FULL.items()}
    del counts[absent]["b"]
    said = told(monkeypatch)
    dataset = pack(with_splits(tmp_path / "raw", plain_rows(counts)), DataConfig(), str(tmp_path / "d"), seed=0)
    assert dataset.classes == ("a", "b", "c")
    for split, by_class in counts.items():
        assert dataset.class_counts(split).tolist() == [by_class.get(name, 0) for name in "abc"]
    assert f"{absent} has no sample of b: its means leave such classes out" in said.getvalue()


def test_a_class_that_train_lacks_is_refused(tmp_path):
    counts = {split: dict(by_class) for split, by_class in FULL.items()}
    del counts["train"]["b"]
    with pytest.raises(UserError, match="class 'b' is in the given test and val and not in train, where it would"):
        pack_quietly(with_splits(tmp_path / "raw", plain_rows(counts)), DataConfig(), tmp_path / "d")


def test_configured_names_pin_the_labels(tmp_path):
    source = with_splits(tmp_path / "raw", plain_rows(FULL), class_names=["c", "a", "b"])
    dataset = pack_quietly(source, DataConfig(), tmp_path / "d")
    assert dataset.classes == ("c", "a", "b")
    assert dataset.class_counts("train").tolist() == [4, 8, 6]


def test_numbers_as_names_keep_their_order_beyond_nine(tmp_path):
    members = [m for i in range(66) for m in sample_members(f"k{i:02d}", i, i % 11)]
    write_tar(tmp_path / "s.tar", members)
    dataset = pack_quietly(SourceConfig(path=str(tmp_path / "s.tar")), DataConfig(), tmp_path / "d")
    assert dataset.classes == tuple(str(number) for number in range(11))
    for split in SPLITS:
        index = dataset.index(split)
        assert index.label.tolist() == [int(key[1:]) % 11 for key in index.key]


def test_leaks_of_given_splits_are_counted_told_and_left(tmp_path, monkeypatch):
    rows = plain_rows(FULL)
    first_test = next(number for number, row in enumerate(rows) if row[2] == "test")
    rows[first_test] = ("a", rows[0][1], "test", rows[first_test][3])  # a patient of train
    rows[first_test + 1] = ("a", "p-new", "test", rows[1][3])  # a picture of train
    source = with_splits(tmp_path / "raw", rows)
    said = told(monkeypatch)
    dataset = pack(source, DataConfig(), str(tmp_path / "d"), seed=0)
    line = "2 of 6 test samples have their group or a near-duplicate in train; given splits are kept, see `rarelens"
    assert line in said.getvalue() and " val samples" not in said.getvalue()
    report = audit(str(tmp_path / "d"))
    found = report.classes[0]
    assert (found.shared_groups["test"], found.shared_duplicates["test"], found.leaked["test"]) == (1, 1, 2)
    assert report.leaked_by_split() == {"val": (0, 6), "test": (2, 6)}
    assert len(dataset.index("test")) == 6
    # The same before packing, from the table itself.
    columns = SourceConfig(group_column="group", split_column="split")
    before = audit(str(tmp_path / "raw" / "labels.csv"), source=columns, progress=False)
    assert before.leaked_by_split() == report.leaked_by_split() and before.classes == report.classes


def test_near_duplicates_of_given_splits_join_no_groups_in_the_index(tmp_path):
    rows = plain_rows(FULL)
    rows[1] = ("a", "p1", "train", rows[0][3])  # within train
    source = with_splits(tmp_path / "raw", rows)
    dataset = pack_quietly(source, DataConfig(), tmp_path / "d")
    assert {"p0", "p1"} <= set(dataset.index("train").group) and dataset.made["joined_groups"] == 0


def test_equal_input_gives_equal_bytes_with_given_splits(tmp_path):
    source = with_splits(tmp_path / "raw", plain_rows(FULL))
    for name in ("one", "two"):
        pack_quietly(source, DataConfig(), tmp_path / name)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_mixed_groups_are_counted_by_patient(tmp_path):
    rows = plain_rows(FULL)
    rows[8] = ("b", rows[0][1], "train", rows[8][3])
    dataset = pack_quietly(with_splits(tmp_path / "raw", rows), DataConfig(), tmp_path / "d")
    assert dataset.made["mixed_groups"] == 1
    groups = np.concatenate([dataset.index(split).group for split in SPLITS])
    assert len(set(groups)) == len(rows) - 1


def test_given_splits_that_leak_are_pooled_and_cut_anew(tmp_path):
    rows = plain_rows(FULL)
    first_test = next(number for number, row in enumerate(rows) if row[2] == "test")
    rows[first_test] = ("a", "p-new", "test", rows[0][3])  # a picture of train
    source = with_splits(tmp_path / "raw", rows)
    dataset = pack_quietly(source, DataConfig(split=SplitConfig(pool_given=True)), tmp_path / "d")
    assert dataset.made["given_splits"] == [] and dataset.made["joined_groups"] == 1
    leaks = audit(str(tmp_path / "d")).leaked_by_split()
    assert {split: leaked for split, (leaked, _) in leaks.items()} == {"val": 0, "test": 0}
    assert sum(len(dataset.index(split)) for split in SPLITS) == len(rows)
    moved = [rows[int(key[-4:])][2] != split for split in SPLITS for key in dataset.index(split).key]
    assert any(moved)


def test_train_is_thinned_to_a_long_tail_and_val_and_test_are_not(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 60, "b": 60, "c": 60})
    whole = pack_quietly(source, DataConfig(), tmp_path / "whole")
    split = SplitConfig(train_imbalance=16)
    thin = pack_quietly(source, DataConfig(split=split), tmp_path / "thin")
    assert whole.class_counts("train").tolist() == [42, 42, 42]
    assert thin.class_counts("train").tolist() == [42, 10, 3] and thin.made["thinned"] == 71
    for name in ("val", "test"):
        assert thin.index(name).key.tolist() == whole.index(name).key.tolist()
    assert set(thin.index("train").key) < set(whole.index("train").key)
    assert thin.mean != whole.mean and sum(shard.samples for shard in thin.shards) == 109
    audit(str(tmp_path / "thin"), verify=True)


def test_a_set_packed_before_a_setting_was_known_has_its_default(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 12, "b": 9})
    pack_quietly(source, DataConfig(), tmp_path / "d")
    described = json.loads((tmp_path / "d" / "dataset.json").read_text())
    del described["made"]["data"]["split"]["train_imbalance"], described["made"]["data"]["split"]["pool_given"]
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(described))
    assert len(pack_quietly(source, DataConfig(), tmp_path / "d").classes) == 2
    thin = DataConfig(split=SplitConfig(train_imbalance=3))
    with pytest.raises(UserError, match=r"was packed with data.split.train_imbalance = null, now 3.0; choose another"):
        pack_quietly(source, thin, tmp_path / "d")


def test_a_packed_dataset_is_a_source_too(tmp_path):
    first = table_source(tmp_path / "raw", {"a": 12, "b": 9, "c": 6})
    dataset = pack(first, DataConfig(), str(tmp_path / "d"), seed=0, progress=False)
    second = SourceConfig(path=str(tmp_path / "d"), group_column="group")
    again = pack(second, DataConfig(), str(tmp_path / "e"), seed=0, progress=False)
    assert again.classes == dataset.classes and again.made["given_splits"] == ["train", "val", "test"]
    for split in ("train", "val", "test"):
        one, other = dataset.index(split), again.index(split)
        assert dict(zip(one.key, one.label, strict=True)) == dict(zip(other.key, other.label, strict=True))
        assert dict(zip(one.key, one.group, strict=True)) == dict(zip(other.key, other.group, strict=True))
