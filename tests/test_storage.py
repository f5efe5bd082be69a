"""Folders and buckets behave alike; the bucket is a real S3 server on loopback, with faults put between."""

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

from cluster.bucket import BucketStorage
from cluster.errors import UserError
from cluster.folder import LocalStorage, whole_file
from cluster.storage import StoredFile, check_storage, open_storage, to_pyarrow, worker_environment
from tests import faulty_s3

ROOT = Path(__file__).parent.parent
SECRET = "planted-secret-of-the-tests"


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path):
    if request.param == "folder":
        return open_storage(tmp_path / "made" / "later")
    return open_storage(f"{request.getfixturevalue('moto_s3')}/some/{uuid.uuid4().hex}")


@pytest.fixture
def faulty(moto_s3, monkeypatch):
    """A bucket behind a server that spoils what it is told to."""
    with faulty_s3.proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(f"{moto_s3}/faulty/{uuid.uuid4().hex}")
        storage.proxy = proxy
        yield storage


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


# ---- buckets


def test_neither_pickle_nor_repr_holds_a_secret(moto_s3):
    storage = open_storage(f"{moto_s3}/x")
    storage.write("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read("a") == b"1"
    system, _ = to_pyarrow(f"{moto_s3}/x")
    texts = [pickle.dumps(storage), repr(storage).encode(), repr(vars(storage)).encode(), pickle.dumps(system)]
    texts.append(repr(worker_environment()).encode())
    assert not any(SECRET.encode() in text or b"test-key-id" in text for text in texts)


def test_objects_outside_the_prefix_and_folder_marks_are_not_listed(moto_s3):
    outer, inner = open_storage(f"{moto_s3}/out-{uuid.uuid4().hex}"), None
    inner = open_storage(f"{outer.uri}/in")
    outer.write("in/a", b"")
    outer.write("inside", b"")
    inner._client().put_object(Bucket=inner.bucket, Key=f"{inner.prefix}/folder/", Body=b"")
    assert inner.list() == [StoredFile("a", 0)]


def test_throttling_and_cut_connections_are_retried(faulty):
    slow = faulty_s3.refusal(503, "SlowDown")
    faulty.proxy.faults = [slow, faulty_s3.no_answer]
    faulty.write("x", b"content")
    faulty.proxy.faults = [faulty_s3.no_answer, slow]
    assert faulty.read("x") == b"content"
    assert not faulty.proxy.faults


@pytest.mark.parametrize("whole", [True, False])
def test_a_broken_body_goes_on_where_it_broke_off(faulty, tmp_path, whole):
    content = os.urandom(3_000_000)
    faulty.write("x", content)
    faulty.proxy.faults = [faulty_s3.half_a_body, faulty_s3.half_a_body]
    faulty.proxy.seen.clear()
    if whole:
        faulty.download("x", tmp_path / "x")
        assert (tmp_path / "x").read_bytes() == content
        ends = [None, "bytes=1500000-", "bytes=2250000-"]
    else:
        assert faulty.read_range("x", 1000, 2_000_000) == content[1000:2_001_000]
        ends = ["bytes=1000-2000999", "bytes=1001000-2000999", "bytes=1501000-2000999"]
    assert [span for _, _, span in faulty.proxy.seen] == ends


def test_a_body_that_always_breaks_is_given_up_and_leaves_no_file(faulty, tmp_path):
    faulty.write("x", bytes(1024))
    faulty.proxy.faults = [faulty_s3.half_a_body] * 5
    message = (
        f"{faulty.uri}/x broke off after 992 of 1024 bytes in 5 attempts; "
        "check the network to the storage and start again"
    )
    with pytest.raises(UserError, match=says(message)):
        faulty.download("x", tmp_path / "new" / "x")
    assert list((tmp_path / "new").iterdir()) == []


def test_an_object_replaced_while_it_is_read_is_not_mixed(faulty):
    faulty.write("x", b"a" * 100_000)

    def cut_and_replace(handler):
        faulty_s3.half_a_body(handler)
        faulty.write("x", b"b" * 100_000)

    faulty.proxy.faults = [cut_and_replace, faulty_s3.pass_on]
    with pytest.raises(
        UserError, match=says(f"{faulty.uri}/x was replaced while it was read; start again with the new one")
    ):
        faulty.read("x")


def test_the_winner_of_a_lock_whose_answer_was_lost_knows_it(faulty):
    faulty.proxy.faults = [faulty_s3.lost_answer]
    assert faulty.write_new("run.lock", b"me")
    assert not faulty.write_new("run.lock", b"me")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "SignatureDoesNotMatch", "{server} refused the credentials for {x} ({code}); renew or correct them"),
        (403, "ExpiredToken", "{server} refused the credentials for {x} ({code}); renew or correct them"),
        (
            403,
            "AccessDenied",
            "access to {x} is denied ({code}); correct the credentials, or allow s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:ListBucket",
        ),
        (404, "NoSuchBucket", "bucket 'rarelens-tests' of {x} does not exist; make it first or correct the name"),
        (403, "RequestTimeTooSkewed", "{server} refused {x}: this machine's clock is wrong; set it (NTP)"),
        (403, "QuotaExceeded", "{server} has no space left for {x} ({code}); free some or raise the quota"),
        (
            400,
            "AuthorizationHeaderMalformed",
            "bucket 'rarelens-tests' of {x} is in another region ({code}); set AWS_DEFAULT_REGION to it",
        ),
        (503, "SlowDown", "{server} kept failing for {x} ({code}); start again later, the run goes on where it was"),
        (418, "Teapot", "{server} refused {x} ({code}); check bucket, prefix and permissions"),
    ],
)
def test_each_refusal_is_one_sentence_with_the_remedy(faulty, monkeypatch, tmp_path, status, code, message):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = f"S3 server {faulty.proxy.url.removeprefix('http://')}"
    expected = says(message.format(server=server, x=f"{faulty.uri}/x", code=code))
    (tmp_path / "local").write_bytes(b"1")
    for act in (
        lambda: faulty.write("x", b"1"),
        lambda: faulty.read("x"),
        lambda: faulty.list("x"),
        lambda: faulty.upload(tmp_path / "local", "x"),
    ):
        faulty.proxy.faults = [faulty_s3.refusal(status, code)] * 2
        with pytest.raises(UserError, match=expected):
            act()


