import io
import json

import numpy as np
import pytest
from rich.console import Console

from cluster.errors import UserError
from data_pipeline.audit import audit
from data_pipeline.config import DataConfig, SourceConfig, SplitConfig
from data_pipeline.pack import pack
from tests.raw import medmnist, pattern, sample_members, save, table_source, write_csv, write_tar


def text(report):
    console = Console(width=200, file=io.StringIO())
    console.print(report.to_table())
    return console.file.getvalue()


def test_what_pack_made_has_no_leak(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 20, "b": 12, "c": 8})
    dataset = pack(source, DataConfig(), str(tmp_path / "packed"), seed=0, progress=False)
    report = audit(str(tmp_path / "packed"))
    assert not report.leaks and report.conflicts == 0 and report.unreadable == ()
    counts = {entry.name: entry.samples for entry in report.classes}
    for label, name in enumerate(dataset.classes):
        assert counts[name] == {split: dataset.class_counts(split)[label] for split in ("train", "val", "test")}
        assert report.classes[label].groups["train"] == len(
            set(dataset.index("train").group[dataset.index("train").label == label])
        )
    assert json.loads(json.dumps(report.to_json()))["leaks"] is False
    assert "0 samples with a near-duplicate of another class" in text(report)


def test_damaged_images_of_a_packed_dataset_are_listed(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 20, "b": 12})
    (tmp_path / "raw" / "images" / "img_0003.jpg").write_bytes(b"")
    pack(source, DataConfig(max_damaged=1), str(tmp_path / "packed"), seed=0, progress=False)
    assert audit(str(tmp_path / "packed")).unreadable == (("images/img_0003.jpg", "the file is empty"),)


def test_near_duplicates_across_splits_are_found_when_they_were_not_joined(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 30, "b": 30}, per_group=1)
    for i in range(30):  # of every picture of a, one of b that is almost the same
        save(tmp_path / "raw" / "images" / f"img_{30 + i:04d}.jpg", pattern(i), quality=75)
    packed = DataConfig(split=SplitConfig(near_duplicate_bits=-1))
    dataset = pack(source, packed, str(tmp_path / "packed"), seed=0, progress=False)
    report = audit(str(tmp_path / "packed"))
    train, test = dataset.index("train"), dataset.index("test")
    near = np.bitwise_count(test.phash[:, None] ^ train.phash[None]).min(axis=1) <= 2
    assert report.leaks and near.sum() > 0
    for label, entry in enumerate(report.classes):
        assert entry.leaked["test"] == entry.shared_duplicates["test"] == near[test.label == label].sum()
        assert entry.shared_groups == {"val": 0, "test": 0}
    everything = [dataset.index(split) for split in ("train", "val", "test")]
    phash = np.concatenate([index.phash for index in everything])
    label = np.concatenate([index.label for index in everything])
    contradicted = (np.bitwise_count(phash[:, None] ^ phash[None]) <= 2) & (label[:, None] != label[None])
    assert report.conflicts == contradicted.any(axis=1).sum() > 20
    assert len({frozenset(pair[::2]) for pair in report.first_conflicts}) == len(report.first_conflicts)
    for key_a, label_a, key_b, label_b in report.first_conflicts:
        assert {label_a, label_b} == {"a", "b"} and abs(int(key_a[-4:]) - int(key_b[-4:])) == 30
    assert not audit(str(tmp_path / "packed"), near_duplicate_bits=-1).leaks


def two_lists(tmp_path):
    """A train.csv and a test.csv over one folder: p2 is in both, and t3 shows t0's picture."""
    for i in range(8):
        save(tmp_path / "images" / f"t{i}.png", pattern(0 if i == 6 else i))
    columns = ["file", "dx", "patient"]
    write_csv(tmp_path / "train.csv", columns, [(f"t{i}.png", "ab"[i % 2], f"p{i}") for i in range(4)])
    rows = [("t4.png", "a", "p4"), ("t5.png", "b", "p1"), ("t6.png", "a", "p6"), ("t7.png", "b", "p7")]
    write_csv(tmp_path / "test.csv", columns, rows)
    return SourceConfig(image_column="file", label_column="dx", group_column="patient")


def test_two_lists_share_a_patient_and_a_picture(tmp_path):
    columns = two_lists(tmp_path)
    report = audit(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), columns, progress=False)
    found = {entry.name: entry for entry in report.classes}
    assert report.leaks and report.splits == ("train", "test")
    assert found["a"].samples == {"train": 2, "test": 2} and found["b"].groups == {"train": 2, "test": 2}
    assert found["a"].shared_duplicates == {"test": 1} and found["a"].shared_groups == {"test": 0}
    assert found["b"].shared_groups == {"test": 1} and found["b"].leaked == {"test": 1}
    assert "50.0%" in text(report)
    by_image = columns.model_copy(update={"group_column": None})
    report = audit(
        str(tmp_path / "train.csv"), str(tmp_path / "test.csv"), by_image, near_duplicate_bits=-1, progress=False
    )
    assert not report.leaks


def test_two_class_folders_with_equal_names_and_an_unreadable_file(tmp_path):
    for part, first in (("Training", 0), ("Testing", 100)):
        for i in range(4):
            save(tmp_path / part / "ab"[i % 2] / f"{i}.jpg", pattern(first + i))
    (tmp_path / "Testing" / "a" / "2.jpg").write_bytes(b"no jpeg")
    report = audit(str(tmp_path / "Training"), str(tmp_path / "Testing"), progress=False)
    assert not report.leaks
    assert report.unreadable == ((str(tmp_path / "Testing" / "a" / "2.jpg"), "no image format that is known"),)


