"""Progress bars that say how long is left, some with a live table below: the same look in every command.

Plain lines where there is no terminal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType

PLAIN_EVERY_SHARE = 0.1  # without a terminal (CI, a job's log): a line each tenth of the way, and at the end

console = Console(stderr=True)


class Bar(Protocol):
    """What a long-running step says while it goes on."""

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are done; `note` is a short text, such as the loss or the best score so far."""


class TableBar(Bar, Protocol):
    """A bar that may have a table below it."""

    def show(self, table: RenderableType) -> None:
        """Put `table` below the bar, in the place of the one before; without a terminal there is none."""


class _TerminalBar:
    def __init__(self, progress, task, live) -> None:
        self._progress, self._task, self._live = progress, task, live

    def update(self, done: int, note: str = "") -> None:
        self._progress.update(self._task, completed=done, note=note)

    def show(self, table: RenderableType) -> None:
        self._live.update(Group(self._progress, table))


class _PlainBar:
    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._next = title, total, 0.0

    def update(self, done: int, note: str = "") -> None:
        share, ends = done / max(self._total, 1), done >= self._total
        if share >= self._next or (ends and self._next < math.inf):
            console.print(f"{self._title}: {done}/{self._total} {note}", highlight=False)
            self._next = math.inf if ends else share + PLAIN_EVERY_SHARE

    def show(self, table: RenderableType) -> None:
        """A log would repeat it again and again."""


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[TableBar]:
    """A bar with title, done/total, time passed, time left and a note.

    Args:
        title: What is going on.
        total: Number of units (steps, images, heads).
    """
    if not console.is_terminal:
        yield _PlainBar(title, total)
        return
    from rich.live import Live
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
    progress = Progress(*columns, console=console)
    with Live(progress, console=console) as live:
        yield _TerminalBar(progress, progress.add_task(title, total=total, note=""), live)
