"""Which images are meant by files, folders and patterns, on disk and in a bucket, and how they are read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UserError
from cluster.storage import open_storage
from data_pipeline.graph import ImageSettings
from data_pipeline.images import DamagedImage, decodable, prepare_image
from data_pipeline.loose_images import ImageReader, find_images
from data_pipeline.passes import decode_files
from tests.packed import drawn_jpeg
from tests.raw import encoded, pattern

TREE = ("0.png", "1.png", "3.PNG", "deep/er/4.JPG", "deep/5.png", "deep/._5.png", "notes.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("images") / "tree"
    for number, name in enumerate(TREE):
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn_jpeg(number))
    return made


@pytest.fixture(scope="module")
def bucket(folder, moto_s3):
    """The same tree in a bucket."""
    storage = open_storage(f"{moto_s3}/loose/tree")
    for name in TREE:
        storage.upload(folder / name, name)
    return storage.uri


@pytest.mark.parametrize("place", ["folder", "bucket", "file uri"])
@pytest.mark.parametrize(
    "given, found",
    [
        ([""], ["0.png", "1.png", "3.PNG", "deep/5.png", "deep/er/4.JPG"]),
        (["/deep"], ["deep/5.png", "deep/er/4.JPG"]),
        (["/deep/er/"], ["deep/er/4.JPG"]),
        (["/*.png"], ["0.png", "1.png"]),
        (["/[01].png", "/0.png"], ["0.png", "1.png"]),
        (["/**/*.png"], ["0.png", "1.png", "deep/5.png"]),
        (["/deep/*/*"], ["deep/er/4.JPG"]),
        (["/1.png", "/*.png"], ["1.png", "0.png"]),
        (["/notes.txt"], ["notes.txt"]),
    ],
)
def test_each_image_once_and_those_of_each_in_order(folder, place, given, found, request):
    root = {"folder": str(folder), "file uri": f"file://{folder}"}.get(place) or request.getfixturevalue("bucket")
    under = root if place == "bucket" else str(folder)
    assert find_images([root + part for part in given]) == [f"{under}/{name}" for name in found]


def test_a_file_is_taken_whatever_it_is_called(tmp_path):
    (tmp_path / "scan[1].dat").write_bytes(b"x")
    assert find_images([str(tmp_path / "scan[1].dat")]) == [str(tmp_path / "scan[1].dat")]


def test_an_object_is_taken_whatever_it_is_called(moto_s3):
    open_storage(f"{moto_s3}/odd").write("scan[1].dat", b"x")
    assert find_images([f"{moto_s3}/odd/scan[1].dat"]) == [f"{moto_s3}/odd/scan[1].dat"]


@pytest.mark.parametrize("place", ["folder", "bucket"])
@pytest.mark.parametrize(
    "given, message",
    [
        ("*.jpg", r"pattern .*\*\.jpg matches no image; images end in"),
        ("notes.txt/*", r"pattern .*notes\.txt/\* matches no image"),
    ],
)
def test_a_pattern_without_images(folder, place, given, message, request):
    root = folder if place == "folder" else request.getfixturevalue("bucket")
    with pytest.raises(UserError, match=message):
        find_images([f"{root}/{given}"])


def test_what_is_not_there(tmp_path, bucket):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"image .*gone\.jpg does not exist; give files, folders or patterns such as"):
        find_images([str(tmp_path / "gone.jpg")])
    with pytest.raises(UserError, match=r"folder .*empty holds no image; images end in \.bmp, \.dcm"):
        find_images([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"folder s3://.*/gone holds no image; images end in"):
        find_images([f"{bucket}/gone"])
    with pytest.raises(UserError, match=r"storage http://\.\.\. is not supported; give a folder or s3://bucket/prefix"):
        find_images(["http://127.0.0.1/a.jpg"])
    with pytest.raises(UserError, match="no image was given"):
        find_images([])


def test_a_bucket_gives_the_batches_that_the_disk_gives(folder, bucket):
    settings = ImageSettings(24, 1.0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    names = [f"{name}" for name in TREE[:5]]
    torn = open_storage(bucket)
    torn.write("torn.jpg", drawn_jpeg(9)[:300])
    remote = list(decode_files([f"{bucket}/{name}" for name in (*names, "torn.jpg")], settings, batch_size=4))
    local = list(decode_files([folder / name for name in names], settings, batch_size=4))
    assert torch.equal(*(torch.cat([batch.images for batch in batches]) for batches in (remote, local)))
    assert [number for batch in remote for number in batch.numbers] == [0, 1, 2, 3, 4]
    assert [number for batch in remote for number, _ in batch.damaged] == [5]


def test_an_object_that_has_gone_ends_the_pass(bucket):
    with pytest.raises(UserError, match=r"s3://.*/tree/gone\.jpg does not exist"):
        list(decode_files([f"{bucket}/gone.jpg"], ImageSettings(24, 1.0, (0.5,) * 3, (0.2,) * 3), batch_size=1))


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with open(tmp_path / "big.jpg", "wb") as file:
        os.truncate(file.fileno(), 2**30 + 1)
    with pytest.raises(OSError, match="more than the 1073741824 that are read of one image"):
        ImageReader()(tmp_path / "big.jpg")


class TestWhatTheDecoderIsGiven:
    """Of `images.decodable`: what `prepare_image` makes, without looking at the pixels of most."""

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP"])
    def test_it_is_what_packing_makes(self, kind):
        data = encoded(pattern(3), kind)
        assert decodable(data) == prepare_image(data).data
        assert (decodable(data) == data) is (kind in ("JPEG", "PNG"))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("orientation", [1, 6])
    def test_a_turned_image_is_turned_back(self, kind, orientation):
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(pattern(3), kind, exif=exif.tobytes())
        assert decodable(data) == prepare_image(data).data
        assert (decodable(data) == data) is (orientation == 1)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG"])
    @pytest.mark.parametrize("cut", [1, 2, 20, 200, 10**9])
    def test_one_that_was_cut_off_is_damaged_or_left_to_the_decoder(self, kind, cut):
        data = encoded(pattern(3), kind)[: -min(cut, 10**6)]
        try:
            expected = prepare_image(data).data
        except DamagedImage as damage:
            with pytest.raises(DamagedImage, match="^" + str(damage)[:9]):
                decodable(data)
        else:
            assert decodable(data) == expected
        if kind == "JPEG":
            with pytest.raises(DamagedImage):
                decodable(data)

    def test_a_few_bytes_behind_the_end_do_no_harm(self):
        data = encoded(pattern(3), "JPEG") + bytes(100)
        assert decodable(data) == data

    def test_pixels_are_not_decoded(self, monkeypatch):
        from PIL import ImageFile

        decoded = []
        monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
        for kind in ("JPEG", "PNG"):
            decodable(encoded(pattern(3), kind))
        assert decoded == []


def test_numbers_stay_those_of_the_given_files(folder):
    files = [folder / "0.png", Path("gone.png"), folder / "1.png", b"", folder / "3.PNG"]
    batches = list(decode_files(files, ImageSettings(24, 1.0, (0.5,) * 3, (0.2,) * 3), batch_size=2))
    assert np.concatenate([batch.numbers for batch in batches]).tolist() == [0, 2, 4]
    assert dict(pair for batch in batches for pair in batch.damaged).keys() == {1, 3}
