"""Where PyTorch keeps the operators that DeepSpeed has it build, and the locks that killed builds leave there.

PyTorch builds under a file called `lock`, which it holds open, and whose absence all others wait for without an end. A
process that is killed in the middle leaves the file, and every later build hangs. The operating system knows better: a
lock that no process has open is nobody's.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VARIABLE = "TORCH_EXTENSIONS_DIR"


def cache_folder() -> Path:
    """The user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def build_folder() -> Path:
    """Where operators are built: as the user says, else a folder of this machine, this environment and this PyTorch.

    PyTorch's own default is one folder for all of them: two environments build over one another in turn, and two
    machines with one home cannot know of each other's locks.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    with suppress(PackageNotFoundError):
        what = f"{socket.gethostname()}\n{sys.prefix}\n{sys.version}\n{version('torch')}"
        return cache_folder() / "rarelens" / "operators" / hashlib.sha256(what.encode()).hexdigest()[:16]
    return default_folder()


def default_folder() -> Path:
    """PyTorch's own."""
    return cache_folder() / "torch_extensions"


def prepare_builds() -> None:
    """Choose the folder for this process and its children, and remove what killed builds have left in it."""
    folder = build_folder()
    os.environ[VARIABLE] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale_locks(folder)


def stale_locks(folder: Path) -> list[Path]:
    """Locks below a folder that no process of this machine has open."""
    locks = {_identity(path): path for path in folder.rglob("lock") if path.is_file()}
    if not locks:
        return []
    for held in _open_files():
        locks.pop(held, None)
    return sorted(locks.values())


def remove_stale_locks(folder: Path) -> list[Path]:
    """Remove them; one process at a time, so that nobody removes the lock that another has just taken.

    Returns:
        What was removed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        removed = stale_locks(folder)
        for path in removed:
            path.unlink(missing_ok=True)
        return removed
    finally:
        os.close(descriptor)


def _open_files() -> Iterator[tuple[int, int]]:
    """Device and number of every file that a process of this user has open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # it has ended, or is another user's
            for entry in os.scandir(descriptors):
                with suppress(OSError):
                    yield _identity(Path(entry.path))


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino
