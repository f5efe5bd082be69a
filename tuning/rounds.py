"""A round of the search: its blocks as Ray Tune trials, one after the other on every core or GPU share."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.credentials import keep_credentials_here
from cluster.errors import UserError
from cluster.progress import TableBar, progress_bar
from cluster.storage import open_storage, to_pyarrow
from trainer.feature_mirror import fetch_features
from trainer.features import read_features
from trainer.heads import FAMILY_NAMES, Head
from tuning.block import BlockTrial, Job, finished_blocks, read_block
from tuning.results import Row

RETRIES = 1  # a trial that dies twice is recorded as failed


Round = tuple[list[Row], np.ndarray, list[Head | None]]
"""Of each head its row, its predictions on val int32 [H, N], and itself where the round keeps heads."""


def run_round(job: Job, gpus_per_trial: float, trial: type[BlockTrial], *, all_may_fail: bool = False) -> Round:
    """Run the blocks of a round. Heads of blocks that were given up have rows with the error and predict class 0."""
    errors = run_blocks(job, gpus_per_trial, trial, all_may_fail=all_may_fail)
    rows: list[Row] = []
    predictions: list[np.ndarray] = []
    heads: list[Head | None] = []
    val = read_features(fetch_features(job.features_uri), "val")
    for block, specs in enumerate(job.blocks):
        if block in errors:
            rows += [{**row, "error": errors[block]} for row in job.rows(block)]
            predictions.append(np.zeros((len(specs), len(val)), dtype=np.int32))
            heads += [None] * len(specs)
            continue
        made = read_block(job, block)
        rows += made.rows
        predictions.append(made.predictions)
        heads += made.heads or [None] * len(specs)
    return rows, np.concatenate(predictions), heads


def run_blocks(
    job: Job, gpus_per_trial: float = 0.0, trial: type[BlockTrial] = BlockTrial, *, all_may_fail: bool = False
) -> dict[int, str]:
    """Run the blocks that are not finished, each as a Tune trial.

    A trial that dies is tried once more and then given up; the others go on. Given up ones are tried again by a later
    call.

    Args:
        job: The blocks.
        gpus_per_trial: Share of a GPU for each trial; 0 = one core.
        trial: What a Tune trial runs.
        all_may_fail: Return even if every block was given up; the search has earlier rounds to choose from.

    Returns:
        The error of each block that was given up.

    Raises:
        UserError: Every block was given up, unless all may fail.
        KeyboardInterrupt: Ctrl-C; finished blocks stay.
    """
    done = finished_blocks(job.storage_uri)
    pending = [block for block in range(len(job.blocks)) if block not in done]
    if not pending:
        return {}
    # Tune's loggers cost more than a block does, and its own Ctrl-C handler would return as if all were well.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the bar and the results tell of failed trials
    title = "stage two: heads of choice" if job.keep else "stage two: search"
    with progress_bar(title, sum(len(specs) for specs in job.blocks)) as bar:
        watcher = _Watcher(job, bar, done)
        with redirect_stdout(StringIO()):  # Tune prints where its own files lie; ours is another table
            _tuner(job, pending, gpus_per_trial, trial, watcher).fit()
    missing = set(pending) - finished_blocks(job.storage_uri)
    errors = {block: watcher.errors.get(block, "the trial ended without a result") for block in sorted(missing)}
    if len(errors) == len(job.blocks) and not all_may_fail:
        first = next(iter(errors.values()))
        raise UserError(
            f"all {len(errors)} trials of the search failed, the first with: {first}; mend that and run again"
        )
    return errors


class _Watcher(tune.Callback):
    """Feeds the bar and the table in the terminal, and keeps the errors of trials that were given up."""

    def __init__(self, job: Job, bar: TableBar, done: set[int]):
        self.job, self.bar = job, bar
        self.errors: dict[int, str] = {}
        self.tried: Counter[str] = Counter()
        self.best: dict[str, float] = {}
        for block in sorted(done):
            self._take((row["family"], row["score"]) for row in read_block(job, block).rows)
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a terminal cannot be, and Tune's copy is never used again."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A block is finished."""
        self._take(result["scores"])
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A block was given up."""
        block = trial.config["block"]
        self.errors[block] = last_line(trial.error_file)
        self._take((spec.family, None) for spec in self.job.blocks[block])
        self._show()

    def _take(self, scores: Iterable[tuple[str, float | None]]) -> None:
        for family, score in scores:
            self.tried[family] += 1
            self.best[family] = max(self.best.get(family, 0.0), score or 0.0)

    def _show(self) -> None:
        failed = f", {len(self.errors)} trials failed" if self.errors else ""
        metric = self.job.select_by.replace("_", " ")
        best = max(self.best.values(), default=0.0)
        self.bar.update(self.tried.total(), f"best {metric} {best:.3f}{failed}")
        table = Table(box=SIMPLE_HEAD)
        table.add_column("head")
        for heading in ("tried", f"best {metric} on val"):
            table.add_column(heading, justify="right")
        for family, score in sorted(self.best.items(), key=lambda item: -item[1]):
            table.add_row(FAMILY_NAMES[family], str(self.tried[family]), f"{score:.3f}")
        self.bar.show(table)


def _tuner(
    job: Job, pending: list[int], gpus_per_trial: float, trial: type[BlockTrial], watcher: _Watcher
) -> tune.Tuner:
    resources = {"cpu": 1.0, "gpu": gpus_per_trial} if gpus_per_trial else {"cpu": 1.0}
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, job=job), resources),
        param_space={"block": tune.grid_search(pending)},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=new_experiment(f"{job.storage_uri}/tune", watcher),
    )


def new_experiment(uri: str, watcher: tune.Callback) -> tune.RunConfig:
    """Of a Tune experiment in a folder of its own below `uri`: what an earlier one left is never read."""
    keep_credentials_here()
    filesystem, path = to_pyarrow(uri)
    attempts = {stored.path.split("/")[0] for stored in open_storage(uri).list()}
    return tune.RunConfig(
        name=f"attempt-{len(attempts):03d}",
        storage_path=path,
        storage_filesystem=filesystem,
        failure_config=tune.FailureConfig(max_failures=RETRIES),
        callbacks=[watcher],
        verbose=0,
    )


def last_line(error_file: str | None) -> str:
    """The exception at the end of the traceback that Tune wrote for a failed trial."""
    lines = Path(error_file).read_text().split("\n") if error_file and Path(error_file).is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "the trial died")
