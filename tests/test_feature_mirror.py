"""A bucket's features on this machine: fetched once by however many processes, and anew when they have changed."""

import multiprocessing
import shutil

import numpy as np
import pytest

from cluster.bucket import BucketStorage
from cluster.errors import UserError
from cluster.storage import open_storage
from tests.test_features import drawn, write
from trainer.feature_mirror import fetch_features
from trainer.features import read_features


@pytest.fixture
def uri(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"{moto_s3}/{tmp_path.name}/features"


def upload(folder, uri):
    for file in sorted(folder.iterdir()):
        open_storage(uri).upload(file, file.name)


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert fetch_features(tmp_path) == tmp_path


def test_they_are_fetched_once_and_anew_when_they_have_changed(uri, tmp_path, monkeypatch):
    write(tmp_path / "one", drawn(range(4)), drawn(range(4, 10)))
    upload(tmp_path / "one", uri)
    fetched, download = [], BucketStorage.download
    monkeypatch.setattr(
        BucketStorage, "download", lambda self, path, local: (fetched.append(path), download(self, path, local))
    )
    before = read_features(fetch_features(uri), "val")
    assert np.array_equal(before.x, drawn(range(10)).x) and fetched == ["val-000.arrow", "val-001.arrow"]
    fetch_features(uri)
    assert len(fetched) == 2

    shutil.rmtree(tmp_path / "one")
    write(tmp_path / "one", drawn(range(8)))
    upload(tmp_path / "one", uri)
    after = read_features(fetch_features(uri), "val")
    assert len(after) == 8 and len(fetched) == 4
    assert np.array_equal(before.x, drawn(range(10)).x)  # who has the old ones mapped keeps them


def test_a_copy_that_was_broken_off_is_made_again(uri, tmp_path):
    write(tmp_path / "one", drawn(range(10)))
    upload(tmp_path / "one", uri)
    folder = fetch_features(uri)
    (folder / "features.json").unlink()  # written last
    (folder / "val-000.arrow").write_bytes(b"torn")
    assert len(read_features(fetch_features(uri), "val")) == 10


def test_features_without_a_manifest_are_named(uri, tmp_path):
    write(tmp_path / "one", drawn(range(10)))
    upload(tmp_path / "one", uri)
    fetch_features(uri)
    open_storage(uri).delete("features.json")  # they are being made anew
    with pytest.raises(UserError, match=r"hold no features.json, so they are missing or unfinished"):
        read_features(fetch_features(uri), "val")


def test_processes_of_a_machine_share_the_copy(uri, tmp_path):
    write(tmp_path / "one", drawn(range(10)))
    upload(tmp_path / "one", uri)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_read, args=(uri,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0, 0]


def _read(uri):
    assert len(read_features(fetch_features(uri), "val")) == 10
