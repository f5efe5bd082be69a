"""What cannot be packed: every kind is named with its reason in the quarantine list, and nothing else is lost."""

import json
import os

import pytest

from cluster.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.images import MAX_PIXELS
from data_pipeline.raw import MAX_FILE_BYTES
from tests.raw import encoded, hundred_megapixels, pack_quietly, pattern, table


def wrong_checksum():
    data = bytearray(encoded(pattern(0), "PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    return bytes(data)


DAMAGE = {
    0: (b"", "the file is empty"),
    1: (hundred_megapixels(), f"10000 x 10000 pixels, more than the {MAX_PIXELS} that are read"),
    2: (wrong_checksum(), "broken PNG file (bad header checksum in b'IDAT')"),
    3: (encoded(pattern(0))[:300], "truncated File Read"),
    4: (b"GIF89a no", "no image format that is known"),
}


@pytest.fixture
def source(tmp_path):
    made = table(tmp_path / "raw")
    for number, (data, _) in DAMAGE.items():
        (tmp_path / "raw" / "images" / f"img_{number:04d}.jpg").write_bytes(data)
    folder = tmp_path / "raw" / "images"
    (folder / "img_0005.jpg").unlink()
    (folder / "img_0005.jpg").symlink_to(folder / "nowhere.jpg")
    with open(folder / "img_0006.jpg", "wb") as file:
        os.truncate(file.fileno(), MAX_FILE_BYTES + 1)  # sparse: it takes no room
    return made


def test_every_kind_of_damage_is_listed_with_its_reason(source, tmp_path):
    with pytest.raises(UserError, match=r"7 samples cannot be used, more than data.max_damaged = 6: images/img_0"):
        pack_quietly(source, DataConfig(max_damaged=6), tmp_path / "d")
    stopped = json.loads((tmp_path / "d" / "damaged.json").read_text())
    dataset = pack_quietly(source, DataConfig(max_damaged=7), tmp_path / "d")
    listed = json.loads((tmp_path / "d" / "damaged.json").read_text())
    assert listed == stopped and dataset.made["damaged"] == 7
    reasons = {entry["file"]: entry["reason"] for entry in listed}
    assert list(reasons) == [f"images/img_{number:04d}.jpg" for number in range(7)]
    for number, (_, reason) in DAMAGE.items():
        assert reasons[f"images/img_{number:04d}.jpg"].startswith(reason)
    assert reasons["images/img_0005.jpg"] == "no such file or directory"
    assert reasons["images/img_0006.jpg"] == (
        f"{MAX_FILE_BYTES + 1} bytes, more than the {MAX_FILE_BYTES} that are read of one image"
    )
    assert {(entry["label"], entry["split"]) for entry in listed} == {("common", None)}
    keys = {key for split in ("train", "val", "test") for key in dataset.index(split).key}
    assert keys == {f"images__img_{number:04d}" for number in range(7, 99)}


def test_an_unreadable_file_is_named(tmp_path):
    made = table(tmp_path / "raw")
    unreadable = tmp_path / "raw" / "images" / "img_0003.jpg"
    unreadable.unlink()
    unreadable.symlink_to(unreadable)  # a link to itself: reading fails for root too
    with pytest.raises(UserError, match=r"images/img_0003.jpg \(too many levels of symbolic links\)"):
        pack_quietly(made, DataConfig(), tmp_path / "d")


def test_a_source_of_which_nothing_can_be_used_is_refused(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"no tar")
    with pytest.raises(UserError) as error:
        pack_quietly(SourceConfig(path=str(tmp_path / "s.tar")), DataConfig(max_damaged=9), tmp_path / "d")
    assert str(error.value) == (
        f"source {tmp_path}/s.tar has no sample that can be used; a classifier needs at least two classes"
    )
