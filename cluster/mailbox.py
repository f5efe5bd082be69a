"""The small actor between the workers and their driver: messages, the first mistake, signs of life, orders."""

from __future__ import annotations

import time
from typing import Any


class Mailbox:
    """Lives in a Ray actor of its own, so that a worker or the driver may die and its mail stays."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._first_failure: str | None = None
        self._beats: dict[int, dict[str, Any]] = {}
        self._run_stops = self._stopped = self._loss_is_known = False
        self._to_end: set[str] = set()

    def put(self, message: dict[str, Any]) -> None:
        """Keep a message for the driver."""
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        """The messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def fail(self, text: str) -> None:
        """Note a user's mistake; the first one counts."""
        self._first_failure = self._first_failure or text

    def failure(self) -> str | None:
        """The first mistake."""
        return self._first_failure

    def lost(self, text: str) -> None:
        """Workers were lost: told to the driver, unless it knows, or it follows from a user's mistake."""
        if not self._loss_is_known and self._first_failure is None:
            self.put({"kind": "lost", "step": 0, "text": text})
        self._loss_is_known = False

    def expect_loss(self) -> None:
        """The driver knows why workers are lost next."""
        self._loss_is_known = True

    def beat(self, beat: dict[str, Any]) -> dict[str, bool]:
        """A worker's sign of life -> its orders: `stop` after a checkpoint, `end` at once.

        Ranks that its group does not have were of a larger one before, and are forgotten.
        """
        end = beat["mark"] in self._to_end
        if not end:
            kept = {rank: other for rank, other in self._beats.items() if rank < beat["world"]}
            self._beats = {**kept, beat["rank"]: {**beat, "heard_at": time.monotonic()}}
        return {"stop": self._run_stops, "end": end}

    def gone(self, rank: int, mark: str) -> None:
        """A worker has come to its end: nothing more is expected of it."""
        if rank in self._beats and self._beats[rank]["mark"] == mark:
            del self._beats[rank]

    def beats(self) -> list[dict[str, Any]]:
        """The last sign of life of each rank, with `silent_s` since it was heard."""
        now = time.monotonic()
        return [{**beat, "silent_s": now - beat["heard_at"]} for beat in self._beats.values()]

    def stop(self) -> None:
        """Order all workers to save and leave."""
        self._run_stops = True

    def note_stopped(self) -> None:
        """A worker has left, its last checkpoint saved."""
        self._stopped = True

    def is_stopped(self) -> bool:
        """Whether the run was stopped before it was done."""
        return self._stopped

    def end(self, marks: list[str]) -> None:
        """Order workers to end at once; they are not expected to beat again."""
        self.expect_loss()
        self._to_end |= set(marks)
        self._beats = {rank: beat for rank, beat in self._beats.items() if beat["mark"] not in self._to_end}
