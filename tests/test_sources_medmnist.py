import gc
import io
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.errors import UserError
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.pack import pack
from data_pipeline.sources import class_order, read_source
from tests.raw import digests, medmnist

COUNTS = {"train": 30, "val": 9, "test": 12}


def pixels(sample):
    return np.asarray(Image.open(io.BytesIO(sample.place.read())))


def source(path, **settings):
    return SourceConfig(path=str(path), **settings)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("channels", [3, None])
def test_every_row_is_a_sample_with_its_pixels_label_and_split(tmp_path, compressed, channels):
    arrays = medmnist(tmp_path / "x.npz", COUNTS, channels, compressed)
    samples = read_source(source(tmp_path / "x.npz"))
    assert [sample.name for sample in samples] == sorted(f"{s}/{i:07d}" for s, n in COUNTS.items() for i in range(n))
    for sample in samples:
        split, _, row = sample.name.partition("/")
        assert (sample.split, sample.key, sample.group) == (split, f"{split}__{row}", sample.name)
        assert sample.label == str(arrays[f"{split}_labels"][int(row), 0])
        np.testing.assert_array_equal(pixels(sample), arrays[f"{split}_images"][int(row)])


def test_a_last_axis_of_one_is_grey_and_16_bits_stay(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (4, 8, 9), dtype=np.uint16)
    np.savez(tmp_path / "x.npz", train_images=values[..., None][:, :, :, :], train_labels=np.array([0, 1, 0, 1]))
    for row, sample in enumerate(read_source(source(tmp_path / "x.npz"))):
        np.testing.assert_array_equal(pixels(sample), values[row])


def test_names_of_the_classes_come_from_a_list_or_the_file(tmp_path):
    medmnist(tmp_path / "x.npz", COUNTS)
    named = source(tmp_path / "x.npz", class_names=["nevus", "melanoma", "df"])
    samples = read_source(named)
    assert {sample.label for sample in samples} == {"nevus", "melanoma", "df"}
    assert class_order(samples, named.class_names) == ("nevus", "melanoma", "df")
    arrays = dict(np.load(tmp_path / "x.npz"))
    for split in COUNTS:
        arrays[f"{split}_labels"] = np.array(["b", "a", "c"])[arrays[f"{split}_labels"][:, 0]]
    np.savez(tmp_path / "text.npz", **arrays)
    samples = read_source(source(tmp_path / "text.npz"))
    assert [sample.label for sample in samples[:3]] == ["b", "a", "c"]
    assert class_order(samples, None) == ("a", "b", "c")


def test_numbers_are_ordered_as_numbers(tmp_path):
    labels = np.arange(12)
    np.savez(tmp_path / "x.npz", train_images=np.zeros((12, 4, 4), np.uint8), train_labels=labels)
    assert class_order(read_source(source(tmp_path / "x.npz")), None) == tuple(str(i) for i in range(12))


def test_given_splits_and_labels_are_those_of_the_packed_dataset(tmp_path):
    arrays = medmnist(tmp_path / "x.npz", COUNTS)
    dataset = pack(source(tmp_path / "x.npz"), DataConfig(), str(tmp_path / "d"), seed=0, progress=False)
    assert dataset.made["given_splits"] == ["train", "val", "test"]
    for split, number in COUNTS.items():
        index = dataset.index(split)
        assert len(index) == number
        rows = [int(key.partition("__")[2]) for key in index.key]
        np.testing.assert_array_equal(index.label, arrays[f"{split}_labels"][rows, 0])
        for row, shard, offset, length in zip(rows, index.shard, index.offset, index.length, strict=True):
            data = dataset.storage.read_range(dataset.shards[shard].path, int(offset), int(length))
            np.testing.assert_array_equal(
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), arrays[f"{split}_images"][row]
            )
    medmnist(tmp_path / "stored.npz", COUNTS, compressed=False)
    pack(source(tmp_path / "stored.npz"), DataConfig(), str(tmp_path / "e"), seed=0, progress=False)
    different = {
        name for name in digests(tmp_path / "d") if digests(tmp_path / "d")[name] != digests(tmp_path / "e")[name]
    }
    assert different == {"dataset.json"}  # which names the source


def test_the_inflated_copy_goes_with_the_samples_and_not_with_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    medmnist(tmp_path / "x.npz", COUNTS)
    samples = read_source(source(tmp_path / "x.npz"))
    (copy,) = tmp_path.glob("rarelens-*")
    assert sorted(path.name for path in copy.iterdir()) == ["test_images.raw", "train_images.raw", "val_images.raw"]
    elsewhere = pickle.loads(pickle.dumps(samples[0].place))
    before = elsewhere.read()
    del elsewhere
    gc.collect()
    assert copy.exists() and samples[0].place.read() == before
    del samples
    gc.collect()
    assert not copy.exists()


