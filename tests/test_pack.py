import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from rich.console import Console

from cluster.errors import UserError
from data_pipeline.audit import audit
from data_pipeline.config import DataConfig, SourceConfig, SplitConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.pack import pack
from tests.raw import SMALL_SHARDS, digests, pack_quietly, pattern, save, table, table_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return table(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    return pack_quietly(source, SMALL_SHARDS, tmp_path_factory.mktemp("packed") / "d")


def members(dataset, shard):
    with tarfile.open(fileobj=io.BytesIO(dataset.storage.read(shard.path))) as tar:
        return {info.name: (info, tar.extractfile(info).read()) for info in tar}


def test_every_image_is_in_one_shard_byte_for_byte(source, packed):
    stored = {name: data for shard in packed.shards for name, (_, data) in members(packed, shard).items()}
    assert len(stored) == 3 * 99
    for path in Path(source.path, "images").iterdir():
        key = f"images__{path.stem}"
        assert stored[f"{key}.jpg"] == path.read_bytes()
        meta = json.loads(stored[f"{key}.json"])
        assert meta["file"] == f"images/{path.name}" and (meta["width"], meta["height"]) == (24, 24)
        assert packed.classes[int(stored[f"{key}.cls"])] == meta["label"]
        assert meta["group"].startswith(meta["label"])


def test_the_index_gives_the_bytes_of_each_image(source, packed):
    for split in ("train", "val", "test"):
        index = packed.index(split)
        for row in range(len(index)):
            path = packed.shards[index.shard[row]].path
            data = packed.storage.read_range(path, int(index.offset[row]), int(index.length[row]))
            name = index.key[row].replace("__", "/")
            assert data == Path(source.path, f"{name}.jpg").read_bytes()
            assert Image.open(io.BytesIO(data)).size == (index.width[row], index.height[row])
            assert index.group[row].startswith(packed.classes[index.label[row]])


def test_webdataset_reads_it(packed):
    urls = [str(Path(packed.uri, shard.path)) for shard in packed.shards if shard.split == "train"]
    read = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls", "json")
    samples = {key: (image, label, meta) for key, image, label, meta in read}
    index = packed.index("train")
    assert sorted(samples) == sorted(index.key)
    for key, label in zip(index.key, index.label, strict=True):
        image, cls, meta = samples[key]
        assert cls == label and packed.classes[cls] == meta["label"] and image.size == (24, 24)


def test_shards_are_named_sized_and_counted(packed):
    found: dict[str, list[str]] = {}
    for shard in packed.shards:
        found.setdefault(f"{shard.split} {shard.kind}", []).append(shard.path)
    assert list(found) == ["train body", "train tail", "val whole", "test whole"]
    for paths, prefix in zip(found.values(), ("train/body-", "train/tail-", "val/", "test/"), strict=True):
        assert paths == [f"{prefix}{number:06d}.tar" for number in range(len(paths))]
    assert len(found["train body"]) > 1 and len(found["train tail"]) > 1
    for shard in packed.shards:
        content = members(packed, shard)
        assert len(content) == 3 * shard.samples
        assert shard.bytes == Path(packed.uri, shard.path).stat().st_size <= 0.05 * 2**20 + 1024
        assert all((i.mtime, i.uid, i.gid, i.uname, i.mode) == (0, 0, 0, "", 0o644) for i, _ in content.values())


def test_the_tail_is_the_rarest_classes_that_fit_whole(packed):
    index = packed.index("train")
    kind = np.array([packed.shards[shard].kind for shard in index.shard])
    in_tail = {packed.classes[label] for label in index.label[kind == "tail"]}
    assert in_tail == {"rare", "rarest", "middle"}
    assert set(packed.classes) - in_tail == {packed.classes[label] for label in index.label[kind == "body"]}
    bytes_of = {name: index.length[index.label == label].sum() for label, name in enumerate(packed.classes)}
    assert sum(bytes_of[name] for name in in_tail) <= 0.04 * 2**20 < sum(bytes_of.values())


def test_a_small_set_is_all_tail_and_no_budget_is_no_tail(source, tmp_path):
    everything = pack_quietly(source, DataConfig(), tmp_path / "all")
    assert [s.path for s in everything.shards] == ["train/tail-000000.tar", "val/000000.tar", "test/000000.tar"]
    nothing = pack_quietly(source, DataConfig(tail_budget_mib=0), tmp_path / "none")
    assert [s.path for s in nothing.shards] == ["train/body-000000.tar", "val/000000.tar", "test/000000.tar"]


def test_the_body_is_shuffled_by_the_seed(source, packed, tmp_path):
    data = DataConfig(tail_budget_mib=0)
    first = pack_quietly(source, data, tmp_path / "0", seed=0).index("train")
    labels = first.label[first.label < 2]
    assert (np.diff(labels) != 0).sum() > 10
    other = pack_quietly(source, data, tmp_path / "1", seed=1).index("train")
    assert set(first.key) != set(other.key)


def test_mean_and_std_are_those_of_the_training_pixels(packed):
    index = packed.index("train")
    pixels = [
        np.asarray(
            Image.open(io.BytesIO(packed.storage.read_range(packed.shards[s].path, int(o), int(n)))).convert("RGB")
        )
        for s, o, n in zip(index.shard, index.offset, index.length, strict=True)
    ]
    pixels = np.concatenate([image.reshape(-1, 3) for image in pixels]) / 255  # all of one size: images weigh the same
    np.testing.assert_allclose(packed.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(packed.std, pixels.std(axis=0), atol=1e-6)


def test_made_says_how(source, packed):
    assert packed.made["seed"] == 0 and packed.made["source"] == source.model_dump()
    assert packed.made["data"]["split"]["train"] == 0.7 and packed.made["data"]["shard_mib"] == 0.05
    assert packed.made["software"].startswith("rarelens ")
    assert (packed.made["damaged"], packed.made["joined_groups"], packed.made["mixed_groups"]) == (0, 0, 0)
    assert not Path(packed.uri, "packing").exists()


def test_equal_input_gives_equal_bytes(source, packed, tmp_path):
    pack_quietly(source, SMALL_SHARDS, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(Path(packed.uri))


def test_near_duplicates_join_a_group_and_mixed_groups_are_counted(tmp_path):
    source = table(tmp_path / "raw")
    for i in range(4):  # four pictures of the rare class under other patients, once more in the common one
        save(tmp_path / "raw" / "images" / f"img_{i * 8:04d}.jpg", pattern(84 + i * 2), quality=90)
    dataset = pack_quietly(source, DataConfig(), tmp_path / "d")
    assert dataset.made["joined_groups"] == dataset.made["mixed_groups"] == 4
    split_of = {key: split for split in ("train", "val", "test") for key in dataset.index(split).key}
    for i in range(4):
        assert split_of[f"images__img_{i * 8:04d}"] == split_of[f"images__img_{84 + i * 2:04d}"]
    apart = DataConfig(split=SplitConfig(near_duplicate_bits=-1))
    assert pack_quietly(source, apart, tmp_path / "apart").made["joined_groups"] == 0


def test_images_are_shrunk_and_converted_at_packing(tmp_path):
    for i in range(24):
        suffix = ("jpg", "png", "webp", "tif")[i % 4]
        save(tmp_path / "raw" / "ab"[i % 2] / f"{i}.{suffix}", pattern(i, 20 + 2 * i))
    source = SourceConfig(path=str(tmp_path / "raw"))
    dataset = pack_quietly(source, DataConfig(pack_px=32), tmp_path / "small")
    for split in ("train", "val", "test"):
        index = dataset.index(split)
        sides = {key: 20 + 2 * int(key.rpartition("_")[2]) for key in index.key}
        assert index.width.tolist() == index.height.tolist() == [min(sides[key], 32) for key in index.key]
    names = {name for shard in dataset.shards for name in members(dataset, shard)}
    assert {"a__0.jpg", "b__1.png", "a__2.png", "b__3.png", "a__22.jpg", "b__23.jpg"} <= names
    suffixes = {name.partition(".")[2] for shard in dataset.shards for name in members(dataset, shard)}
    assert suffixes == {"jpg", "png", "cls", "json"}


def test_packing_into_a_bucket_gives_the_same_bytes(source, packed, moto_s3):
    dataset = pack_quietly(source, SMALL_SHARDS, f"{moto_s3}/packed/set")
    local = {path: Path(packed.uri, path).read_bytes() for path in digests(Path(packed.uri))}
    assert {stored.path: dataset.storage.read(stored.path) for stored in dataset.storage.list()} == local
    assert len(open_dataset(f"{moto_s3}/packed/set", verify=True).index("train")) == len(packed.index("train"))
    assert audit(f"{moto_s3}/packed/set", verify=True).clean


@pytest.mark.parametrize("is_terminal", [True, False])
def test_packing_shows_how_far_it_is(source, tmp_path, monkeypatch, is_terminal):
    shown = io.StringIO()
    monkeypatch.setattr("cluster.progress.console", Console(file=shown, force_terminal=is_terminal, width=120))
    pack(source, DataConfig(), str(tmp_path / "d"), seed=0)
    for title in ("reading images", "writing shards"):
        assert re.search(rf"{title}\W.*99/99", shown.getvalue())


# ---- bad input


def test_damaged_images_stop_the_packing_and_then_are_listed(tmp_path):
    source = table(tmp_path / "raw")
    images = tmp_path / "raw" / "images"
    (images / "img_0005.jpg").write_bytes((images / "img_0005.jpg").read_bytes()[:300])
    (images / "img_0009.jpg").write_bytes(b"")
    with pytest.raises(UserError) as error:
        pack_quietly(source, DataConfig(max_damaged=1), tmp_path / "d")
    assert re.fullmatch(
        r"2 samples cannot be used, more than data.max_damaged = 1: images/img_0005.jpg \(.+\), "
        r"images/img_0009.jpg \(the file is empty\); mend or remove them \(all are in .+/d/damaged.json\), or raise "
        r"data.max_damaged",
        str(error.value),
    )
    dataset = pack_quietly(source, DataConfig(max_damaged=2), tmp_path / "d")
    listed = json.loads((tmp_path / "d" / "damaged.json").read_text())
    assert [entry["file"] for entry in listed] == ["images/img_0005.jpg", "images/img_0009.jpg"]
    assert listed[1] == {
        "key": "images__img_0009",
        "file": "images/img_0009.jpg",
        "label": "common",
        "split": None,
        "reason": "the file is empty",
    }
    assert dataset.made["damaged"] == 2 and sum(len(dataset.index(s)) for s in ("train", "val", "test")) == 97


def test_mended_images_are_read_again_and_the_rest_is_not(tmp_path):
    source = table(tmp_path / "raw")
    broken = tmp_path / "raw" / "images" / "img_0005.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=r"1 sample cannot be used, more than data.max_damaged = 0: images/img_0005"):
        pack_quietly(source, SMALL_SHARDS, tmp_path / "d")
    notes = sorted((tmp_path / "d" / "packing").iterdir())
    known = {note["name"] for path in notes for note in json.loads(path.read_text()) if note["damage"] is None}
    assert len(known) == 98
    broken.write_bytes(whole)
    pack_quietly(source, SMALL_SHARDS, tmp_path / "d")
    pack_quietly(source, SMALL_SHARDS, tmp_path / "straight")
    assert digests(tmp_path / "d") == digests(tmp_path / "straight")


def test_a_class_without_a_readable_image_is_named(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 8, "b": 3})
    for i in range(8, 11):
        (tmp_path / "raw" / "images" / f"img_{i:04d}.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match="class 'b' has no image that can be read; mend its images or leave the class out"
    ):
        pack_quietly(source, DataConfig(max_damaged=5), tmp_path / "d")


def test_a_class_with_fewer_groups_than_splits(tmp_path):
    source = table_source(tmp_path / "raw", {"a": 8, "b": 4})
    with pytest.raises(
        UserError, match=r"too few groups .* to split: class 'b' has 2, and each of train, val and test"
    ):
        pack_quietly(source, DataConfig(), tmp_path / "d")
