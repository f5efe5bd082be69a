"""`rarelens study`: a table of methods x seeds on one packed dataset and one budget.

Every cell is a run folder of its own (`tuning.study_cells`) and belongs to the process that works in it. The same
command on another machine, or as another job of a Ray cluster, takes the cells that nobody has; whoever finishes last
makes the table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.config import nearest
from cluster.errors import UserError
from cluster.lock import RunInUse
from cluster.progress import console
from cluster.run import RunFolder, alone_in
from data_pipeline.pack import pack
from tuning.config import Config, StudyConfig
from tuning.study_cells import (
    cell_config,
    find_settings,
    finish_cell,
    pin,
    search_config,
    training_config,
    work_on,
)
from tuning.study_files import write_study
from tuning.study_layout import CELLS_FILE, ROWS_FILE, Cell, cells_of, search_name
from tuning.study_table import StudyTable, study_table

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

LOOK_AGAIN_S = 2.0
WAITING, RUNNING, ELSEWHERE, FAILED, DONE = "waiting", "running", "elsewhere", "failed", "done"


@dataclass
class Progress:
    """How far the cells are.

    Attributes:
        wanted: The study.
        states: Of each cell: `done` with its score on val, `running`, `elsewhere`, `failed` or `waiting`.
        errors: What failed, and why.
    """

    wanted: StudyConfig
    states: dict[Cell, str]
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def all_done(self) -> bool:
        """Whether nothing is left."""
        return all(state.startswith(DONE) for state in self.states.values())

    def attempt(self, name: str, work: Callable[[], None]) -> str | None:
        """Do a piece of work; None, or the state in which it could not be done."""
        try:
            work()
        except RunInUse:
            return ELSEWHERE
        except UserError as error:  # of one cell: the others go on
            self.errors[name] = str(error)
            return FAILED
        return None

    def tell_errors(self) -> None:
        """Raise a `UserError` where cells have failed."""
        for name, first in self.errors.items():
            raise UserError(
                f"{len(self.errors)} of {len(self.states)} cells failed, {name} the first: {first}; mend that, and the "
                "same command goes on"
            )

    def show(self) -> None:
        """A row a training, a column a seed."""
        done = sum(state.startswith(DONE) for state in self.states.values())
        table = Table(title=f"Study: {done} of {len(self.states)} cells done", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("training", no_wrap=True)
        for seed in self.wanted.seeds:
            table.add_column(f"seed {seed}", no_wrap=True)
        for training in self.wanted.all_trainings:
            table.add_row(training, *(self.states[Cell(training, seed)] for seed in self.wanted.seeds))
        console.print(table)


def packed_dataset(config: Config, run: RunFolder) -> Dataset:
    """The dataset of all cells, packed by the process that comes first; others wait for it."""
    waits = False
    while True:
        try:
            with alone_in(run):
                return pack(config.source, config.data, config.data.packed or f"{run.uri}/dataset", config.seed)
        except RunInUse as error:
            if not waits:
                console.print(f"waiting for the packed dataset: {error}", highlight=False, markup=False, soft_wrap=True)
            waits = True
            time.sleep(LOOK_AGAIN_S)


def run_study(
    config: Config,
    dataset: Dataset,
    run: RunFolder,
    only: Sequence[str] = (),
    finish: Callable[[Config, Dataset, RunFolder], None] = finish_cell,
) -> StudyTable | None:
    """Finish the cells that are not done and that nobody else works on, then make the table.

    Args:
        config: The study's.
        dataset: The packed dataset.
        run: The study's run folder.
        only: Names of the cells to work on, e.g. where each is a job of its own; () = all.
        finish: What finishes a cell.

    Returns:
        The table; None where cells are left to other processes.

    Raises:
        UserError: There is no such cell, or a training's settings are wrong or are not those with which a cell was
            begun, all told before anything is trained; or cells failed, told when all others are done.
    """
    cells = _checked_cells(config, dataset, run)
    names = [cell.name for cell in cells]
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"the study has no cell {unknown[0]!r}; {nearest(unknown[0], names)}")
    run.write_json(CELLS_FILE, names)
    mine = [cell for cell in cells if not only or cell.name in only]
    progress = Progress(config.study, {cell: _state(cell, run) for cell in cells})
    for training in config.study.search:
        if any(cell.training == training for cell in mine):
            progress.attempt(search_name(training), partial(find_settings, config, training, dataset, run))
    for cell in mine:
        chosen = cell_config(config, cell, dataset, run)
        if chosen is not None and not progress.states[cell].startswith(DONE):
            progress.states[cell] = RUNNING
            progress.show()
            failed = progress.attempt(cell.name, partial(work_on, chosen, dataset, finish))
            progress.states[cell] = failed or _state(cell, run)
    for cell in cells:  # others may have finished some meanwhile
        if progress.states[cell] in (WAITING, ELSEWHERE):
            progress.states[cell] = _state(cell, run, otherwise=progress.states[cell])
    progress.show()
    progress.tell_errors()
    if not progress.all_done:
        return None
    table = study_table(config, dataset, run)
    write_study(config, dataset, run, table)
    return table


def _checked_cells(config: Config, dataset: Dataset, run: RunFolder) -> list[Cell]:
    """All cells, once the configurations make sense and are those with which their run folders were begun."""
    if config.folds > 1:
        raise UserError(f"folds = {config.folds}: a study has one packed dataset, and seeds instead; set folds=1")
    for training in config.study.all_trainings:
        training_config(config, training, dataset.uri)
    for training in config.study.search:
        pin(search_config(config, training, dataset, run))
    cells = cells_of(config.study)
    for cell in cells:
        chosen = cell_config(config, cell, dataset, run)
        if chosen is not None:
            pin(chosen)
    return cells


def _state(cell: Cell, study: RunFolder, otherwise: str = WAITING) -> str:
    """By what the cell has left."""
    record = study.read_json(cell.path(ROWS_FILE))
    return otherwise if record is None else f"{DONE}, val {record['rows'][record['model']]['val']:.3f}"
