"""Hangs are found, told with rank, step and stack, and ended: each worker has a pulse, which the driver feels.

A worker beats at each step and batch. It is hung when nothing has beaten for `ClusterConfig.hang_after_s`, or for ten
times the longest pause that it has made so far, whichever is longer: a slow network is not a hung one. The group hangs
when all of its workers are hung: where one gets on, those that wait for it are none. A worker whose process itself does
not answer (stopped, frozen in the kernel, its machine cut off) is looked at on its machine and ended there. Ray Train
sees the death and restarts the group from its last checkpoint.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster.frozen import GONE, WORKING, end_if_frozen, start_heart

BEAT_EVERY_S = 1.0
ORDERS_WITHIN_S = 20.0
MACHINE_WITHIN_S = 12.0
"""In which a machine starts a task that looks at a process; where it does not, it passes for cut off. With the default
of `ClusterConfig.hang_after_s` that is told within 60 s."""
PAUSES = 10
"""A pause is suspect from so many times the longest one before."""
START_WITHIN_S = 900.0
"""Until the first beat: reading a checkpoint, compiling and building graphs take their time."""
SILENT_S = 5.0
QUIET_S = 2.5
"""Where one has missed two beats it is not known yet who hangs."""
CUT_OFF = "cut off"
EXIT_STATUS = 75  # EX_TEMPFAIL: try again


class Pulse:
    """The worker's side: a thread that says how long ago the work beat last, and brings the driver's orders."""

    def __init__(self, rank: int, world: int, mailbox: Any, hang_after_s: float):
        """Not started yet.

        Args:
            rank: Of this process.
            world: Number of processes.
            mailbox: Handle of the driver's `cluster.mailbox.Mailbox`.
            hang_after_s: Pause from which the work may be hung.
        """
        self.run_stops = False
        self._rank, self._mailbox, self._hang_after_s = rank, mailbox, hang_after_s
        self._doing, self._at, self._longest_s, self._beats = "starting", time.monotonic(), 0.0, 0
        self._thread_id: int | None = None
        self._ended = threading.Event()
        # Numbers of processes mean something on their own machine only, and are used again: hence a mark.
        self._mark = uuid.uuid4().hex
        self._identity: dict[str, Any] = {
            "rank": rank,
            "world": world,
            "mark": self._mark,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }

    def start(self) -> None:
        """Begin to beat; to be called by the thread that works."""
        import ray

        start_heart()
        self._thread_id = threading.get_ident()
        self._identity["node"] = ray.get_runtime_context().get_node_id()
        threading.Thread(target=self._run, daemon=True, name="pulse").start()

    def beat(self, doing: str) -> None:
        """Work goes on."""
        now = time.monotonic()
        if self._beats:
            self._longest_s = max(self._longest_s, now - self._at)
        self._doing, self._at, self._beats = doing, now, self._beats + 1

    def end(self) -> None:
        """The work is done."""
        import ray

        self._ended.set()
        with suppress(Exception):
            ray.get(self._mailbox.gone.remote(self._rank, self._mark), timeout=ORDERS_WITHIN_S)

    @property
    def limit_s(self) -> float:
        """The pause from which the work is hung."""
        return max(self._hang_after_s, PAUSES * self._longest_s) if self._beats else START_WITHIN_S

    def _run(self) -> None:
        import ray

        while not self._ended.is_set():
            with suppress(Exception):  # the driver is gone or cut off: Ray ends this process, or the link comes back
                orders = ray.get(self._mailbox.beat.remote(self._state()), timeout=ORDERS_WITHIN_S)
                if orders["end"]:
                    os._exit(EXIT_STATUS)
                self.run_stops = self.run_stops or orders["stop"]
            self._ended.wait(BEAT_EVERY_S)

    def _state(self) -> dict[str, Any]:
        idle_s = time.monotonic() - self._at
        # The stack at every beat: of a process that is stopped the last one is all that is known.
        frame = sys._current_frames().get(self._thread_id or 0)
        return {
            **self._identity,
            "doing": self._doing,
            "idle_s": idle_s,
            "hung": idle_s > self.limit_s,
            "stack": "".join(traceback.format_stack(frame)) if frame else "(no such thread)",
        }


@dataclass
class _Examination:
    """Of a silent process.

    Attributes:
        began: When, by this process's clock.
        task: Looks at it on another machine than the driver's.
        state: Of the process, once it is known; see `end_if_frozen`.
        told: Whether somebody was told of it.
    """

    began: float
    task: Any = None
    state: str | None = None
    told: bool = False


class Watch:
    """The driver's side: feels every worker's pulse, and ends a group that hangs."""

    def __init__(self, mailbox: Any, hang_after_s: float, tell: Callable[[dict[str, Any]], None]):
        """Nothing is suspect yet.

        Args:
            mailbox: Handle of the `cluster.mailbox.Mailbox`.
            hang_after_s: Silence from which a process is looked at.
            tell: Takes a message of kind `hang`.
        """
        self._mailbox, self._hang_after_s, self._tell = mailbox, hang_after_s, tell
        self._examinations: dict[str, _Examination] = {}  # by the process's mark

    def look(self) -> None:
        """Feel every pulse once; to be called about once a second."""
        import ray

        beats = ray.get(self._mailbox.beats.remote())
        # Where others wait in vain already, the one that they wait for may be silent.
        patience_s = min(SILENT_S, self._hang_after_s) if any(beat["hung"] for beat in beats) else self._hang_after_s
        silent = [beat for beat in beats if beat["silent_s"] > patience_s]
        self._forget_all_but(silent)
        found = [(beat, text) for beat in silent if (text := self._examine(beat)) is not None]
        if found:
            self._tell(_hang("; ".join(text for _, text in found), [beat for beat, _ in found]))
        elif beats and all(beat["hung"] and beat["silent_s"] < QUIET_S for beat in beats):
            self.end_all()
            self._tell(_told_of(beats))

    def end_all(self) -> None:
        """Order every worker to end at once."""
        import ray

        beats = ray.get(self._mailbox.beats.remote())
        ray.get(self._mailbox.end.remote([beat["mark"] for beat in beats]))

    def _forget_all_but(self, silent: list[dict[str, Any]]) -> None:
        """Who answers again is not to be ended by a task that was on its way."""
        import ray

        for mark in self._examinations.keys() - {beat["mark"] for beat in silent}:
            task = self._examinations.pop(mark).task
            if task is not None:
                ray.cancel(task)

    def _examine(self, beat: dict[str, Any]) -> str | None:
        """Have a silent process looked at and, unless it works, ended. What is to be told, if anything."""
        examination = self._examinations.setdefault(beat["mark"], _Examination(time.monotonic()))
        if examination.told:
            return None
        if examination.state is None:
            examination.state = _look_at(beat, examination)
        if examination.state is None:
            return None
        if examination.state in (GONE, WORKING):
            if time.monotonic() - examination.began > self._hang_after_s:
                self._examinations[beat["mark"]] = _Examination(time.monotonic())  # is looked at once more
            return None
        examination.told = True
        if examination.state != CUT_OFF:
            self._mailbox.expect_loss.remote()
        who = f"rank {beat['rank']} (process {beat['pid']} on {beat['host']}, {beat['doing']!r})"
        silence = f"{who} has not answered for {beat['silent_s']:.0f} s"
        if examination.state == CUT_OFF:
            return f"{silence}, nor does its machine"
        return (
            f"{silence} and is {examination.state}; it was ended, and the group is restarted from its last checkpoint"
        )


def _look_at(beat: dict[str, Any], examination: _Examination) -> str | None:
    """The state of a process as `end_if_frozen` found it on its machine, or `CUT_OFF`; None = not known yet."""
    import ray

    if beat["node"] == ray.get_runtime_context().get_node_id():
        return end_if_frozen(beat["pid"])
    if examination.task is None:
        examination.task = _send_to_end(beat)
    answered, _ = ray.wait([examination.task], timeout=0)
    if answered:
        try:
            return ray.get(examination.task)
        except ray.exceptions.RayError:
            return CUT_OFF
    return CUT_OFF if time.monotonic() - examination.began > MACHINE_WITHIN_S else None


def _send_to_end(beat: dict[str, Any]) -> Any:
    """`end_if_frozen` on its way to the machine of a process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node_id=beat["node"], soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": place}
    return ray.remote(**options)(end_if_frozen).remote(beat["pid"])


def _told_of(beats: list[dict[str, Any]]) -> dict[str, Any]:
    """The message of a group in which no worker gets on: the rank that went another way is among those that wait."""
    ranks = sorted(beats, key=lambda beat: beat["rank"])
    states = "; ".join(f"rank {b['rank']} ({b['host']}) at {b['doing']!r} for {b['idle_s']:.0f} s" for b in ranks)
    return _hang(f"no worker gets on: {states}; the group is restarted from its last checkpoint", ranks)


def _hang(text: str, beats: list[dict[str, Any]]) -> dict[str, Any]:
    """A message with each rank's stack, of a silent one as it was at its last sign of life."""
    return {"kind": "hang", "step": 0, "text": text, "stacks": {str(beat["rank"]): beat["stack"] for beat in beats}}
