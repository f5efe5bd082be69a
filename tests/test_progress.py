"""What a long step shows in the terminal: a bar, and a live table where it has one; lines where there is none."""

import io

import pytest
from rich.console import Console
from rich.table import Table

import cluster.progress
from cluster.progress import progress_bar


def shown(monkeypatch, is_terminal):
    file = io.StringIO()
    monkeypatch.setattr(cluster.progress, "console", Console(file=file, force_terminal=is_terminal, width=160))
    return file


def table_of(*cells):
    table = Table("family", "best")
    for cell in cells:
        table.add_row(cell, "0.5")
    return table


def test_a_terminal_shows_the_newest_table_below_the_bar(monkeypatch):
    file = shown(monkeypatch, is_terminal=True)
    with progress_bar("heads", 40) as bar:
        bar.update(10, "best 0.700")
        bar.show(table_of("cRT"))
        bar.update(40, "best 0.812")
        bar.show(table_of("cRT", "tau-norm"))
    last = file.getvalue()[file.getvalue().rindex("heads") :]
    assert "40/40" in last and "best 0.812" in last
    assert last.index("40/40") < last.index("family") < last.index("cRT") < last.index("tau-norm")


@pytest.mark.parametrize("steps", [1, 1000])
def test_a_log_gets_a_line_each_tenth_and_no_table(monkeypatch, steps):
    file = shown(monkeypatch, is_terminal=False)
    with progress_bar("heads", steps) as bar:
        for done in range(steps + 1):
            bar.update(done, f"best {done}")
            bar.show(table_of("cRT"))
    lines = file.getvalue().splitlines()
    assert len(lines) == min(steps, 10) + 1 and lines[-1] == f"heads: {steps}/{steps} best {steps}"
    assert "cRT" not in file.getvalue()
