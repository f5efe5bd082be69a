"""Packing that is stopped, killed, repeated, or meets a full disk: what is done is kept, and the bytes are the same."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.bucket import BucketStorage
from cluster.errors import UserError
from cluster.storage import open_storage
from data_pipeline.config import DataConfig, SourceConfig
from tests.raw import SMALL_SHARDS, digests, pack_quietly, table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return table(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    return pack_quietly(source, SMALL_SHARDS, tmp_path_factory.mktemp("packed") / "d")


def test_other_settings_are_refused_and_named(source, packed, tmp_path):
    data = SMALL_SHARDS.model_copy(update={"pack_px": 16})
    with pytest.raises(UserError) as error:
        pack_quietly(source, data, packed.uri, seed=1)
    assert str(error.value) == (
        f"dataset at {packed.uri} was packed with data.pack_px = null, now 16; seed = 0, now 1; choose another "
        "data.packed or delete it (without source.path it is taken as it is)"
    )
    other = source.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(UserError, match=f"was packed with source.path = {source.path}, now {tmp_path}; choose"):
        pack_quietly(other, SMALL_SHARDS, packed.uri)


def test_what_is_packed_is_not_packed_again(source, packed, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in Path(packed.uri).rglob("*")}
    assert pack_quietly(source, SMALL_SHARDS, packed.uri).fingerprint == packed.fingerprint
    assert pack_quietly(SourceConfig(), DataConfig(), packed.uri).fingerprint == packed.fingerprint
    monkeypatch.chdir(Path(source.path).parent)
    relative = source.model_copy(update={"path": f"./{Path(source.path).name}"})
    assert pack_quietly(relative, SMALL_SHARDS, packed.uri).fingerprint == packed.fingerprint
    assert {path: path.stat().st_mtime_ns for path in Path(packed.uri).rglob("*")} == before


def test_shards_of_an_interrupted_packing_with_other_settings_do_not_stay(source, packed, tmp_path):
    """A run that ends in an error after its shards, then one with fewer and larger shards."""
    destination = tmp_path / "d"
    (destination / "index.parquet").mkdir(parents=True)  # in the way: the index cannot be written
    with pytest.raises(UserError, match="is a folder where a file is needed"):
        pack_quietly(source, SMALL_SHARDS, destination)
    assert len(list((destination / "train").iterdir())) >= 4
    (destination / "index.parquet").rmdir()
    dataset = pack_quietly(source, DataConfig(), destination)
    assert {path for path in digests(destination) if path.endswith(".tar")} == {shard.path for shard in dataset.shards}


PACK = """
import sys
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.pack import pack
source = SourceConfig(path=sys.argv[1], labels="labels.csv", group_column="group")
pack(source, DataConfig(shard_mib=0.05, tail_budget_mib=0.04, pack_px=16), sys.argv[2], 0, progress=False)
"""


def interrupt(source, destination, sign, sent, monkeypatch):
    """Pack in a process of its own and send it a signal as soon as a file that matches `sign` is there."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    process = subprocess.Popen([sys.executable, "-c", PACK, source.path, str(destination)], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(destination.glob(sign)):
        time.sleep(0.0005)
    process.send_signal(sent)
    return process.wait()


SMALL_IMAGES = SMALL_SHARDS.model_copy(update={"pack_px": 16})
SIGNS = ["packing/notes-*", "train/.*.part", "train/body-000001.tar", "packing/shard-val-*"]


@pytest.mark.parametrize("sign", SIGNS)
def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(sign, source, tmp_path, monkeypatch):
    killed = tmp_path / "killed"
    interrupt(source, killed, sign, signal.SIGKILL, monkeypatch)
    if not (killed / "dataset.json").exists():
        (killed / "train").mkdir(exist_ok=True)
        (killed / "train" / ".0123.part").write_bytes(b"a shard that was being written")
    pack_quietly(source, SMALL_IMAGES, killed)
    pack_quietly(source, SMALL_IMAGES, tmp_path / "straight")
    assert digests(killed) == digests(tmp_path / "straight")


