"""The driver's watch: what it makes of what workers say, and of processes that say nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.driver import POLL_EVERY_S
from cluster.frozen import GONE, LOOK_FOR_S, WORKING, end_if_frozen
from cluster.mailbox import Mailbox
from cluster.watch import BEAT_EVERY_S, MACHINE_WITHIN_S, Watch, _send_to_end

ROOT = Path(__file__).parent.parent


def beat_of(rank, **more):
    """What a pulse says of itself."""
    here = {"pid": os.getpid(), "host": "h", "node": ray.get_runtime_context().get_node_id()}
    return {
        "rank": rank,
        "world": 2,
        "mark": f"of-{rank}",
        "doing": "step 4",
        "idle_s": 1.0,
        "hung": False,
        "stack": "in gather",
        **here,
        **more,
    }


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stopped_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    return process


def end(process):
    process.kill()
    process.wait()


def test_whatever_is_silent_is_told_of_within_a_minute():
    """By the defaults: the last beat has its time to come, and two looks of the driver fall just before it is due."""
    looked_at_s = max(LOOK_FOR_S, MACHINE_WITHIN_S)
    assert ClusterConfig().hang_after_s + BEAT_EVERY_S + 2 * POLL_EVERY_S + looked_at_s <= 60


class TestWatch:
    """Its judgement, of what processes say, and of real processes that say nothing."""

    @pytest.fixture
    def mailbox(self, ray_session):
        return ray.remote(num_cpus=0)(Mailbox).remote()

    @pytest.fixture
    def stopped(self):
        process = stopped_process()
        yield process
        end(process)

    def test_where_one_worker_gets_on_those_that_wait_for_it_are_not_hung(self, mailbox):
        told = []
        watch = Watch(mailbox, 45, told.append)
        waits = beat_of(0, hung=True, idle_s=50.0, stack="in barrier")

        def looks_at(other):
            orders = ray.get([mailbox.beat.remote(waits), mailbox.beat.remote(other)])
            watch.look()
            return [order["end"] for order in orders]

        for idle_s in (1.0, 2.0, 44.0):
            assert looks_at(beat_of(1, idle_s=idle_s)) == [False, False]
        assert told == []
        until(lambda: looks_at(beat_of(1, hung=True, idle_s=46.0, stack="in gather")) and told)
        (hang,) = told
        assert hang["text"] == (
            "no worker gets on: rank 0 (h) at 'step 4' for 50 s; rank 1 (h) at 'step 4' for 46 s; the group is "
            "restarted from its last checkpoint"
        )
        assert hang["stacks"] == {"0": "in barrier", "1": "in gather"}
        assert ray.get(mailbox.beats.remote()) == [] and looks_at(beat_of(1)) == [True, True]

    def test_who_is_silent_is_looked_at_sooner_where_others_wait(self, mailbox, stopped):
        told = []
        watch = Watch(mailbox, 3600, told.append)
        ray.get(mailbox.beat.remote(beat_of(1, pid=stopped.pid, stack="in forward")))

        def look():
            ray.get(mailbox.beat.remote(beat_of(0, hung=True, stack="in barrier")))
            watch.look()

        until(lambda: look() or told)
        assert "rank 1 (process" in told[0]["text"] and "is T (stopped); it was ended" in told[0]["text"]
        assert told[0]["stacks"] == {"1": "in forward"}, "of its last sign of life, and no other rank's"
        assert stopped.wait(10) == -signal.SIGKILL
        look()
        assert len(told) == 1

    def test_a_machine_that_does_not_answer_is_told_once_and_looked_at_again_when_it_has_come_back(self, mailbox):
        told = []
        watch = Watch(mailbox, 0.2, told.append)
        lost = beat_of(1, node="ab" * 28)
        for times in (1, 2):
            ray.get(mailbox.beat.remote(lost))
            watch.look()
            until(lambda times=times: watch.look() or len(told) == times)
            watch.look()
            assert len(told) == times and told[-1]["text"].endswith("s, nor does its machine")


class TestEndIfFrozen:
    def test_a_process_that_is_stopped_is_ended(self, ray_session):
        for ask in (end_if_frozen, lambda pid: ray.get(_send_to_end(beat_of(1, pid=pid)))):
            process = stopped_process()
            try:
                assert ask(process.pid) == "T (stopped)"
                assert process.wait(10) == -signal.SIGKILL
            finally:
                end(process)

    @pytest.mark.parametrize(
        ("does", "state"),
        [
            ("time.sleep(600)", WORKING),
            ("ctypes.PyDLL(None).sleep(600)", "S (sleeping)"),  # with Python's lock in hand, as a deadlock has it
            ("re.match('(a+)+$', 'a' * 60 + 'b')", WORKING),  # the same, but it computes
        ],
    )
    def test_whether_python_runs_or_something_computes_decides(self, does, state):
        begin = "import ctypes, re, time; from cluster.frozen import start_heart; start_heart(); print(flush=True)"
        process = subprocess.Popen([sys.executable, "-c", f"{begin}; {does}"], stdout=subprocess.PIPE, cwd=ROOT)
        try:
            process.stdout.readline()
            if state == WORKING:
                assert end_if_frozen(process.pid) == state and process.poll() is None
            else:  # the first look may have caught it on its way there
                until(lambda: end_if_frozen(process.pid) == state)
        finally:
            end(process)
        assert end_if_frozen(process.pid) == GONE


class TestMailbox:
    def test_an_order_to_end_is_for_a_process_and_not_for_its_number(self):
        mailbox = Mailbox()
        first = {"rank": 0, "world": 1, "mark": "a", "pid": 7, "hung": True}
        mailbox.beat(first)
        mailbox.end(["a"])
        assert mailbox.beat(first)["end"] and mailbox.beats() == []
        assert not mailbox.beat({**first, "mark": "b", "hung": False})["end"]
        mailbox.gone(0, "a")
        assert [beat["mark"] for beat in mailbox.beats()] == ["b"]
        mailbox.gone(0, "b")
        assert mailbox.beats() == []

    def test_nobody_waits_for_the_ranks_of_a_larger_group_before(self):
        mailbox = Mailbox()
        for rank in range(3):
            mailbox.beat({"rank": rank, "world": 3, "mark": f"of-{rank}"})
        mailbox.beat({"rank": 0, "world": 2, "mark": "new"})
        assert [beat["mark"] for beat in mailbox.beats()] == ["new", "of-1"]
