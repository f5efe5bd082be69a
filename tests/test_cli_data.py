"""`rarelens pack` and `audit` as a user meets them: options, exit status, what is printed and written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.dataset import open_dataset
from tests.raw import medmnist, pattern, save, table, write_csv

ROOT = Path(__file__).parent.parent


def rarelens(*arguments):
    command = [sys.executable, str(ROOT / "rarelens.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def test_pack_takes_columns_splits_size_and_other_settings(tmp_path):
    rows = []
    for i in range(30):
        save(tmp_path / "raw" / f"{i}.jpg", pattern(i, 64))
        rows.append((str(i), "ab"[i % 2], f"p{i}", ("train", "val", "test")[i % 3]))
    write_csv(tmp_path / "raw" / "meta.csv", ["file", "dx", "patient", "part"], rows)
    options = ["--labels", "meta.csv", "--image-column", "file", "--label-column", "dx", "--group-column", "patient"]
    options += ["--split-column", "part", "--class-names", "b,a", "--size", 32, "--seed", 3]
    done = rarelens("pack", tmp_path / "raw", tmp_path / "d", *options, "data.shard_mib=0.01", "data.name=mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"packed 30 images of 2 classes into {tmp_path / 'd'}\n"
    dataset = open_dataset(str(tmp_path / "d"), verify=True)
    assert (dataset.name, dataset.classes, dataset.made["seed"]) == ("mine", ("b", "a"), 3)
    assert dataset.made["given_splits"] == ["train", "val", "test"] and len(dataset.shards) > 3
    assert set(dataset.index("train").width) == {32}
    again = rarelens("pack", tmp_path / "raw", tmp_path / "d", *options, "data.shard_mib=0.01", "data.name=mine")
    assert again.returncode == 0 and again.stdout == done.stdout


def test_a_medmnist_file_with_a_file_of_names(tmp_path):
    medmnist(tmp_path / "x.npz", {"train": 9, "val": 6, "test": 6})
    (tmp_path / "names.txt").write_text("basal cell\nnevus\nmelanoma\n\n")
    done = rarelens("pack", tmp_path / "x.npz", tmp_path / "d", "--class-names", tmp_path / "names.txt")
    assert done.returncode == 0, done.stderr
    assert open_dataset(str(tmp_path / "d")).classes == ("basal cell", "nevus", "melanoma")
    audited = rarelens("audit", tmp_path / "d", "--verify", "--strict", "--json", tmp_path / "a.json")
    assert audited.returncode == 0, audited.stderr
    assert json.loads((tmp_path / "a.json").read_text())["clean"] is True


def test_what_is_left_out_is_status_1_and_too_much_of_it_2(tmp_path):
    source = table(tmp_path / "raw")
    (tmp_path / "raw" / "images" / "img_0003.jpg").write_bytes(b"")
    options = ["pack", source.path, tmp_path / "d", "--labels", "labels.csv"]
    refused = rarelens(*options)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()[-1]) > 0
    assert refused.stderr.strip().splitlines()[-1] == (
        "error: 1 sample cannot be used, more than data.max_damaged = 0: images/img_0003.jpg (the file is empty); mend "
        f"or remove them (all are in {tmp_path / 'd'}/damaged.json), or raise data.max_damaged"
    )
    done = rarelens(*options, "data.max_damaged=1")
    assert done.returncode == 1
    assert f"left out: 1 sample, see damaged.json in {tmp_path / 'd'}" in " ".join(done.stderr.split())
    assert "packed 98 images of 4 classes" in done.stdout
    # Such a dataset audits well, unless nothing at all may be wrong.
    assert rarelens("audit", tmp_path / "d").returncode == 0
    assert rarelens("audit", tmp_path / "d", "--strict").returncode == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pack", "nowhere", "OUT"], "error: source.path = nowhere: there is no such folder; give the folder with the"),
        (
            ["pack", "nowhere", "OUT", "data.shard_mb=3"],
            "error: pack: unknown key 'data.shard_mb'; did you mean 'shard_mib'?",
        ),
        (
            ["pack", "nowhere", "OUT", "--class-names", "a"],
            "error: pack: source.class_names: names must be two or",
        ),
        (["pack", "nowhere", "OUT", "--size", "4"], "error: pack: data.pack_px = 4 must be greater than or equal"),
        (
            ["audit", "nowhere"],
            "error: nowhere: there is no such packed dataset, table of labels, folder or file",
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, message):
    done = rarelens(*[argument.replace("OUT", str(tmp_path / "d")) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith(message) and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_leaks_between_two_tables_are_status_1_with_the_findings_as_json(tmp_path):
    for i in range(8):
        save(tmp_path / f"{i}.jpg", pattern(i))
    columns = ["image", "label", "patient"]
    write_csv(tmp_path / "train.csv", columns, [(f"{i}.jpg", "ab"[i % 2], f"p{i}") for i in range(4)])
    write_csv(tmp_path / "test.csv", columns, [(f"{i}.jpg", "ab"[i % 2], f"p{i % 5}") for i in range(4, 8)])
    tables = [tmp_path / "train.csv", tmp_path / "test.csv"]
    assert rarelens("audit", *tables).returncode == 0
    done = rarelens("audit", *tables, "--group-column", "patient", "--json", tmp_path / "a.json")
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["leaks"] and found["leaked_share"] == {"test": 0.75}
    assert [entry["shared_groups"] for entry in found["classes"]] == [{"test": 1}, {"test": 2}]
    assert "group in train" in done.stderr and "66.7%" not in done.stderr and "100.0%" in done.stderr
