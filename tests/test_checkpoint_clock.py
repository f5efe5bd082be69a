"""When a checkpoint is due within an epoch: every k steps or minutes, put off by an upload, at once at a stop."""

import time

import pytest

from cluster.worker import Worker
from trainer.config import StageOneConfig
from trainer.stage_checkpoint import CheckpointClock


class Clocked(Worker):
    """What a clock asks of a worker, as the test sets it."""

    uploading = should_stop = False


@pytest.fixture
def now(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def clock_of(rank=0, step=0, **stage):
    worker = Clocked(rank, 2, "cpu")
    return CheckpointClock(worker, StageOneConfig(**stage), step), worker


def due(clock, steps):
    return [step for step in steps if clock.signals(step)[0]]


def test_every_k_steps_since_the_last_one(now):
    clock, _ = clock_of(checkpoint_every_steps=3)
    assert due(clock, range(1, 7)) == [3, 4, 5, 6]
    clock.saved(4)
    assert due(clock, range(5, 9)) == [7, 8]
    resumed, _ = clock_of(step=10, checkpoint_every_steps=3)
    assert due(resumed, range(11, 15)) == [13, 14]


def test_every_few_minutes_since_the_last_one_or_the_start(now):
    clock, _ = clock_of(checkpoint_every_minutes=2)
    now[0] += 119
    assert not due(clock, range(1, 1000))
    now[0] += 1
    assert due(clock, [1000]) == [1000]
    clock.saved(1000)
    now[0] += 119
    assert not due(clock, [1001])


def test_without_either_only_epochs_have_one_and_clocks_of_other_ranks_do_not_count(now):
    now[0] += 10**6
    assert not due(clock_of()[0], range(1, 1000))
    both = {"checkpoint_every_steps": 1, "checkpoint_every_minutes": 1}
    assert not due(clock_of(rank=1, **both)[0], range(1, 1000))


def test_what_all_ranks_say_together_decides():
    """Sums over ranks of: due, still uploading, has to stop -> save now, leave after it."""
    clock, worker = clock_of(rank=1)
    assert clock.signals(1) == (0, 0, 0)
    worker.uploading = worker.should_stop = True
    assert clock.signals(1) == (0, 1, 1)
    assert clock.decide((0, 0, 0), ends_epoch=False) == (False, False)
    assert clock.decide((1, 0, 0), ends_epoch=False) == (True, False)
    assert clock.decide((1, 1, 0), ends_epoch=False) == (False, False), "one upload at a time: it is put off"
    assert clock.decide((1, 0, 0), ends_epoch=True) == (False, False), "the epoch's own follows"
    assert clock.decide((0, 2, 1), ends_epoch=True) == (True, True), "a machine that goes away does not wait"
