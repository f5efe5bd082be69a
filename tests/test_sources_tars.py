import json
import re
import tarfile
from pathlib import Path

import pytest
import webdataset

from cluster.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.pack import pack
from data_pipeline.sources import class_order, read_source
from tests.raw import encoded, pattern, sample_members, write_tar

JPEG = encoded(pattern(0))
NO_LABEL_VALUE = ".json label is neither a name nor a whole number"


def source(path, **settings):
    return SourceConfig(path=str(path), **settings)


def shard(path, samples):
    """A shard of (key, label) samples."""
    return write_tar(
        path, [member for i, (key, label) in enumerate(samples) for member in sample_members(key, i, label)]
    )


def problems(path, **settings):
    """What is wrong with what, in a shard that has two good samples as well."""
    return {sample.name: sample.problem for sample in read_source(source(path, **settings)) if sample.problem}


def with_good(path, members, **header):
    return write_tar(path, [*sample_members("good_a", 1, "a"), *sample_members("good_b", 2, "b"), *members], **header)


# ---- what is read


def test_a_sample_is_its_image_member_byte_for_byte(tmp_path):
    members = [*sample_members("x/one", 1, "mel"), *sample_members("two", 2, "nv", suffix="png")]
    write_tar(tmp_path / "s.tar", members)
    samples = {sample.key: sample for sample in read_source(source(tmp_path / "s.tar"))}
    assert sorted(samples) == ["two", "x__one"]
    assert (samples["x__one"].name, samples["x__one"].label) == ("s.tar/x/one.jpg", "mel")
    assert samples["x__one"].place.read() == members[0][1] and samples["two"].place.read() == members[2][1]
    assert samples["two"].group == "s.tar/two.png" and samples["two"].split is None


@pytest.mark.parametrize("pattern_", ["s-{0000..0002}.tar", "s-*.tar", "s-000[0-2].tar", ""])
def test_braces_wildcards_and_folders_mean_the_same_shards(tmp_path, pattern_):
    for number in range(3):
        shard(tmp_path / f"s-000{number}.tar", [(f"{number}_{i}", "ab"[i % 2]) for i in range(4)])
    samples = read_source(source(tmp_path / pattern_))
    assert [sample.key for sample in samples] == [f"{number}_{i}" for number in range(3) for i in range(4)]


def test_shards_that_webdataset_itself_wrote(tmp_path):
    images = [encoded(pattern(number)) for number in range(7)]
    with webdataset.ShardWriter(str(tmp_path / "set-%03d.tar"), maxcount=3, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"p/{number}", "jpg": image, "cls": number % 3, "json": {"patient": f"P{number}"}})
    samples = read_source(source(tmp_path / "set-{000..002}.tar", group_column="patient"))
    assert [(sample.key, sample.label, sample.group) for sample in samples] == [
        (f"p__{number}", str(number % 3), f"P{number}") for number in range(7)
    ]
    assert [sample.place.read() for sample in samples] == images


def test_json_names_label_group_and_split(tmp_path):
    def described(key, seed, **values):
        return [(f"{key}.jpg", encoded(pattern(seed))), (f"{key}.json", json.dumps(values).encode())]

    members = [
        *described("k1", 1, dx="mel", patient="P1", part="train"),
        *described("k2", 2, dx=3, patient=7, part="Valid"),
    ]
    write_tar(tmp_path / "s.tar", members)
    columns = {"label_column": "dx", "group_column": "patient", "split_column": "part"}
    found = [(s.key, s.label, s.group, s.split) for s in read_source(source(tmp_path / "s.tar", **columns))]
    assert found == [("k1", "mel", "P1", "train"), ("k2", "3", "7", "val")]


def test_a_name_in_json_goes_before_a_number_in_cls(tmp_path):
    members = []
    for number, name in enumerate(["nv", "mel"]):
        members += [
            *sample_members(f"k{number}", number, number),
            (f"k{number}.json", json.dumps({"label": name}).encode()),
        ]
    write_tar(tmp_path / "s.tar", members)
    assert [sample.label for sample in read_source(source(tmp_path / "s.tar"))] == ["nv", "mel"]


