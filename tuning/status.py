"""`rarelens status`: what a run is doing and what went wrong last, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN_COLUMNS = 2000  # in a file or a pipe no line is broken


@dataclass(frozen=True)
class Training:
    """How far a training is; epochs count from 1.

    Attributes:
        name: Of its folder.
        epoch: The one that is trained, or the last one.
        epochs: Of the whole training.
        step: The last one in the log.
        steps: Of the whole training; None where the packed dataset is not found.
        loss: Of that step.
        images_per_s: All workers together.
        left_s: Time until the last step, by the last steps; None where nothing is left or known.
        best_epoch: Of those that were validated.
        best_balanced_accuracy: Its own.
    """

    name: str
    epoch: int
    epochs: int
    step: int
    steps: int | None
    loss: float | None
    images_per_s: float | None
    left_s: float | None
    best_epoch: int | None
    best_balanced_accuracy: float | None


@dataclass(frozen=True)
class Checkpoint:
    """The last one that is whole by its manifest: its path below the run folder, and how long ago it was made."""

    path: str
    ago_s: float | None


@dataclass(frozen=True)
class Process:
    """What holds the run folder's lock, in words, and whether it lives."""

    owner: str
    lives: bool


@dataclass(frozen=True)
class Incident:
    """What went wrong: kind and text of the line in the log, and how long ago it was written."""

    kind: str
    text: str
    ago_s: float | None


@dataclass(frozen=True)
class Status:
    """What a run folder tells of its run.

    Attributes:
        run: The run folder.
        step: The step of the run that is next or under way; `done`.
        steps_done: How many steps are done.
        steps: How many there are.
        process: What holds the folder; None where nothing does.
        training: Of the step, or the last one before it.
        checkpoint: Its last one.
        trials: Of the search over stage one: `done`, `failed`, `running` and `of` how many; None without a search.
        heads: Of the search over heads: `done` and `of` how many; None before it.
        cells: Of a study: `done`, `running` and `of` how many; all else is then of the cell that runs, or of the last
            one. None where it is no study.
        restarts: How often the workers were started again, over all trainings.
        incidents: How many of each kind.
        last_incident: The last one.
        log_ago_s: When the log was written last.
    """

    run: str
    step: str
    steps_done: int
    steps: int
    process: Process | None
    training: Training | None
    checkpoint: Checkpoint | None
    trials: dict[str, int] | None
    heads: dict[str, int] | None
    restarts: int
    incidents: dict[str, int]
    last_incident: Incident | None
    log_ago_s: float | None
    cells: dict[str, int] | None = None


def print_status(status: Status, as_json: bool = False) -> None:
    """Print it to stdout as a table, or as JSON with the names of the attributes."""
    console = Console()
    if as_json:
        console.print_json(data=asdict(status))
        return
    if not console.is_terminal:
        console.width = PLAIN_COLUMNS
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(status):
        table.add_row(name, Text(value))
    console.print(table)


def _rows(status: Status) -> list[tuple[str, str]]:
    rows = [("run", status.run), ("step", f"{status.step} ({status.steps_done} of {status.steps} steps done)")]
    if status.cells:
        rows.append(
            ("cells", f"{status.cells['done']} done, {status.cells['running']} running, of {status.cells['of']}")
        )
    rows.append(("process", _process(status.process)))
    if status.training:
        rows += _training(status.training)
    if status.checkpoint:
        rows.append(("checkpoint", f"{status.checkpoint.path}{_ago(status.checkpoint.ago_s)}"))
    if status.trials:
        t = status.trials
        rows.append(("trials", f"{t['done']} done, {t['failed']} failed, {t['running']} running, of {t['of']}"))
    if status.heads:
        rows.append(("heads", f"{status.heads['done']} of {status.heads['of']}"))
    rows.append(("restarts", str(status.restarts)))
    rows.append(("incidents", ", ".join(f"{n} {kind}" for kind, n in status.incidents.items()) or "none"))
    if status.last_incident:
        last = status.last_incident
        rows.append(("last incident", f"{last.kind}{_ago(last.ago_s)}: {last.text}"))
    if status.log_ago_s is not None:
        rows.append(("log", f"last line {duration(status.log_ago_s)} ago"))
    return rows


def _process(process: Process | None) -> str:
    if process is None:
        return "none holds the run folder"
    return f"{'running' if process.lives else 'dead, without having released the run folder'}: {process.owner}"


def _training(t: Training) -> list[tuple[str, str]]:
    rows = [
        ("training", t.name),
        ("epoch", f"{t.epoch} of {t.epochs}"),
        ("step of training", f"{t.step} of {t.steps or 'unknown'}"),
    ]
    figures: list[tuple[str, Any, str]] = [("loss", t.loss, ".4f"), ("images/s", t.images_per_s, ".0f")]
    rows += [(name, format(value, form)) for name, value, form in figures if value is not None]
    if t.left_s is not None:
        rows.append(("time left", f"about {duration(t.left_s)}, validation not counted"))
    if t.best_epoch is not None:
        rows.append(("best epoch", f"{t.best_epoch}, balanced accuracy {t.best_balanced_accuracy:.3f}"))
    return rows


def _ago(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} ago"


def duration(seconds: float) -> str:
    """`40 s`, `5 min`, `3.2 h` or `2.5 days`."""
    for unit_s, name, form in ((86400, "days", ".1f"), (3600, "h", ".1f"), (60, "min", ".0f")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:{form}} {name}"
    return f"{seconds:.0f} s"
