"""What the driver does beside its workers: it hands on their messages, feels their pulse, and listens for SIGTERM."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

from cluster.watch import Watch
from cluster.worker import RunStopped

POLL_EVERY_S = 0.5
_OF_A_DEAD_ACTOR = (r"\bpid: (\d+)", r"\bip: (\S+)", r"because (?:of )?([^.\n]+)")
"""Of the text of Ray's ActorDiedError."""


def fit(trainer: Any) -> Any:
    """`trainer.fit()` on a thread of its own: on the main one Ray Train takes Ctrl-C over and exits with status 0."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # handed to the main thread
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def fit_while_it_gets_on(
    attempt: Callable[[], Any], newest_step: Callable[[], int], may_begin_anew: Callable[[], bool]
) -> Any:
    """Train, and begin anew where Ray Train has given up after a newer checkpoint than the last time.

    Ray Train counts deaths over the whole run, and a long one on spot machines has many. Those in a row count.

    Args:
        attempt: `fit` of a new trainer.
        newest_step: Of the checkpoints that there are, put right for Ray Train before each attempt.
        may_begin_anew: Whether there is a reason to; asked after a failure.

    Returns:
        What `attempt` does.
    """
    import ray.train

    reached = newest_step()
    while True:
        try:
            return attempt()
        except ray.train.TrainingFailedError:
            if not may_begin_anew():
                raise
            before, reached = reached, newest_step()
            if reached <= before:
                raise


@contextmanager
def messages_delivered(mailbox: Any, watch: Watch, on_message: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Hand messages to the driver and look after the workers while they run; hand over what is left at the end.

    Each on its own thread: a message may wait for a storage for long. Where the driver cannot take one (its disk is
    full, its bucket is closed), the run ends with that error, since what is told later would be lost.
    """
    import ray

    done = threading.Event()
    failures: list[Exception] = []

    def deliver() -> None:
        for message in [] if failures else ray.get(mailbox.drain.remote()):
            on_message(message)

    def look() -> None:
        # After a failure also whoever has started since; those that are only starting ask for one first.
        (watch.end_all if failures else watch.look)()

    def again_and_again(work: Callable[[], None]) -> None:
        while not done.wait(POLL_EVERY_S):
            with suppress(ray.exceptions.RayError):  # Ray itself is going down: `fit` tells why
                try:
                    work()
                except ray.exceptions.RayError:
                    raise
                except Exception as error:
                    failures.append(error)
                    ray.get(mailbox.fail.remote(str(error)))

    threads = [threading.Thread(target=again_and_again, args=[work], daemon=True) for work in (deliver, look)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        with suppress(ray.exceptions.RayError):
            deliver()


def loss_teller(mailbox: Any) -> Any:
    """What Ray Train's controller calls, in its own process, when workers have died or raised."""
    from ray.train import UserCallback

    class LossTeller(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            with suppress(Exception):  # the controller would not survive it
                mailbox.lost.remote(why_lost(worker_exceptions))

    return LossTeller()


def why_lost(errors: dict[int, Exception]) -> str:
    """Ray Train's errors, by rank, in one sentence: those that died before those that lost their peer by it."""
    deaths = {rank: error for rank, error in errors.items() if hasattr(error, "health_check_failure")}
    texts = []
    for rank, error in sorted((deaths or errors).items()):
        said = str(error)
        if rank in deaths:
            pid, host, reason = (re.search(pattern, said) for pattern in _OF_A_DEAD_ACTOR)
            where = f" (process {pid[1]} on {host[1]})" if pid and host else ""
            texts.append(f"rank {rank}{where} died: {reason[1] if reason else said.splitlines()[-1]}")
        else:
            texts.append(f"rank {rank} failed: {said.strip().splitlines()[-1]}")
    return "; ".join(texts)


@contextmanager
def sigterm_stops(mailbox: Any, gracefully: bool) -> Iterator[None]:
    """Let SIGTERM to the driver (`ray job stop`, a pod's end) end the run; a second one ends it at once.

    Args:
        mailbox: Brings the order to the workers.
        gracefully: They save a checkpoint first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked or not gracefully:
            raise RunStopped
        asked = True
        mailbox.stop.remote()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
