"""Folders and buckets behave alike; the bucket is on a real S3 server on loopback."""

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.folder import LocalStorage, whole_file
from cluster.storage import StoredFile, check_storage, open_storage, to_pyarrow

ROOT = Path(__file__).parent.parent
SECRET = "planted-secret-of-the-tests"


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path):
    if request.param == "folder":
        return open_storage(tmp_path / "made" / "later")
    return open_storage(f"{request.getfixturevalue('moto_s3')}/some/{uuid.uuid4().hex}")


def says(text: str) -> str:
    return f"^{re.escape(text)}$"


# ---- what both can do


def test_what_is_written_is_read_back_and_replaced_whole(storage):
    storage.write("a/b.bin", b"first, and longer")
    assert storage.read("a/b.bin") == b"first, and longer"
    storage.write("a/b.bin", b"second")
    assert storage.read("a/b.bin") == b"second"
    storage.write("empty", b"")
    assert storage.read("empty") == b""


def test_ranges_are_exact_or_refused(storage):
    data = bytes(range(200))
    storage.write("data", data)
    for offset, length in [(0, 200), (0, 1), (199, 1), (50, 100), (10, 0)]:
        assert storage.read_range("data", offset, length) == data[offset : offset + length]
    for offset, length in [(150, 51), (200, 1), (500, 10)]:
        with pytest.raises(UserError, match=rf"^{re.escape(storage.uri)}/data ends before byte \d+; it is truncated, "):
            storage.read_range("data", offset, length)


def test_listing_is_sorted_relative_and_by_prefix(storage):
    assert storage.list() == []
    for path in ("train/1.tar", "train/0.tar", "train.json", "val/0.tar", "z"):
        storage.write(path, path.encode())
    assert storage.list() == sorted(
        StoredFile(path, len(path)) for path in ("train.json", "train/0.tar", "train/1.tar", "val/0.tar", "z")
    )
    assert [file.path for file in storage.list("train")] == ["train.json", "train/0.tar", "train/1.tar"]
    assert [file.path for file in storage.list("train/")] == ["train/0.tar", "train/1.tar"]
    assert [file.path for file in storage.list("train/1")] == ["train/1.tar"]
    assert storage.list("other/") == []


def test_more_files_than_one_page_holds_are_listed(storage, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # S3's own pages hold 1,000
    names = [f"many/{i:02}" for i in range(35)]
    for name in names:
        storage.write(name, b"x")
    assert [file.path for file in storage.list("many/")] == names


def test_exists_and_delete(storage):
    storage.write("dir/name", b"x")
    assert storage.exists("dir/name")
    assert not storage.exists("dir/nam") and not storage.exists("dir")
    storage.delete("dir/name")
    storage.delete("dir/name")
    assert not storage.exists("dir/name")


def test_of_many_writers_of_a_new_file_one_wins(storage):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.write_new("run.lock", f"owner {i}".encode()), range(8)))
    assert won.count(True) == 1
    assert storage.read("run.lock") == f"owner {won.index(True)}".encode()
    assert not storage.write_new("run.lock", b"late")
    assert [file.path for file in storage.list()] == ["run.lock"]


@pytest.mark.parametrize("size", [0, 1000, (33 << 20) + 5], ids=["empty", "small", "in parts"])
def test_files_go_up_and_down(storage, tmp_path, size):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    content = os.urandom(size)
    source.write_bytes(content)
    storage.upload(source, "x/y")
    assert storage.list() == [StoredFile("x/y", size)]
    storage.download("x/y", target)
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_missing_file_is_named(storage, tmp_path):
    message = says(f"{storage.uri}/no/such does not exist; check the path, or run the step that writes it")
    with pytest.raises(UserError, match=message):
        storage.read("no/such")
    with pytest.raises(UserError, match=message):
        storage.read_range("no/such", 0, 4)
    with pytest.raises(UserError, match=message):
        storage.download("no/such", tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(
        UserError, match=says(f"{tmp_path}/none does not exist; check the path, or run the step that writes it")
    ):
        storage.upload(tmp_path / "none", "x")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "a/.", "a\\..\\b", "a\0b", "a/"])
def test_paths_stay_inside(storage, tmp_path, path):
    for use in (
        storage.read,
        storage.exists,
        storage.delete,
        lambda path: storage.write(path, b""),
        lambda path: storage.write_new(path, b""),
        lambda path: storage.download(path, tmp_path / "target"),
    ):
        with pytest.raises(UserError, match=rf"^path {re.escape(repr(path))} in .* must be relative, with no empty"):
            use(path)


def test_the_probe_passes_and_leaves_nothing(storage):
    storage.write("mine", b"x")
    check_storage(storage)
    assert storage.list() == [StoredFile("mine", 1)]


def write_in_child(storage, path):
    storage.write(path, storage.read("parent") + b" and child")


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_storage_goes_to_other_processes(storage, method):
    storage.write("parent", b"parent")
    child = multiprocessing.get_context(method).Process(target=write_in_child, args=(storage, "child"))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert storage.read("child") == b"parent and child"


# ---- opening