def test_a_missing_bucket_is_named_by_every_call(moto_s3):
    storage = open_storage("s3://no-such-bucket/p")
    message = "bucket 'no-such-bucket' of s3://no-such-bucket/p{} does not exist; make it first or correct the name"
    for act in (storage.read, storage.exists, lambda path: storage.write(path, b""), storage.delete):
        with pytest.raises(UserError, match=says(message.format("/x"))):
            act("x")
    with pytest.raises(UserError, match=says(message.format(""))):
        storage.list()


def test_wrong_credentials_are_refused_without_telling_them(moto_s3, monkeypatch):
    import requests

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = open_storage(f"{moto_s3}/p")
    requests.post(f"{endpoint}/moto-api/reset-auth", data="0", timeout=10)  # from now on moto looks at keys
    try:
        with pytest.raises(
            UserError, match=r"refused the credentials for \S+/p/x \(InvalidAccessKeyId\); renew"
        ) as error:
            storage.write("x", b"")
    finally:
        requests.post(f"{endpoint}/moto-api/reset-auth", data="inf", timeout=10)
    assert SECRET not in str(error.value) and "AKIA" not in str(error.value)


def test_without_credentials_the_ways_to_give_them_are_named(moto_s3, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    message = (
        f"no credentials for {moto_s3}/x were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, "
        "or give the machine a role"
    )
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=says(message)):
        open_storage(moto_s3).read("x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    message = f"AWS profile 'nobody' for {moto_s3}/x is not in ~/.aws; make it or unset AWS_PROFILE"
    with pytest.raises(UserError, match=says(message)):
        open_storage(moto_s3).read("x")


def test_a_server_that_is_not_there_is_named(moto_s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = (
        f"S3 server 127.0.0.1:9 cannot be reached for {moto_s3}/x (EndpointConnectionError); "
        "check the network and AWS_ENDPOINT_URL"
    )
    with pytest.raises(UserError, match=says(message)):
        open_storage(moto_s3).read("x")


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "localhost", f"http://user:{SECRET}@127.0.0.1:9000", "s3://x"])
def test_a_wrong_endpoint_is_refused_without_telling_it(moto_s3, monkeypatch, endpoint):
    message = "AWS_ENDPOINT_URL must read http://host:port or https://host:port; give credentials by boto3's own chain"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match=says(message)):
        open_storage(moto_s3).read("x")
    with pytest.raises(UserError, match=says(message)):
        to_pyarrow(moto_s3)


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


def test_a_bucket_storage_addresses_by_path_at_another_server(faulty):
    assert isinstance(faulty, BucketStorage)
    faulty.write("x", b"")
    assert faulty.proxy.seen[-1][1] == f"/{faulty.bucket}/{faulty.prefix}/x"
