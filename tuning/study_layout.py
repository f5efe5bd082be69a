"""What a study's run folder holds, and its cells: one training with one seed, each a run folder of its own.

config.yaml, dataset/          as of any run
study/cells.json               names of the cells
cells/TRAINING-seedN/          a run; predictions/ROW.parquet, and written last predictions/rows.json
cells/TRAINING-search/         the search for a training's settings, where the study asks for one
study/table.md, results.parquet, seeds.parquet, forest.svg
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.run import RunFolder
from tuning.config import StudyConfig

FOLDER = "study"
CELLS_FILE = f"{FOLDER}/cells.json"
TABLE_FILE = f"{FOLDER}/table.md"
RESULTS_FILE = f"{FOLDER}/results.parquet"
SEEDS_FILE = f"{FOLDER}/seeds.parquet"
PICTURE_FILE = f"{FOLDER}/forest.svg"
CELLS = "cells"
PREDICTIONS = "predictions"
ROWS_FILE = f"{PREDICTIONS}/rows.json"


@dataclass(frozen=True)
class Cell:
    """One training with one seed."""

    training: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.training}-seed{self.seed}"

    def path(self, file: str) -> str:
        """Of one of its files below the study's run folder."""
        return f"{CELLS}/{self.name}/{file}"

    def uri(self, study: RunFolder) -> str:
        """Of its run folder."""
        return f"{study.uri}/{CELLS}/{self.name}"


def cells_of(wanted: StudyConfig) -> list[Cell]:
    """All cells, seed by seed, so that a study that is stopped has whole seeds."""
    return [Cell(training, seed) for seed in wanted.seeds for training in wanted.all_trainings]


def search_name(training: str) -> str:
    """Of the run folder of the search for a training's settings, below `cells/`."""
    return f"{training}-search"


def search_uri(study: RunFolder, training: str) -> str:
    """Of that run folder."""
    return f"{study.uri}/{CELLS}/{search_name(training)}"