def test_what_a_uri_opens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs/a").uri == str(tmp_path / "runs/a")
    assert open_storage(f"file://{tmp_path}/b").uri == str(tmp_path / "b")
    assert open_storage("runs/a").local_path("x/y") == tmp_path / "runs/a/x/y"
    assert open_storage("runs/a").local_path("") == tmp_path / "runs/a"
    assert not (tmp_path / "runs").exists()
    bucket = open_storage("s3://my-bucket/some/prefix/")
    assert bucket.uri == "s3://my-bucket/some/prefix" and bucket.local_path("x") is None
    assert open_storage("s3://my-bucket").uri == "s3://my-bucket"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "an empty storage URI was given; give a folder or s3://bucket/prefix"),
        ("gs://b/p", "storage gs://... is not supported; give a folder or s3://bucket/prefix"),
        ("s3://", "'' is no bucket name; give s3://bucket/prefix"),
        ("s3://b ucket/x", "'b ucket' is no bucket name; give s3://bucket/prefix"),
        ("s3://bucket/a/../b", "path 'a/../b' in s3://bucket must be relative, with no empty, '.' or '..' part"),
        (
            f"s3://key:{SECRET}@bucket/x",
            "an s3:// URI holds only bucket and prefix; give credentials and AWS_ENDPOINT_URL by environment",
        ),
        (
            f"s3://bucket/x?secret_key={SECRET}",
            "an s3:// URI holds only bucket and prefix; give credentials and AWS_ENDPOINT_URL by environment",
        ),
    ],
)
def test_what_no_storage_can_be_made_of(uri, message):
    with pytest.raises(UserError, match=says(message)):
        open_storage(uri)


def test_a_file_is_no_storage(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=says(f"{tmp_path}/file is a file where a folder is needed; move it or choose another folder")
    ):
        open_storage(tmp_path / "file")


# ---- folders


def test_a_killed_writer_leaves_the_old_file_and_nothing_listed(tmp_path):
    storage = open_storage(tmp_path)
    storage.write("file", b"old")
    script = (
        "import sys, time; from pathlib import Path; from cluster.folder import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'new, half of it'); file.flush(); print('ready', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "file")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 2  # its temporary file is still there
    assert storage.read("file") == b"old"
    assert storage.list() == [StoredFile("file", 3)]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as file:
        file.write(b"new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_file_copied_onto_itself_stays(tmp_path):
    storage = open_storage(tmp_path)
    storage.write("file", b"content")
    storage.upload(tmp_path / "file", "file")
    storage.download("file", tmp_path / "file")
    assert storage.read("file") == b"content"


def test_files_and_folders_in_each_others_place_are_named(tmp_path):
    storage = open_storage(tmp_path)
    storage.write("file", b"")
    storage.write("folder/x", b"")
    with pytest.raises(UserError, match=rf"^{tmp_path}/file.* is a file where a folder is needed; move it or choose"):
        storage.write("file/x", b"")
    with pytest.raises(UserError, match=rf"^{tmp_path}/.* is a folder where a file is needed; move it or choose"):
        storage.write("folder", b"")
    with pytest.raises(UserError, match=rf"^{tmp_path}/folder is a folder where a file is needed; move it or choose"):
        storage.read("folder")


FULL_DISK = """
import os, sys
from pathlib import Path
from cluster.errors import UserError
from cluster.storage import check_storage, open_storage
disk = Path(sys.argv[1])
storage = open_storage(disk)
storage.write("file", b"old")
for act in (
    lambda: storage.write("file", bytes(200_000)),
    lambda: storage.write_new("new", bytes(200_000)),
    lambda: storage.upload(Path(sys.argv[2]), "file"),
):
    try:
        act()
    except UserError as error:
        print(error)
assert storage.read("file") == b"old" and os.listdir(disk) == ["file"]
os.system(f"mount -o remount,ro {disk}")
try:
    check_storage(storage)
except UserError as error:
    print(error)
"""


def test_a_full_and_a_read_only_disk_are_named_and_lose_nothing(tmp_path):
    disk, large = tmp_path / "disk", tmp_path / "large"
    disk.mkdir()
    large.write_bytes(bytes(200_000))
    mount = 'mount -t tmpfs -o size=64k none "$1" && exec "$0" -c "$3" "$1" "$2"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, str(disk), str(large), FULL_DISK]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    full = f"no space left in {disk}; free some or choose a folder on another disk"
    *said, read_only = result.stdout.splitlines()
    assert said == [full] * 3
    assert re.fullmatch(rf"{disk}/\S+: read-only file system; allow it or choose another folder", read_only)


class Forgetful(LocalStorage):
    """Takes writes, and spoils one of the other three."""

    def __init__(self, root, fault):
        super().__init__(root)
        self.fault = fault

    def read(self, path):
        return b"other" if self.fault == "read" else super().read(path)

    def list(self, prefix=""):
        return [] if self.fault == "list" else super().list(prefix)

    def delete(self, path):
        if self.fault != "delete":
            super().delete(path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("read", "{} gave back other bytes than were written; check the disk or the S3 server"),
        ("list", "{} does not list a file that was just written; rarelens needs a storage that does"),
        ("delete", "{} keeps a file that was deleted; allow deleting (s3:DeleteObject) there"),
    ],
)
def test_the_probe_finds_a_storage_that_only_seems_to_work(tmp_path, fault, message):
    with pytest.raises(UserError, match=says(message.format(tmp_path))):
        check_storage(Forgetful(tmp_path, fault))
    assert fault == "delete" or not list(tmp_path.iterdir())


# ---- pyarrow, through which Ray Train writes


def test_pyarrow_and_the_storage_see_the_same_files(storage, tmp_path):
    import pyarrow.fs

    system, path = to_pyarrow(storage.uri)
    system = pickle.loads(pickle.dumps(system))  # as Ray hands it to its workers
    system.create_dir(f"{path}/run")
    with system.open_output_stream(f"{path}/run/from-arrow") as stream:
        stream.write(b"1" * 100)
    storage.write("run/from-storage", b"22")
    assert storage.read("run/from-arrow") == b"1" * 100
    assert system.open_input_file(f"{path}/run/from-storage").read() == b"22"
    found = system.get_file_info(pyarrow.fs.FileSelector(f"{path}/run"))
    assert sorted(Path(info.path).name for info in found) == ["from-arrow", "from-storage"]
    assert os.environ["AWS_REQUEST_CHECKSUM_CALCULATION"] == "when_required"
