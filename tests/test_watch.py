"""Hangs and notices to leave, on real workers: told with rank, step and stack, ended, and gone on from."""

import os
import re
import threading
import time

import pytest
import torch

import trainer.validation
from cluster.watch import Pulse
from cluster.worker import Worker
from tests.counting import BROKEN_STEP, STEPS, in_a_network_of_its_own, run
from tests.faulty_s3 import Frozen, pass_on, proxy_to
from tuning.config import Config


def test_a_stopped_process_is_named_and_ended_and_the_run_goes_on(ray_session, tmp_path):
    steps, incidents = run(tmp_path, "stopped")
    assert steps[-1] == STEPS and sorted(set(steps)) == list(range(1, STEPS + 1))
    assert len(steps) <= STEPS + 1, "more than the step since the last checkpoint was repeated"
    (text,) = [incident["text"] for incident in incidents if incident["kind"] == "hang"]
    assert "rank 1 (process " in text and f"'step {BROKEN_STEP - 1}') has not answered for" in text
    assert "T (stopped); it was ended, and the group is restarted from its last checkpoint" in text
    (stacks,) = [incident["stacks"] for incident in incidents if incident["kind"] == "hang"]
    assert list(stacks) == ["1"] and "in count" in stacks["1"], "where it was when it was heard last"


def test_a_collective_that_one_rank_skips_is_told_with_every_ranks_stack(ray_session, tmp_path):
    steps, incidents = run(tmp_path, "skips")
    assert steps[-1] == STEPS
    (hang,) = [incident for incident in incidents if incident["kind"] == "hang"]
    assert "no worker gets on: rank 0 (" in hang["text"]
    assert f"at 'step {BROKEN_STEP - 1}' for" in hang["text"] and f"at 'step {BROKEN_STEP}' for" in hang["text"]
    assert "dist.barrier()" in hang["stacks"]["0"]
    assert "dist.all_gather_object(stops, worker.should_stop)" in hang["stacks"]["1"]


def test_sigterm_to_a_worker_is_a_last_checkpoint_and_a_restart(ray_session, tmp_path):
    steps, incidents = run(tmp_path, "told to go")
    assert steps == list(range(1, STEPS + 1)), "the step at which the notice came was saved: nothing was repeated"
    (incident,) = incidents
    assert incident["kind"] == "lost"
    assert re.fullmatch(r"rank 1 on \S+ was told to go, and has left after a last checkpoint", incident["text"])


def test_a_storage_that_is_frozen_is_told_with_the_stacks_and_the_run_goes_on_when_it_answers(
    ray_session, moto_s3, monkeypatch, tmp_path
):
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        frozen, name = Frozen(), f"step-{BROKEN_STEP}/manifest-rank1.json"
        proxy.rule = lambda handler: (frozen if handler.command == "PUT" and name in handler.path else pass_on)(handler)

        def thaw(message):
            if message.get("kind") == "hang":
                proxy.rule = pass_on
                frozen.thaw()

        steps, incidents = run(tmp_path, "none", f"{moto_s3}/{tmp_path.name}/run", thaw)
    assert steps[-1] == STEPS and sorted(set(steps)) == list(range(1, STEPS + 1))
    hang, *_ = [incident for incident in incidents if incident["kind"] == "hang"]
    assert "no worker gets on: rank 0 (" in hang["text"] and "; rank 1 (" in hang["text"]
    assert "in settle" in hang["stacks"]["0"] and "in _wait_for_upload" in hang["stacks"]["1"]


@pytest.mark.long
def test_a_network_that_drops_everything_is_told_and_the_run_goes_on(tmp_path):
    steps, incidents = in_a_network_of_its_own(tmp_path)
    assert steps[-1] == STEPS and sorted(set(steps)) == list(range(1, STEPS + 1))
    hang, *_ = [incident for incident in incidents if incident["kind"] == "hang"]
    for rank in ("0", "1"):
        assert f"rank {rank} (" in hang["text"] and f"at 'step {BROKEN_STEP - 1}' for" in hang["text"]
        assert "dist.barrier()" in hang["stacks"][rank]


class TestPulse:
    @pytest.fixture
    def clock(self, monkeypatch):
        now = [1000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        return now

    def test_a_pause_is_suspect_from_ten_times_the_longest_before(self, clock):
        pulse = Pulse(0, 2, None, hang_after_s=45)
        assert pulse.limit_s == 900  # nothing has beaten yet: graphs are built, a checkpoint is read
        pulse.beat("step 1")
        assert pulse.limit_s == 45
        for pause in (1, 7, 3):
            clock[0] += pause
            pulse.beat("step")
        assert pulse.limit_s == 70

    def test_an_evaluation_of_five_minutes_is_no_hang(self, clock):
        pulse = Pulse(0, 1, None, hang_after_s=45)
        worker = Worker(0, 1, "cpu")
        worker.beat = pulse.beat
        for _ in worker.beating(range(30), "validation"):
            clock[0] += 10
            assert not pulse._state()["hung"]
        clock[0] += 101
        state = pulse._state()
        assert state["hung"] and state["doing"] == "validation, batch 29"

    def test_nor_is_the_time_until_its_first_batch(self, clock, monkeypatch):
        """After the last step ranks wait for one another, then the graph is built."""
        pulse, worker = Pulse(0, 1, None, hang_after_s=45), Worker(0, 1, "cpu")
        worker.beat = pulse.beat
        pulse.beat("step 120")
        clock[0] += 40

        class Built(Exception):
            pass

        def build(*given, **more):
            clock[0] += 40
            assert not pulse._state()["hung"]
            raise Built
            yield

        monkeypatch.setattr(trainer.validation, "evaluation_batches", build)
        with pytest.raises(Built):
            trainer.validation.validate(None, None, Config(), worker, torch.device("cpu"))

    def test_a_sign_of_life_says_where_the_work_is(self, monkeypatch):
        """Also of a process that gets on: of one that is stopped it is the last that is known."""
        pulse, heard = Pulse(0, 1, None, hang_after_s=45), threading.Event()

        def at_work():
            pulse._thread_id = threading.get_ident()
            pulse.beat("step 1")
            heard.wait(30)

        thread = threading.Thread(target=at_work)
        thread.start()
        try:
            while not pulse._beats:
                time.sleep(0.01)
            state = pulse._state()
        finally:
            heard.set()
            thread.join()
        assert not state["hung"] and "in at_work" in state["stack"]
