"""The search through both stages: stage one's settings as Ray Tune trials, judged by what stage two makes of them.

Two rounds. In the first Optuna proposes settings and ASHA stops trials that fall behind; in the second the best
settings are trained again with other seeds, and the one with the highest lower bound wins. All of it is chosen on val.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import TYPE_CHECKING, Any

from ray import tune

from cluster.errors import UserError
from cluster.progress import progress_bar
from cluster.storage import open_storage, worker_environment
from tuning.config import Config
from tuning.rounds import new_experiment
from tuning.settings import search_space, trained_epochs
from tuning.trial import STOPPED_FILE, TRIAL, TrialJob, TrialsSoFar, read_scores, run_trial
from tuning.trials_table import BEST_FILE, ENDED, FOLDER, TrialRow, trials_table, write_trials

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset

LOOK_EVERY_S = 2.0
BEGAN_FILE = f"{FOLDER}/began.json"


def search_stage_one(
    config: Config, dataset: Dataset, run: RunFolder, trial: Callable[..., None] = run_trial
) -> list[TrialRow]:
    """Search stage one's settings and leave the outcome in `search/` of the run folder.

    Leaves `results.parquet` (a row a trial), `search.html` and, written last, `best.yaml`, which `rarelens train` takes
    as it is. Trials that an earlier call has finished are not run again; those that it had begun go on from their
    checkpoints, and those that failed are tried again.

    Args:
        config: The whole configuration; `search` says what is tried.
        dataset: The packed dataset.
        run: The run folder.
        trial: What a Tune trial runs.

    Returns:
        All trials.

    Raises:
        UserError: The space names no setting, every trial failed, or the search ended before its last trial.
    """
    from cluster.launch import resolve_workers, start_ray
    from tuning.proposals import random_choices

    space = search_space(config)
    start_ray(config.cluster)
    _, device = resolve_workers(config.cluster)
    job = TrialJob(
        config,
        dataset.uri,
        f"{run.uri}/{FOLDER}/trials",
        device,
        working_folder=os.getcwd(),
        environment=worker_environment(),
        began_s=_began(run),
    )

    # --- what Optuna proposes
    drawn = random_choices(config) if config.search.sampler == "random" else None
    rows = _run_round("settings", job, run, trial, drawn)
    if len(rows) < config.search.trials:
        raise UserError(
            f"the search ended after {len(rows)} of {config.search.trials} trials; run it again, it goes on from there"
        )
    done = sorted((row for row in rows if row.score is not None), key=lambda row: -(row.score or 0.0))
    if not done:
        reason = next((row.error for row in rows if row.error), "no trial has said a score")
        raise UserError(
            f"all {len(rows)} trials of the search failed, the first with: {reason}; mend that and run again"
        )

    # --- the best again, with other seeds
    if config.search.seeds > 1:
        full = [row for row in done if row.status == "done"]
        finalists = (full or done)[: config.search.finalists]
        seeds = range(config.seed + 1, config.seed + config.search.seeds)
        again = [{**row.choices, "seed": seed} for row in finalists for seed in seeds]
        repeats = _run_round("seeds", job, run, trial, again)
        for row in finalists:
            same = [r.score for r in repeats if _without_seed(r.choices) == row.choices and r.score is not None]
            row.judge([row.score or 0.0, *same])
        rows += repeats
    write_trials(run, config, rows, list(space))
    return rows


def _began(run: RunFolder) -> float:
    """When the search was started for the first time, in seconds since the epoch."""
    began = run.read_json(BEGAN_FILE)
    if began is None:
        began = time.time()
        run.write_json(BEGAN_FILE, began)
    return float(began)


def is_done(run: RunFolder) -> bool:
    """Whether the search of a run folder has been finished."""
    return run.storage.exists(BEST_FILE)


def _run_round(
    name: str, job: TrialJob, run: RunFolder, trial: Callable[..., None], given: list[dict[str, Any]] | None = None
) -> list[TrialRow]:
    """One Tune experiment with the trials that have not ended yet; a row a trial, in the order of ending.

    Args:
        name: Of the round.
        job: What all trials share.
        run: The run folder.
        trial: What a Tune trial runs.
        given: The choices of each trial; None = as many as the search asks for, proposed by Optuna.
    """
    from tuning.proposals import Proposals, named, scheduler

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # what trials say lies in their own folders
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune's would return as if all were well
    for noisy in ("ray.tune", "optuna"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    wanted = None if given is None else named(given)
    begun = [row for row in TrialsSoFar(job).rows() if row.round == name and (wanted is None or row.trial in wanted)]
    rows = [row for row in begun if row.status in ENDED]
    trials = max(job.config.search.trials, len(begun)) if wanted is None else len(wanted)
    if len(rows) < trials:
        ended = {row.trial for row in rows}
        left = None
        if wanted is not None:
            left = [{"name": trial, "choices": choices} for trial, choices in wanted.items() if trial not in ended]
        watcher = _Watcher(job)
        tuner = tune.Tuner(
            _trainable(job, trial),
            param_space={} if left is None else {TRIAL: tune.grid_search(left)},
            tune_config=tune.TuneConfig(
                search_alg=Proposals(job.config, begun) if left is None else None,
                scheduler=scheduler(job.config, rows) if name == "settings" else None,
                num_samples=trials - len(rows) if left is None else 1,
                trial_dirname_creator=_trial_id,
            ),
            run_config=new_experiment(f"{run.uri}/{FOLDER}/tune/{name}", watcher),
        )
        with _watched(name, job, trials, watcher, wanted), redirect_stdout(StringIO()):
            results = tuner.fit()
        rows += [_row(job, results[i]) for i in range(len(results))]
    return sorted(rows, key=lambda row: (row.ended_s or 0.0, row.trial))


def _trainable(job: TrialJob, trial: Callable[..., None]) -> Any:
    search = job.config.search
    resources = {"cpu": search.cpus_per_trial} | ({"gpu": search.gpus_per_trial} if job.device == "cuda" else {})
    return tune.with_resources(tune.with_parameters(trial, job=job), resources)


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _row(job: TrialJob, result: Any) -> TrialRow:
    """A trial by what lies in its own folder; Tune only tells its name, its choices and why it failed."""
    trial, choices = result.config[TRIAL]["name"], result.config[TRIAL]["choices"]
    lines = read_scores(open_storage(f"{job.folder_uri}/{trial}"))
    ended = lines and lines[-1]["epochs"] == trained_epochs(job.config.stage_one.epochs, choices)
    row = TrialRow.of(trial, dict(choices), lines, "done" if ended else "stopped" if lines else "failed")
    if result.error is not None:
        said = str(result.error).strip().splitlines() or [type(result.error).__name__]
        row.status, row.error = "failed", said[-1]
    return row


class _Watcher(tune.Callback):
    """Marks trials that fell behind, so that no later driver runs them on, and knows those that were given up."""

    def __init__(self, job: TrialJob):
        self.job = job
        self.failed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; its copy is never used again."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, or ASHA has ended it."""
        given, epochs = trial.config[TRIAL], trial.last_result.get("epochs")
        if epochs is None or epochs >= trained_epochs(self.job.config.stage_one.epochs, given["choices"]):
            return
        with suppress(UserError):  # unmarked it is compared once more, should the search be taken up again
            open_storage(f"{self.job.folder_uri}/{given['name']}").write(STOPPED_FILE, b"true")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial was given up."""
        self.failed.add(trial.config[TRIAL]["name"])


@contextmanager
def _watched(
    name: str, job: TrialJob, trials: int, watcher: _Watcher, wanted: Collection[str] | None
) -> Iterator[None]:
    """A progress bar and a table of what the trials have written, which tell the truth after a restart too."""
    over = threading.Event()
    metric = job.config.stage_two.select_by.replace("_", " ")
    names, seen = list(search_space(job.config)), TrialsSoFar(job)
    with progress_bar(f"search: {name}", trials) as bar:

        def look() -> None:
            rows = seen.rows()
            for row in rows:
                row.status = "failed" if row.trial in watcher.failed else row.status
            ours = [row for row in rows if row.round == name and (wanted is None or row.trial in wanted)]
            ended = sum(row.status in ENDED for row in ours) + len(watcher.failed)
            best = max((row.score or 0.0 for row in rows), default=0.0)
            failed = f", {len(watcher.failed)} failed" if watcher.failed else ""
            bar.update(min(ended, trials), f"trials, best {metric} {best:.3f}{failed}")
            bar.show(trials_table(job.config, rows, names))

        def watch() -> None:
            while not over.wait(LOOK_EVERY_S):
                with suppress(UserError):  # of the storage: the next look may see more, and the trials do not need it
                    look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with suppress(UserError):
                look()


def _without_seed(choices: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name != "seed"}
