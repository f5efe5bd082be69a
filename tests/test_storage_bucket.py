"""A bucket on a real S3 server on loopback: what is listed, credentials and refusals, and faults put between."""

import os
import pickle
import re
import threading
import time
import uuid

import pytest

from cluster.bucket import BucketStorage
from cluster.errors import UserError
from cluster.storage import StoredFile, open_storage, to_pyarrow, worker_environment
from tests import faulty_s3

SECRET = "planted-secret-of-the-tests"


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


def test_reset_connections_are_retried_before_and_in_the_middle_of_a_body(faulty, tmp_path):
    content = os.urandom(3_000_000)
    faulty.proxy.faults = [faulty_s3.reset]
    faulty.write("x", content)
    faulty.proxy.faults = [faulty_s3.reset, faulty_s3.half_a_body_and_reset]
    faulty.download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content and not faulty.proxy.faults


def test_each_retry_waits_longer_than_the_one_before(faulty, monkeypatch):
    """What is drawn of each pause, here its middle for a refusal and its end for a broken body, doubles."""
    faulty.write("x", bytes(1024))
    pauses: list[float] = []
    sleep, us = time.sleep, threading.get_ident()

    def pause(seconds):  # other threads of this process may sleep, too
        (pauses.append if threading.get_ident() == us else sleep)(seconds)

    monkeypatch.setattr("time.sleep", pause)
    monkeypatch.setattr("random.random", lambda: 0.5)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    faulty.proxy.faults = [faulty_s3.refusal(503, "SlowDown")] * 4
    assert faulty.read("x") == bytes(1024)
    assert pauses == [0.5, 1.0, 2.0, 4.0]
    pauses.clear()
    faulty.proxy.faults = [faulty_s3.half_a_body] * 4
    assert faulty.read("x") == bytes(1024)
    assert pauses == pytest.approx([0.4, 0.8, 1.6, 3.2])


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
        faulty_s3.half_a_body(handler, lambda: faulty.write("x", b"b" * 100_000))

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


def test_credentials_come_by_boto3s_own_chain(faulty, monkeypatch, tmp_path):
    """Here from a profile's file; the key that signs the request tells whose they are."""
    signed = []

    def note(handler):
        signed.append(re.search(r"Credential=([^/]+)/", handler.headers["Authorization"])[1])
        faulty_s3.pass_on(handler)

    (tmp_path / "credentials").write_text(
        f"[clinic]\naws_access_key_id = clinic-key\naws_secret_access_key = {SECRET}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "clinic")
    faulty.proxy.rule = note
    storage = open_storage(faulty.uri)
    storage.write("x", b"content")
    assert storage.read("x") == b"content" and signed == ["clinic-key"] * 2


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


def test_a_bucket_storage_addresses_by_path_at_another_server(faulty):
    assert isinstance(faulty, BucketStorage)
    faulty.write("x", b"")
    assert faulty.proxy.seen[-1][1] == f"/{faulty.bucket}/{faulty.prefix}/x"