@pytest.mark.parametrize("name", ["{}-0000.tar", "{}/0000.tar", "{}_a.tar", "{}.tar"])
def test_splits_of_shard_names_are_kept(tmp_path, name):
    for split, first in (("train", 0), ("val", 20), ("test", 40)):
        shard(tmp_path / name.format(split), [(f"{split}{i}", "ab"[i % 2]) for i in range(first, first + 6)])
    samples = read_source(source(tmp_path))
    assert len(samples) == 18
    assert all(sample.key.startswith(str(sample.split)) for sample in samples)


def test_names_that_only_begin_alike_are_no_splits(tmp_path):
    shard(tmp_path / "testimony.tar", [("a", "x"), ("b", "y")])
    assert {sample.split for sample in read_source(source(tmp_path / "testimony.tar"))} == {None}


def test_shards_of_which_some_name_a_split_are_refused(tmp_path):
    shard(tmp_path / "train-0.tar", [("a", "x"), ("b", "y")])
    shard(tmp_path / "extra-0.tar", [("c", "x")])
    with pytest.raises(UserError) as error:
        read_source(source(tmp_path))
    assert str(error.value) == (
        f"source.path = {tmp_path}: some shards' names begin with train, val or test and 1 other not (extra-0.tar); "
        "rename them, or name a JSON field as source.split_column"
    )


def test_numbers_with_names_keep_their_order(tmp_path):
    shard(tmp_path / "s.tar", [("p", 2), ("q", 0), ("r", 1)])
    named = source(tmp_path / "s.tar", class_names=["zebra", "ape", "mole"])
    samples = read_source(named)
    assert {sample.key: sample.label for sample in samples} == {"p": "mole", "q": "zebra", "r": "ape"}
    assert class_order(samples, named.class_names) == ("zebra", "ape", "mole")


def test_equal_keys_in_two_shards_are_told_apart(tmp_path):
    shard(tmp_path / "s-0.tar", [("000", "a"), ("001", "b")])
    shard(tmp_path / "s-1.tar", [("000", "a"), ("002", "b")])
    samples = read_source(source(tmp_path / "s-{0..1}.tar"))
    keys = {sample.name: sample.key for sample in samples}
    assert keys["s-0.tar/001.jpg"] == "001" and len(set(keys.values())) == 4
    assert re.fullmatch(r"000~[0-9a-f]{12}", keys["s-1.tar/000.jpg"])


def test_other_members_hidden_files_and_folders_are_passed_over(tmp_path):
    members = [("README", b"text"), ("._good_a.jpg", b"fork"), ("good_a.txt", b"caption"), ("good_a.mask.png", b"mask")]
    with_good(tmp_path / "s.tar", members)
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        tar.addfile(folder := tarfile.TarInfo("folder"))
        folder.type = tarfile.DIRTYPE
    samples = read_source(source(tmp_path / "s.tar"))
    assert {sample.name: sample.problem for sample in samples} == {"s.tar/good_a.jpg": None, "s.tar/good_b.jpg": None}


# ---- bad input: each is named with its reason, and the rest is read


