"""Who holds a run folder: what its lock says of the process, and whether that process is still there."""

from __future__ import annotations

import getpass
import json
import os
import shlex
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Owner:
    """Who holds a lock: what `run.lock` says.

    Attributes:
        host: Name of the machine.
        boot: Of the machine's kernel, new after each start; empty where there is no /proc.
        namespace: Within which `pid` means a process: containers have their own.
        pid: The process.
        process_began: Its start in ticks since the boot, since numbers of processes are used again.
        user: Who started it.
        command: Its command line.
        started: When, by the clock of `host`.
        mark: Random, of this one lock.
        beats: Raised by the owner.
    """

    host: str = UNKNOWN
    boot: str = ""
    namespace: str = ""
    pid: int = 0
    process_began: int = 0
    user: str = UNKNOWN
    command: str = UNKNOWN
    started: str = UNKNOWN
    mark: str = ""
    beats: int = 0

    @classmethod
    def read(cls, data: bytes) -> Owner:
        """The owner by the content of `run.lock`; what is damaged there is unknown."""
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            return cls()
        if not isinstance(values, dict):
            return cls()
        known: dict[str, Any] = {
            f.name: _printable(values[f.name]) for f in fields(cls) if isinstance(values.get(f.name), type(f.default))
        }
        return cls(**known)

    def __str__(self) -> str:
        return (
            f"{self.command!r} of user {self.user} on host {self.host} (process {self.pid or UNKNOWN}), "
            f"since {self.started}"
        )

    @property
    def lives(self) -> bool | None:
        """Whether its process is there; None where that is not seen from this machine."""
        here = this_process()
        if not self.boot or any(getattr(self, name) != getattr(here, name) for name in ("host", "boot", "namespace")):
            return None
        return _began(self.pid) == self.process_began


def this_process() -> Owner:
    """This process as an owner, without a mark."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # of a container whose user has no name
        user = str(os.getuid())
    pid, name = os.getpid(), Path(sys.argv[0]).stem
    return Owner(
        host=socket.gethostname(),
        boot=_line("/proc/sys/kernel/random/boot_id"),
        namespace=_link("/proc/self/ns/pid"),
        pid=pid,
        process_began=_began(pid) or 0,
        user=user,
        command=shlex.join([name, *sys.argv[1:]]),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def _began(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None where there is none, or only its remains."""
    state_and_more = _line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(state_and_more[19]) if state_and_more and state_and_more[0] not in "ZX" else None


def _line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _link(path: str) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""


def _printable(value: Any) -> Any:
    """A text without what could command a terminal: the file may be anybody's."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else value
