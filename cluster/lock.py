"""The lock of a run: two runs never write into one run folder, and a run that died leaves it free.

`run.lock` is made by `Storage.write_new`, names its owner, and holds a counter that the owner raises every few seconds.
Whether an owner lives is seen in /proc where it is of this machine, else by watching whether the counter moves: clocks
of different machines are never compared.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from types import FrameType, TracebackType

from cluster.errors import UserError
from cluster.owner import Owner, this_process
from cluster.progress import console
from cluster.storage import Storage

LOCK_FILE = "run.lock"
BEAT_EVERY_S = 10.0
WATCH_FOR_S = 25.0
"""Two beats and the time that they take on their way."""
LOOK_EVERY_S = 1.0
LAST_BEAT_WITHIN_S = 15.0


class RunInUse(UserError):
    """A living process has the run folder."""


def holder(storage: Storage, watch_for_s: float = WATCH_FOR_S) -> tuple[Owner, bool] | None:
    """Who holds the run folder, and whether that process lives; None where nobody does.

    Args:
        storage: The run folder.
        watch_for_s: How long an owner of another machine is watched before it passes for dead.
    """
    found = _read(storage)
    if found is None:
        return None
    owner = Owner.read(found)
    lives = owner.lives
    return owner, (not _is_silent(storage, found, owner, watch_for_s) if lives is None else lives)


@dataclass
class RunLock:
    """A context in which the run folder is this process's alone.

    Where the lock is taken away all the same (this process was stopped or cut off for so long that it passed for dead),
    the main thread is interrupted, and the context ends with the error that says so.

    Args:
        storage: The run folder.
        on_lost: Called on the lock's own thread when the lock was taken away; None = the main thread is interrupted.
        beat_every_s: How often the counter is raised.
        watch_for_s: How long an owner of another machine may be silent.

    Attributes:
        lost: Why the lock is no longer held; None while it is.
    """

    storage: Storage
    on_lost: Callable[[], None] | None = None
    beat_every_s: float = BEAT_EVERY_S
    watch_for_s: float = WATCH_FOR_S
    lost: str | None = field(default=None, init=False)

    def __enter__(self) -> RunLock:
        """Take the lock.

        Raises:
            RunInUse: A living process holds it; the message names it.
        """
        self._owner, self._ended = replace(this_process(), mark=uuid.uuid4().hex), threading.Event()
        self._acquire()
        self._listens = self.on_lost is None and threading.current_thread() is threading.main_thread()
        if self._listens:
            # Not SIGINT: shells start what runs in the background with that one ignored. Ray Tune listens to SIGUSR1.
            self._before = signal.signal(signal.SIGUSR2, self._interrupt)
        self._thread = threading.Thread(target=self._run, daemon=True, name="run lock")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join(LAST_BEAT_WITHIN_S)
        if self._listens:
            signal.signal(signal.SIGUSR2, self._before)
        if self.lost is not None:
            raise UserError(self.lost) from error
        # A beat under way would bring the file back. What stays is of a dead process, and is taken over.
        if not self._thread.is_alive():
            with suppress(UserError, OSError):
                if self._is_ours(_read(self.storage)):
                    self.storage.delete(LOCK_FILE)

    # --- taking it

    def _acquire(self) -> None:
        while not self.storage.write_new(LOCK_FILE, self._content()):
            found = _read(self.storage)
            if found is None:  # released just now
                continue
            owner = Owner.read(found)
            lives = owner.lives
            if lives or (lives is None and not _is_silent(self.storage, found, owner, self.watch_for_s)):
                now = Owner.read(_read(self.storage) or found)  # another one may have taken it over meanwhile
                raise RunInUse(
                    f"run folder {self.storage.uri} is in use by {now}; wait until that has ended, or stop it there, "
                    "or give another run=..."
                )
            if self._take_over(found, owner):
                return

    def _take_over(self, found: bytes, owner: Owner) -> bool:
        """Put our lock in place of a dead owner's; whether it is ours then."""
        if _read(self.storage) != found:  # another one was faster
            return False
        self.storage.write(LOCK_FILE, self._content())
        # Of several that saw the same dead owner the last one to write has it: time for the others to have written.
        time.sleep(LOOK_EVERY_S)
        if not self._is_ours(_read(self.storage)):
            return False
        _say(f"took run folder {self.storage.uri} over from {owner}, which is no longer alive")
        return True

    # --- keeping it

    def _run(self) -> None:
        reached = True
        while not self._ended.wait(self.beat_every_s) and self.lost is None:
            try:
                self._beat()
                reached = True
            except Exception as error:  # of a storage that is out of reach for a while: the run goes on without
                if reached:
                    _say(f"{LOCK_FILE} could not be renewed, which is tried again: {error}")
                reached = False

    def _beat(self) -> None:
        found = _read(self.storage)
        self._owner = replace(self._owner, beats=self._owner.beats + 1)
        if found is None and self.storage.write_new(LOCK_FILE, self._content()):
            return  # somebody had deleted it, and nobody has the folder
        found = found or _read(self.storage)
        if self._is_ours(found):
            self.storage.write(LOCK_FILE, self._content())
        elif found is not None:
            self._lose(Owner.read(found))

    def _lose(self, owner: Owner) -> None:
        self.lost = (
            f"run folder {self.storage.uri} was taken over by {owner}, while this process was stopped or cut off from "
            "the storage; it ends here, and that one goes on"
        )
        if self.on_lost is not None:
            self.on_lost()
        elif self._listens and not self._ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._ended.is_set():
            raise KeyboardInterrupt

    def _is_ours(self, data: bytes | None) -> bool:
        return data is not None and Owner.read(data).mark == self._owner.mark

    def _content(self) -> bytes:
        return json.dumps(asdict(self._owner), indent=1).encode()


def _is_silent(storage: Storage, found: bytes, owner: Owner, watch_for_s: float) -> bool:
    """Watch the lock of another machine; whether nothing in it has moved, or it is gone."""
    _say(f"{storage.uri} is locked by {owner}; watching for {watch_for_s:.0f} s whether that is alive")
    until = time.monotonic() + watch_for_s
    while (left_s := until - time.monotonic()) > 0:
        time.sleep(min(LOOK_EVERY_S, left_s))
        now = _read(storage)
        if now != found:
            return now is None
    return True


def _read(storage: Storage) -> bytes | None:
    try:
        return storage.read(LOCK_FILE)
    except UserError:
        if storage.exists(LOCK_FILE):
            raise
        return None


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
