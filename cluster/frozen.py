"""Whether a process still runs Python, seen from outside; one that does not is ended."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HEART, HEART_EVERY_S = "rarelens-", 0.5
LOOK_FOR_S = 3.0
GONE, WORKING = "gone", "working"


def start_heart() -> None:
    """Start a thread whose name changes for as long as Python runs in this process.

    It is seen from outside, through /proc, also where no message comes through.
    """

    def run() -> None:
        name = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
        with suppress(OSError):  # of a system without /proc
            for count in itertools.count():
                name.write_text(f"{HEART}{count % 1000}")
                time.sleep(HEART_EVERY_S)

    threading.Thread(target=run, daemon=True, name="heart").start()


def end_if_frozen(pid: int) -> str:
    """Kill a process in which Python does not run, unless it computes.

    Where it is stopped or frozen nothing runs; where a library waits for ever and holds Python's lock, the library's
    other threads do.

    Returns:
        `GONE`, `WORKING` (left alone: only its messages are late), else the state in which it was killed, e.g.
        `T (stopped)`.
    """
    before = _vital_signs(pid)
    time.sleep(LOOK_FOR_S)
    after = _vital_signs(pid)
    if before is None or after is None:
        return GONE
    if after.heart != before.heart or after.cpu_s - before.cpu_s > LOOK_FOR_S / 2:
        return WORKING
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return after.state


class _VitalSigns(NamedTuple):
    """Of a process: its state as the kernel names it, CPU seconds so far, names of threads of `start_heart`."""

    state: str
    cpu_s: float
    heart: list[str]


def _vital_signs(pid: int) -> _VitalSigns | None:
    """None where there is no such process, or only its remains."""
    process = Path(f"/proc/{pid}")
    try:
        lines = (process / "status").read_text().splitlines()
        ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        names = [file.read_text().strip() for file in process.glob("task/*/comm")]
    except OSError:
        return None
    state = next(line for line in lines if line.startswith("State:")).removeprefix("State:").strip()
    if state[:1] in "ZX":
        return None
    cpu_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return _VitalSigns(state, cpu_s, sorted(name for name in names if name.startswith(HEART)))
