"""How a study's cell is made.

It goes through the steps of any run up to the test set: stage one, features, the search over heads. What it leaves
then are predictions: `predictions/ROW.parquet` for stage one's own classifier and the chosen head of each family, and,
written last, `predictions/rows.json`. That is the cell's one reading of test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.config import flatten, load_config
from cluster.run import RunFolder, alone_in
from trainer.evaluate import read_test, write_predictions
from trainer.extraction import TRAIN_AND_VAL, extract_features
from trainer.finetune import CHOICE_FILE, NAME
from trainer.stage_one import train_stage_one
from tuning.config import Config
from tuning.fine_tuning import fine_tune
from tuning.results import KNOB_TYPES, SearchResult, read_results
from tuning.settings import check_settings, with_choices
from tuning.stage_one import is_done, search_stage_one
from tuning.stage_two import search_stage_two
from tuning.study_layout import PREDICTIONS, ROWS_FILE, Cell, search_uri
from tuning.trials_table import BEST_FILE

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

WINNER = "winner"


def training_config(config: Config, training: str, dataset_uri: str) -> Config:
    """The configuration of a training, before its seed and its run folder are known.

    Args:
        config: The study's.
        training: Its name.
        dataset_uri: The packed dataset of all cells.

    Raises:
        UserError: A setting is unknown, cannot differ between trainings, or does not go with the others.
    """
    where = f"study.trainings.{training}"
    settings = flatten(config.study.all_trainings[training])
    check_settings(config, settings, where, "trainings")
    shared: dict[str, Any] = {
        "study": {},
        "source.path": None,  # the packed dataset is taken as it is
        "data.packed": dataset_uri,
        "evaluation.baseline": False,
    }
    return with_choices(config, {**settings, **shared}, where)


def search_config(config: Config, training: str, dataset: Dataset, study: RunFolder) -> Config:
    """The configuration around which a training's settings are searched."""
    return with_choices(training_config(config, training, dataset.uri), {"run": search_uri(study, training)})


def find_settings(config: Config, training: str, dataset: Dataset, study: RunFolder) -> None:
    """Search the settings of a training, once for all seeds.

    Raises:
        RunInUse: Another process does it.
    """
    run = RunFolder(search_uri(study, training))
    if is_done(run):
        return
    with alone_in(run):
        if not is_done(run):  # by another process just now
            search_stage_one(search_config(config, training, dataset, study), dataset, run)


def cell_config(config: Config, cell: Cell, dataset: Dataset, study: RunFolder) -> Config | None:
    """The configuration of a cell; None where its settings have not been found yet."""
    if cell.training in config.study.search:
        searched = search_uri(study, cell.training)
        if not is_done(RunFolder(searched)):
            return None
        found = load_config(Config, f"{searched}/{BEST_FILE}")
    else:
        found = training_config(config, cell.training, dataset.uri)
    return with_choices(found, {"seed": cell.seed, "run": cell.uri(study)})


def finish_cell(config: Config, dataset: Dataset, run: RunFolder) -> None:
    """What is not done yet of a cell, in a run folder that is this process's alone.

    Args:
        config: The cell's.
        dataset: The packed dataset.
        run: The cell's run folder.
    """
    steps: dict[str, Callable[[Config, Dataset, RunFolder], Any]] = {
        "stage one": train_stage_one,
        "features": lambda *cell: extract_features(*cell, TRAIN_AND_VAL),
        "stage two": search_stage_two,
        "fine-tuning": fine_tune,
        "tidying": lambda config, dataset, run: drop_checkpoints(run),
        "predictions": keep_predictions,
    }
    for name, step in steps.items():
        started = time.monotonic()
        step(config, dataset, run)
        run.add_seconds(name, time.monotonic() - started)


def work_on(
    config: Config, dataset: Dataset, finish: Callable[[Config, Dataset, RunFolder], None] = finish_cell
) -> None:
    """Take a cell's run folder and finish the cell.

    Raises:
        RunInUse: Another process has it.
        UserError: A step failed, or the cell was begun with another configuration.
    """
    run = RunFolder(config.run)
    with alone_in(run):
        pin(config, run)
        if not run.storage.exists(ROWS_FILE):
            finish(config, dataset, run)


def keep_predictions(config: Config, dataset: Dataset, run: RunFolder) -> None:
    """Read test, and leave what each row says about it, with the row's score on val."""
    rows, reads = read_test(config, dataset, run)
    searched, choice = read_results(run.fetch("stage_two")), run.read_json(CHOICE_FILE)
    said: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        if name == WINNER:  # one of the others
            continue
        write_predictions(
            run.path(f"{PREDICTIONS}/{name}.parquet"), row.test, dataset.classes, row.probabilities(row.temperature)
        )
        on_val = {"val": choice["score"]} if choice and name == NAME else _on_val(searched, name)
        said[name] = {"temperature": row.temperature, **on_val}
    run.publish(PREDICTIONS)
    tuned = choice is not None and choice["chosen"]
    run.write_json(ROWS_FILE, {"reads": reads, "model": NAME if tuned else searched.winner, "rows": said})


def drop_checkpoints(run: RunFolder) -> None:
    """Delete the checkpoints that only a training which goes on needs; the chosen one stays."""
    for training in ("stage_one", NAME):
        trained = run.read_json(f"{training}/result.json")
        if trained is None:
            continue
        for stored in run.storage.list(f"{training}/"):
            of_a_checkpoint = stored.path.startswith((f"{training}/epoch-", f"{training}/step-"))
            if of_a_checkpoint and not stored.path.startswith(f"{trained['checkpoint']}/"):
                run.storage.delete(stored.path)


def _on_val(searched: SearchResult, family: str) -> dict[str, Any]:
    """Score of a family's chosen head on val, over its seeds where it has several, and its knobs."""
    row = searched.best_row(family)
    score = row["score"] if row["seeds_score"] is None else row["seeds_score"]
    return {"val": score, "knobs": {name: row[name] for name in KNOB_TYPES if row[name] is not None}}


def pin(config: Config, run: RunFolder | None = None) -> None:
    """Keep the configuration with its run folder, or check that it is the one with which that was begun."""
    run = run or RunFolder(config.run)
    run.pin_config(config.model_dump(mode="json"), defaults=Config().model_dump(mode="json"))