@pytest.mark.parametrize(
    "members, name, reason",
    [
        ([("k.jpg", JPEG)], "k.jpg", "no label: neither a .cls nor 'label' in a .json"),
        ([("k.jpg", JPEG), ("k.cls", b" \n")], "k.jpg", "no label: neither a .cls nor 'label' in a .json"),
        ([("k.jpg", JPEG), ("k.json", b'{"labl": "a"}')], "k.jpg", "no label: neither a .cls nor 'label' in a .json"),
        ([("k.cls", b"a")], "k", "no image"),
        ([("k.gif", JPEG), ("k.cls", b"a")], "k", "no image"),
        (
            [("k.left.jpg", JPEG), ("k.right.jpg", JPEG), ("k.cls", b"a")],
            "k.left.jpg",
            "several images (left.jpg, right.jpg), which one is meant is not said",
        ),
        ([("k.jpg", JPEG), ("k.cls", b"\xff")], "k.jpg", ".cls is neither a number nor a name in UTF-8"),
        ([("k.jpg", JPEG), ("k.json", b"{")], "k.jpg", ".json is no JSON object"),
        ([("k.jpg", JPEG), ("k.json", b"[1]")], "k.jpg", ".json is no JSON object"),
        ([("k.jpg", JPEG), ("k.json", b"[" * 100_000)], "k.jpg", ".json is no JSON object"),
        ([("k.jpg", JPEG), ("k.json", b'{"label": 1.5}')], "k.jpg", ".json label is neither a name nor a whole number"),
        (
            [("k.jpg", JPEG), ("k.json", b'{"label": true}')],
            "k.jpg",
            ".json label is neither a name nor a whole number",
        ),
        ([("k.jpg", JPEG), ("k.cls", b"1"), ("k.json", b'{"label": 2}')], "k.jpg", ".cls says 1 and .json label = 2"),
        ([("k.jpg", JPEG), ("k.cls", b"a"), ("k.json", b'{"label": "b"}')], "k.jpg", ".cls says a and .json label = b"),
        (
            [("k.jpg", JPEG), ("k.cls", bytes(2**20 + 1))],
            "k.jpg",
            ".cls has 1048577 bytes, more than the 1048576 of any label",
        ),
        (
            [("k.jpg", JPEG), ("k.cls", b"a"), ("k.jpg", JPEG)],
            "k.jpg",
            "duplicate key: k.jpg is there more than once",
        ),
        (
            [("k.jpg", JPEG), ("k.cls", b"a"), ("./k.cls", b"b")],
            "k.jpg",
            "duplicate key: k.cls is there more than once",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_named(tmp_path, members, name, reason):
    with_good(tmp_path / "s.tar", members)
    assert problems(tmp_path / "s.tar") == {f"s.tar/{name}": reason}


@pytest.mark.parametrize("label", ["3", "-1"])
def test_a_label_out_of_range_is_named(tmp_path, label):
    with_good(tmp_path / "s.tar", sample_members("k", 3, label))
    assert problems(tmp_path / "s.tar", class_names=["a", "b", "c"]) == {
        "s.tar/k.jpg": f"label {label} is out of range: source.class_names has 3 names"
    }


@pytest.mark.parametrize("name", ["../../k.jpg", "/etc/k.jpg", "x/../../k.jpg", "x\\..\\k.jpg"])
def test_names_that_lead_out_of_the_shard_are_quarantined_and_touch_nothing(tmp_path, name):
    with_good(tmp_path / "in" / "deep" / "s.tar", [(name, JPEG), (name.replace("jpg", "cls"), b"a")])
    before = sorted(tmp_path.rglob("*"))
    told = "the member's name leads out of the shard"
    assert problems(tmp_path / "in" / "deep" / "s.tar") == {
        f"s.tar/{name}": told,
        f"s.tar/{name.replace('jpg', 'cls')}": told,
    }
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_special_files_are_quarantined(tmp_path, kind):
    with_good(tmp_path / "s.tar", [])
    with tarfile.open(tmp_path / "s.tar", "a") as tar:
        info = tarfile.TarInfo("k.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert problems(tmp_path / "s.tar") == {"s.tar/k": ".jpg is a link or special file, not an image or label"}


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def test_a_truncated_shard_is_named_and_what_stands_before_is_read(tmp_path):
    path = with_good(tmp_path / "s.tar", sample_members("k", 3, "a"))
    with tarfile.open(path) as tar:
        last = tar.getmember("k.jpg")
    cut(path, last.offset_data + last.size // 2)
    found = problems(path)
    assert found == {"s.tar": "corrupt tar: unexpected end of data", "s.tar/k.jpg": found["s.tar/k.jpg"]}
    cut(path, last.offset)  # exactly between two members, where tarfile sees no damage
    assert problems(path) == {"s.tar": f"corrupt tar: it ends at byte {last.offset} without an end mark"}


def test_a_broken_header_in_the_middle_is_named(tmp_path):
    path = with_good(tmp_path / "s.tar", [*sample_members("k", 3, "a"), *sample_members("l", 4, "b")])
    with tarfile.open(path) as tar:
        broken = tar.getmember("k.jpg").offset
    content = bytearray(path.read_bytes())
    content[broken : broken + 100] = b"\x07" * 100
    path.write_bytes(content)
    assert problems(path) == {"s.tar": f"corrupt tar: no header at byte {broken}"}
    assert [sample.key for sample in read_source(source(path)) if not sample.problem] == ["good_a", "good_b"]


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"x" * 5000])
def test_a_file_that_is_no_tar_is_named_among_good_ones(tmp_path, content):
    shard(tmp_path / "s-0.tar", [("a", "x"), ("b", "y")])
    (tmp_path / "s-1.tar").write_bytes(content)
    found = problems(tmp_path)
    assert list(found) == ["s-1.tar"] and found["s-1.tar"].startswith("corrupt tar: ")


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("k.jpg"))
    with pytest.raises(UserError, match=r"s.tar is compressed, and its members cannot be read in place; unpack"):
        read_source(source(tmp_path / "s.tar"))


@pytest.mark.parametrize(
    "path, message",
    [
        ("s-{0..2}.tar", "source.path = {root}/s-{{0..2}}.tar: 2 shards not there ({root}/s-1.tar, {root}/s-2.tar)"),
        ("t-*.tar", "source.path = {root}/t-*.tar: no shard matches; give a .tar, a folder of them or a pattern"),
        ("t.tar", "source.path = {root}/t.tar: 1 shard not there ({root}/t.tar); correct the pattern"),
        ("s-{0..2.tar", "source.path = {root}/s-{{0..2.tar: its braces are unbalanced; write e.g. train-{{000..009}}"),
    ],
)
def test_patterns_that_find_nothing(tmp_path, path, message):
    shard(tmp_path / "s-0.tar", [("a", "x"), ("b", "y")])
    with pytest.raises(UserError) as error:
        read_source(source(tmp_path / path))
    assert str(error.value).startswith(message.format(root=tmp_path))


def test_a_bucket_is_no_source():
    with pytest.raises(UserError, match=r"source.path = s3://b/x.tar: images are read from local disks; copy them to"):
        read_source(source("s3://b/x.tar"))


def test_quarantined_members_are_listed_and_counted_by_pack(tmp_path):
    good = [member for i in range(12) for member in sample_members(f"g{i}", i, "ab"[i % 2])]
    path = write_tar(tmp_path / "s.tar", [*good, ("k.jpg", JPEG), *sample_members("cut", 99, "a")])
    with tarfile.open(path) as tar:
        last = tar.getmember("cut.jpg")
    cut(path, last.offset_data + 10)
    with pytest.raises(UserError, match=r"3 samples cannot be used, more than .* = 0: s.tar \(corrupt tar"):
        pack(source(path), DataConfig(), str(tmp_path / "d"), seed=0, progress=False)
    stopped = json.loads((tmp_path / "d" / "damaged.json").read_text())
    dataset = pack(source(path), DataConfig(max_damaged=3), str(tmp_path / "d"), seed=0, progress=False)
    assert json.loads((tmp_path / "d" / "damaged.json").read_text()) == stopped
    assert {entry["file"]: entry["reason"] for entry in stopped} == {
        "s.tar": "corrupt tar: unexpected end of data",
        "s.tar/cut.jpg": "no label: neither a .cls nor 'label' in a .json",
        "s.tar/k.jpg": "no label: neither a .cls nor 'label' in a .json",
    }
    assert dataset.made["damaged"] == 3 and sum(len(dataset.index(split)) for split in ("train", "val", "test")) == 12