def test_ctrl_c_leaves_what_is_done_for_the_next_run(source, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    assert interrupt(source, stopped, "packing/notes-*", signal.SIGINT, monkeypatch) != 0
    assert not (stopped / "dataset.json").exists() and not list(stopped.rglob(".*.part"))
    notes = {path: path.stat().st_mtime_ns for path in (stopped / "packing").glob("notes-*")}
    (stopped / "index.parquet").mkdir()  # in the way, so that the second run ends before it tidies up
    with pytest.raises(UserError, match="is a folder where a file is needed"):
        pack_quietly(source, SMALL_IMAGES, stopped)
    assert {path: path.stat().st_mtime_ns for path in (stopped / "packing").glob("notes-*")} == notes
    (stopped / "index.parquet").rmdir()
    pack_quietly(source, SMALL_IMAGES, stopped)
    pack_quietly(source, SMALL_IMAGES, tmp_path / "straight")
    assert digests(stopped) == digests(tmp_path / "straight")


FULL_DISK = """
set -e
mount -t tmpfs -o size=120k tmpfs "$2"
if "$0" -c "$3" "$1" "$2/d" 2> "$4"; then exit 3; fi
ls "$2/d/packing" >> "$4"
mount -o remount,size=20m "$2"
"$0" -c "$3" "$1" "$2/d"
cp -r "$2/d" "$5"
"""


def test_a_full_disk_is_told_and_the_next_run_goes_on(source, tmp_path, monkeypatch):
    """A real one: a file system of 120 kB in a mount name space of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    disk, said, copy = tmp_path / "disk", tmp_path / "said.txt", tmp_path / "copy"
    disk.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    small = PACK.replace(", pack_px=16", "")
    script = ["bash", "-c", FULL_DISK, sys.executable, source.path, str(disk), small, str(said), str(copy)]
    done = subprocess.run([*unshare, *script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = said.read_text()
    assert re.search(
        rf"UserError: no space left in {disk}/d/\w+; free some or choose a folder on another disk; what is packed is "
        "kept, and packing again goes on from there\n",
        text,
    )
    assert "shard-train-body-000000.tar.json" in text  # something was done, and was kept
    pack_quietly(source, SMALL_SHARDS, tmp_path / "straight")
    assert digests(copy) == digests(tmp_path / "straight")


def test_an_image_that_changes_between_the_passes_is_told(source, tmp_path, monkeypatch):
    copied = table(tmp_path / "raw")
    from data_pipeline import pack as module

    def change_then_write(*arguments):
        for path in (tmp_path / "raw" / "images").iterdir():
            path.write_bytes(b"another image")
        return write(*arguments)

    write = module._pack_noted
    monkeypatch.setattr(module, "_pack_noted", change_then_write)
    with pytest.raises(
        UserError, match=r"img_\d+.jpg changed while it was packed; leave the images alone and pack again"
    ):
        pack_quietly(copied, DataConfig(), tmp_path / "d")


def test_an_upload_that_fails_loses_no_shard_that_is_there(source, packed, moto_s3, tmp_path, monkeypatch):
    """Uploads go on in the background: what has arrived is recorded, what has not is written again."""
    sent: list[str] = []

    def refuse_the_fourth(self, local, path):
        if len(sent) == 3:
            raise UserError("the network is down")
        sent.append(path)
        upload(self, local, path)

    upload = BucketStorage.upload
    monkeypatch.setattr(BucketStorage, "upload", refuse_the_fourth)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    destination = f"{moto_s3}/broken-off/set"
    with pytest.raises(UserError, match="the network is down"):
        pack_quietly(source, SMALL_SHARDS, destination)
    assert len(sent) == 3 and list(tmp_path.iterdir()) == []
    storage = open_storage(destination)
    assert {path for path in sent if storage.exists(path)} == set(sent) and not storage.exists("dataset.json")
    monkeypatch.setattr(BucketStorage, "upload", lambda *sending: sent.append(sending[2]) or upload(*sending))
    dataset = pack_quietly(source, SMALL_SHARDS, destination)
    assert len(sent) == len(set(sent)) == len(dataset.shards)
    local = {path: Path(packed.uri, path).read_bytes() for path in digests(Path(packed.uri))}
    assert {stored.path: storage.read(stored.path) for stored in storage.list()} == local