def test_a_stored_array_is_read_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    medmnist(tmp_path / "x.npz", COUNTS, compressed=False)
    samples = read_source(source(tmp_path / "x.npz"))
    assert not [path for path in tmp_path.glob("rarelens-*/*")]
    assert samples[0].place.array.path == str(tmp_path / "x.npz")


def test_labels_out_of_range_are_quarantined(tmp_path):
    arrays = medmnist(tmp_path / "x.npz", COUNTS)
    arrays["train_labels"] = arrays["train_labels"].astype(np.int64)
    arrays["train_labels"][4] = 3
    arrays["train_labels"][5] = -1
    np.savez(tmp_path / "y.npz", **arrays)
    found = {s.name: s for s in read_source(source(tmp_path / "y.npz", class_names=["a", "b", "c"])) if s.problem}
    assert {name: sample.problem for name, sample in found.items()} == {
        "train/0000004": "label 3 is out of range: source.class_names has 3 names",
        "train/0000005": "label -1 is out of range: source.class_names has 3 names",
    }
    assert all(sample.label == "" for sample in found.values())
    unnamed = {sample.name: sample.problem for sample in read_source(source(tmp_path / "y.npz")) if sample.problem}
    assert unnamed == {"train/0000005": "label -1 is out of range: numbers begin at 0"}


GOOD = {"train_images": np.zeros((4, 5, 5), np.uint8), "train_labels": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_images": np.zeros((4, 5, 5, 5), np.uint8)}, "train_images has the shape (4, 5, 5, 5); images are"),
        ({"train_images": np.zeros((4, 5, 5), np.float32)}, "train_images holds float32; convert it to uint8"),
        (
            {"train_images": np.zeros((4, 5, 5, 3), np.uint16)},
            "train_images holds uint16; convert it to uint8 (grey may be uint16 too)",
        ),
        (
            {"train_images": np.asfortranarray(GOOD["train_images"])},
            "train_images is in Fortran order; save np.ascontiguousarray of it",
        ),
        ({"train_labels": np.array([0, 1, 0])}, "train_labels has 3 labels for 4 images; write the file again"),
        (
            {"train_labels": np.zeros((4, 14), np.uint8)},
            "train_labels has the shape (4, 14); one class an image is needed, [N] or [N, 1]",
        ),
        ({"train_labels": np.array([0.0, 1, 0, 1])}, "train_labels holds float64; save it as whole numbers or text"),
        (
            {"train_labels": np.array(["a", None, "a", "b"], dtype=object)},
            "train_labels holds object; save it as whole numbers or text",
        ),
        ({"train_labels": None}, "has no train_labels, as MedMNIST files do; it holds train_images"),
        ({"train_images": None, "train_labels": None, "x": np.zeros(1)}, "has no train_images, as MedMNIST files do"),
    ],
)
def test_files_that_are_laid_out_otherwise(tmp_path, change, message):
    arrays = {name: array for name, array in (GOOD | change).items() if array is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_source(source(tmp_path / "x.npz"))
    assert str(error.value).startswith(str(tmp_path / "x.npz"))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"source.path = .*/x.npz: there is no such file; give the path of an .npz"):
        read_source(source(tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"x.npz is damaged \(File is not a zip file\); download or write"):
        read_source(source(tmp_path / "x.npz"))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_wrong_checksum_is_told(tmp_path, compressed):
    path: Path = tmp_path / "x.npz"
    arrays = {"train_images": np.random.default_rng(0).integers(0, 256, (50, 20, 20), dtype=np.uint8)}
    (np.savez_compressed if compressed else np.savez)(path, **arrays, train_labels=np.arange(50) % 2)
    with zipfile.ZipFile(path) as file:
        middle = file.getinfo("train_images.npy").header_offset + 10_000
    content = bytearray(path.read_bytes())
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x.npz is damaged \(.+\); download or write the file again"):
        read_source(source(path))


def test_an_array_that_says_it_is_larger_than_it_is(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 28, 28)})
    labels = io.BytesIO()
    np.save(labels, np.arange(4))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", header.getvalue() + bytes(4 * 28 * 28))
        file.writestr("train_labels.npy", labels.getvalue())
    with pytest.raises(UserError, match=r"damaged \(train_images has 3136 bytes of pixels instead of 784000000000\)"):
        read_source(source(tmp_path / "x.npz"))
