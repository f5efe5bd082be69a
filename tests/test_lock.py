"""Two runs in one run folder: real processes on a folder and on an S3 server, one of them killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.lock import LOCK_FILE, RunLock, holder
from cluster.owner import Owner, this_process
from cluster.storage import open_storage
from tests.faulty_s3 import proxy_to, refusal

ROOT = Path(__file__).parent.parent
OWNER = """
import sys, time
from cluster.lock import RunLock
from cluster.storage import open_storage
with RunLock(open_storage(sys.argv[1]), beat_every_s=float(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""
FAST_S = 0.2


@pytest.fixture(params=["folder", "bucket"])
def storage(request, tmp_path):
    uri = str(tmp_path / "run")
    if request.param == "bucket":
        uri = f"{request.getfixturevalue('moto_s3')}/{tmp_path.name}/run"
    return open_storage(uri)


@contextmanager
def owner_of(storage, beat_every_s=FAST_S):
    """A second process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, storage.uri, str(beat_every_s)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def change(storage, **values):
    """Let the lock on disk say something else of its owner."""
    storage.write(LOCK_FILE, json.dumps({**json.loads(storage.read(LOCK_FILE)), **values}).encode())


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def beats(storage):
    return json.loads(storage.read(LOCK_FILE))["beats"]


def after_a_beat(storage):
    """Return when a beat has just ended, so that none writes over what is written next."""
    now = beats(storage)
    until(lambda: beats(storage) > now)


def take_away(storage, is_lost, **values):
    """Let the lock be another one's, again and again: a beat under way may bring the first one back."""

    def taken():
        change(storage, mark="theirs", **values)
        return is_lost()

    until(taken, seconds=30)


def test_the_lock_is_there_while_the_block_runs_and_names_its_owner(storage):
    with RunLock(storage) as lock:
        said = json.loads(storage.read(LOCK_FILE))
        assert said["pid"] == os.getpid() and said["host"] == this_process().host and said["command"]
        assert lock.lost is None
    assert not storage.exists(LOCK_FILE) and holder(storage) is None


def test_it_is_released_when_the_block_fails(storage):
    with pytest.raises(RuntimeError), RunLock(storage):
        raise RuntimeError
    assert not storage.exists(LOCK_FILE)


def test_a_living_owner_is_named_and_keeps_its_run(storage):
    with owner_of(storage) as process:
        me = this_process()
        said = (
            rf"run folder {storage.uri} is in use by '.*' of user {me.user} on host {me.host} "
            rf"\(process {process.pid}\), since 20.*; wait until that has ended, or stop it there, or give another run="
        )
        with pytest.raises(UserError, match=said), RunLock(storage):
            pytest.fail("two runs in one folder")
        owner, lives = holder(storage)
        assert lives and owner.pid == process.pid
        after_a_beat(storage)  # undisturbed


def test_a_killed_owner_of_this_machine_is_followed_at_once(storage, capsys):
    with owner_of(storage) as process:
        process.kill()
        deadline = time.monotonic() + 10  # the kernel takes a moment to end it
        while holder(storage)[1] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert holder(storage)[1] is False, "a process that nobody has waited for yet is dead, too"
        process.wait()
        with RunLock(storage, watch_for_s=1000):
            assert json.loads(storage.read(LOCK_FILE))["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert f"took run folder {storage.uri} over from" in said and f"(process {process.pid})" in said
    assert "watching" not in said


def test_another_process_of_the_same_number_is_not_the_owner(storage):
    with owner_of(storage, beat_every_s=1000) as process:
        change(storage, process_began=json.loads(storage.read(LOCK_FILE))["process_began"] - 1)
        assert holder(storage) == (Owner.read(storage.read(LOCK_FILE)), False)
        with RunLock(storage, watch_for_s=1000):
            assert process.poll() is None


@pytest.mark.parametrize("field, value", [("host", "elsewhere"), ("boot", "earlier"), ("namespace", "pid:[1]")])
def test_a_silent_owner_of_another_machine_is_watched_and_followed(tmp_path, field, value, capsys):
    storage = open_storage(tmp_path)
    with owner_of(storage, beat_every_s=1000):  # lives here, which another machine cannot see
        change(storage, **{field: value})
        with RunLock(storage, watch_for_s=0.5):
            assert json.loads(storage.read(LOCK_FILE))["pid"] == os.getpid()
    said = capsys.readouterr().err
    assert "is locked by" in said and "watching for 0 s whether that is alive" in said


def test_an_owner_of_another_machine_that_beats_is_refused(storage):
    with owner_of(storage, beat_every_s=1000), _beating(storage):
        with pytest.raises(UserError, match="on host elsewhere"), RunLock(storage, watch_for_s=20):
            pytest.fail("two runs in one folder")
        assert holder(storage, watch_for_s=20)[1] is True


@contextmanager
def _beating(storage):
    """The owner of another machine raises its counter, as that machine's thread would."""
    ended = threading.Event()

    def beat():
        number = 0
        while not ended.wait(0.3):
            number += 1
            change(storage, host="elsewhere", beats=number)

    change(storage, host="elsewhere")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_damaged_lock_is_watched_and_followed(storage):
    for content in (b"", b"{", b"[]", b'{"pid": "x", "host": 3}', b"[" * 100_000):
        storage.write(LOCK_FILE, content)
        assert Owner.read(content) == Owner()
    with RunLock(storage, watch_for_s=0.2):
        assert beats(storage) == 0


def test_a_lock_of_anybody_commands_no_terminal():
    assert Owner.read(b'{"host": "a\\u001b]0;x\\u0007\\nb"}').host == "a?]0;x??b"


def test_whose_lock_was_taken_away_ends_with_an_error_and_leaves_the_lock_alone(storage):
    said = r"was taken over by .* on host elsewhere .*; it ends here, and that one goes on"
    with pytest.raises(UserError, match=said), RunLock(storage, beat_every_s=FAST_S):
        take_away(storage, lambda: False, host="elsewhere")  # interrupted
        pytest.fail("two runs in one folder")
    assert json.loads(storage.read(LOCK_FILE))["mark"] == "theirs"


def test_a_process_that_was_stopped_for_long_finds_out(tmp_path):
    storage = open_storage(tmp_path)
    with owner_of(storage, beat_every_s=2.0) as process:
        after_a_beat(storage)
        process.send_signal(signal.SIGSTOP)  # not in the middle of a beat: that would bring its lock back
        change(storage, host="elsewhere")
        with RunLock(storage, watch_for_s=0.5, beat_every_s=FAST_S) as ours:
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=20) == 1
            after_a_beat(storage)
            assert ours.lost is None


def test_a_callback_is_told_instead(tmp_path):
    storage, told = open_storage(tmp_path), threading.Event()
    with pytest.raises(UserError, match="was taken over"), RunLock(storage, told.set, beat_every_s=FAST_S) as lock:
        take_away(storage, lambda: lock.lost)
        assert told.wait(10)


def test_a_deleted_lock_is_made_again(storage):
    with RunLock(storage, beat_every_s=FAST_S):
        storage.delete(LOCK_FILE)
        until(lambda: storage.exists(LOCK_FILE))
        until(lambda: beats(storage) > 1)


def test_of_many_that_follow_one_dead_owner_one_gets_the_run(tmp_path):
    storage = open_storage(tmp_path)
    with owner_of(storage) as process:
        process.kill()
        process.wait()
    holders, errors, all_tried = [], [], threading.Barrier(5)

    def follow():
        try:
            with RunLock(open_storage(tmp_path)) as lock:
                holders.append(lock)
                all_tried.wait(20)
        except UserError as error:
            errors.append(str(error))
            all_tried.wait(20)

    threads = [threading.Thread(target=follow) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1
    assert len(errors) == 4 and all("is in use by" in error for error in errors)


def test_a_storage_that_fails_for_a_while_ends_no_run(moto_s3, monkeypatch, capsys):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(f"{moto_s3}/faulty/run")
        with RunLock(storage, beat_every_s=FAST_S) as lock:
            until(lambda: beats(storage) > 1)
            works, proxy.rule = proxy.rule, refusal(503, "SlowDown")
            seen = len(proxy.seen)
            until(lambda: len(proxy.seen) > seen + 4)
            proxy.rule = works
            after_a_beat(storage)
            assert lock.lost is None
        assert not storage.exists(LOCK_FILE)
    assert capsys.readouterr().err.count("could not be renewed, which is tried again") == 1
