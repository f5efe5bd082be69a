"""Progress bars that say how long is left: the same look in every command, plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

PLAIN_EVERY_SHARE = 0.1  # without a terminal (CI, a job's log): a line each tenth of the way

console = Console(stderr=True)


class Bar(Protocol):
    """What a long-running step says while it goes on."""

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` is a short text, such as the loss or the best score so far."""


class _TerminalBar:
    def __init__(self, progress, task) -> None:
        self._progress, self._task = progress, task

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)


class _PlainBar:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._next = title, total, 0.0

    def update(self, done: int, note: str = "") -> None:
        share = done / max(self._total, 1)
        if share >= self._next:
            console.print(f"{self._title}: {done}/{self._total} {note}", highlight=False)
            self._next = share + PLAIN_EVERY_SHARE


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Bar]:
    """A bar with title, done/total, time passed, time left and a note.

    Args:
        title: What is going on.
        total: Number of units (steps, images, heads).
    """
    if not console.is_terminal:
        yield _PlainBar(title, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield _TerminalBar(progress, progress.add_task(title, total=total, note=""))