def test_two_packed_datasets(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        source = table_source(tmp_path / "raw", {"a": 12, "b": 12})
        pack(source, DataConfig(), str(tmp_path / name), seed, progress=False)
    report = audit(str(tmp_path / "one"), str(tmp_path / "two"))
    assert all(entry.leaked == {"test": 12} and entry.shared_groups == {"test": 12} for entry in report.classes)


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(UserError) as error:
        audit(str(tmp_path / "train.csv"), str(tmp_path / "test.csv"))
    assert str(error.value) == (
        f"{tmp_path}/train.csv: there is no such packed dataset, table of labels, folder or file; give one's path"
    )


def test_conflicts_and_unreadable_files_are_counted_by_class(tmp_path):
    for number, label in enumerate("aaabbb"):
        save(tmp_path / "one" / label / f"{number}.png", pattern(number))
        save(tmp_path / "two" / label / f"{number}.png", pattern(100 + number))
    save(tmp_path / "two" / "b" / "4.png", pattern(0))  # a picture of the other set's a
    (tmp_path / "two" / "a" / "1.png").write_bytes(b"")
    (tmp_path / "one" / "a" / "2.png").write_bytes(b"none")
    report = audit(str(tmp_path / "one"), str(tmp_path / "two"), progress=False)
    found = {entry.name: entry for entry in report.classes}
    assert (found["a"].conflicts, found["b"].conflicts, report.conflicts) == (1, 1, 2)
    assert (found["a"].unreadable, found["b"].unreadable) == (2, 0) and len(report.unreadable) == 2
    assert found["a"].samples == {"train": 2, "test": 2} and found["b"].leaked == {"test": 1}
    values = report.to_json()
    assert values["leaked_share"] == {"test": 1 / 5} and values["clean"] is False
    assert [entry["leaked_share"] for entry in values["classes"]] == [{"test": 0.0}, {"test": 1 / 3}]
    assert [entry["conflicts"] for entry in values["classes"]] == [1, 1]
    assert [entry["unreadable"] for entry in values["classes"]] == [2, 0]
    columns = report.to_table().columns
    assert {column.header: tuple(column.cells) for column in columns} == {
        "class": ("a", "b"),
        "train samples (groups)": ("2 (2)", "3 (3)"),
        "test samples (groups)": ("2 (2)", "3 (3)"),
        "test: group in train": ("0", "0"),
        "near-duplicate in train": ("0", "1"),
        "leaked": ("0.0%", "33.3%"),
        "label conflicts": ("1", "1"),
        "unreadable": ("2", "0"),
    }


def test_clean_means_nothing_at_all(tmp_path):
    for part, first in (("one", 0), ("two", 100)):
        for i in range(4):
            save(tmp_path / part / "ab"[i % 2] / f"{i}.jpg", pattern(first + i))
    assert audit(str(tmp_path / "one"), str(tmp_path / "two"), progress=False).clean
    (tmp_path / "two" / "a" / "2.jpg").write_bytes(b"")
    report = audit(str(tmp_path / "one"), str(tmp_path / "two"), progress=False)
    assert not report.leaks and not report.clean


def test_a_conflict_within_training_is_no_leak_and_yet_not_clean(tmp_path):
    pictures = {"Training/a/0": 0, "Training/b/1": 0, "Training/a/2": 2, "Training/b/3": 3, "Testing/a/4": 4}
    for name, seed in {**pictures, "Testing/b/5": 5}.items():
        save(tmp_path / f"{name}.jpg", pattern(seed))
    report = audit(str(tmp_path), progress=False)
    assert not report.leaks and not report.clean and not report.unreadable
    assert report.conflicts == 2
    assert report.first_conflicts == (("Training/a/0.jpg", "a", "Training/b/1.jpg", "b"),)


def test_a_medmnist_file_is_looked_at_by_its_own_splits(tmp_path):
    arrays = medmnist(tmp_path / "x.npz", {"train": 9, "val": 3, "test": 6})
    arrays["test_images"][4] = arrays["train_images"][1]
    np.savez(tmp_path / "leaks.npz", **arrays)
    assert not audit(str(tmp_path / "x.npz"), progress=False).leaks
    report = audit(str(tmp_path / "leaks.npz"), progress=False)
    assert report.leaked_by_split() == {"val": (0, 3), "test": (1, 6)} and report.splits == ("train", "val", "test")


def test_shards_against_a_table(tmp_path):
    write_tar(tmp_path / "s.tar", [m for i in range(4) for m in sample_members(f"k{i}", i, "ab"[i % 2])])
    for i in range(4):
        save(tmp_path / "images" / f"{i}.jpg", pattern(3 * i), quality=90)
    write_csv(tmp_path / "t.csv", ["image", "label"], [(str(i), "ab"[i % 2]) for i in range(4)])
    columns = SourceConfig(path=str(tmp_path / "images"))
    report = audit(str(tmp_path / "s.tar"), str(tmp_path / "t.csv"), columns, progress=False)
    assert report.leaked_by_split() == {"test": (2, 4)}  # pictures 0 and 3


def test_a_single_set_without_splits(tmp_path):
    for i in range(4):
        save(tmp_path / "ab"[i % 2] / f"{i}.jpg", pattern(i))
    with pytest.raises(UserError) as error:
        audit(str(tmp_path), progress=False)
    assert str(error.value) == (
        f"{tmp_path} is no packed dataset and gives no splits; pack it first, name its column of splits, or give a "
        "training set and a test set"
    )


def test_verify_finds_a_shard_that_was_altered(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 12, "b": 12})
    pack(source, DataConfig(), str(tmp_path / "d"), 0, progress=False)
    shard = tmp_path / "d" / "val" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert not audit(str(tmp_path / "d")).leaks
    with pytest.raises(UserError, match=r"val/000000.tar of the packed dataset .*/d is altered: its SHA-256 is"):
        audit(str(tmp_path / "d"), verify=True)
