"""The search through both stages: stage one's settings as Ray Tune trials, judged by what stage two makes of them.

Two rounds. In the first Optuna proposes settings and ASHA stops trials that fall behind; in the second the best
settings are trained again with other seeds, and the one with the highest lower bound wins. All of it is chosen on val.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from cluster.errors import UserError
from cluster.progress import progress_bar
from cluster.storage import open_storage, to_pyarrow, worker_environment
from tuning.config import Config
from tuning.rounds import RETRIES, last_line
from tuning.settings import search_space, tune_space
from tuning.trial import DRAWN, TrialJob, judged_epochs, read_scores, run_trial
from tuning.trials_table import BEST_FILE, FOLDER, TrialRow, write_trials

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset

SNAPSHOT_EVERY_S = 1
"""Tune's state on disk lags by this much; what a trial has done lies in its own folder and does not lag."""
LOOK_EVERY_S = 2.0
BEGAN_FILE = f"{FOLDER}/began.json"


def search_stage_one(
    config: Config, dataset: Dataset, run: RunFolder, trial: Callable[..., None] = run_trial
) -> list[TrialRow]:
    """Search stage one's settings and leave the outcome in `search/` of the run folder.

    Leaves `results.parquet` (a row a trial), `search.html` and, written last, `best.yaml`, which `rarelens train` takes
    as it is. Trials that an earlier call has finished are not run again.

    Args:
        config: The whole configuration; `search` says what is tried.
        dataset: The packed dataset.
        run: The run folder.
        trial: What a Tune trial runs.

    Returns:
        All trials.

    Raises:
        UserError: The space names no setting, or every trial failed.
    """
    from cluster.launch import resolve_workers, start_ray

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
    rows = _run_round("settings", job, run, trial, config.search.trials, tune_space(space))
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
        repeats = _run_round("seeds", job, run, trial, len(again), {DRAWN: tune.grid_search(again)})
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
    name: str, job: TrialJob, run: RunFolder, trial: Callable[..., None], trials: int, space: dict[str, Any]
) -> list[TrialRow]:
    """One Tune experiment, taken up again where an earlier driver left it; a row a trial, in the order of ending."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CDRAWNBACK_LOGGERS", "1")  # what trials say lies in their own folders
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune's would return as if all were well
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(SNAPSHOT_EVERY_S)
    for noisy in ("ray.tune", "optuna"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    with _watched(name, job, trials), redirect_stdout(StringIO()):
        results = _tuner(name, job, run, trial, trials, space).fit()
    epochs = job.config.stage_one.epochs
    rows = [_row(name, job, results[i], epochs) for i in range(len(results))]
    return sorted(rows, key=lambda row: (row.ended_s or 0.0, row.trial))


def _tuner(
    name: str, job: TrialJob, run: RunFolder, trial: Callable[..., None], trials: int, space: dict[str, Any]
) -> tune.Tuner:
    filesystem, path = to_pyarrow(f"{run.uri}/{FOLDER}/tune")
    search = job.config.search
    resources = {"cpu": search.cpus_per_trial} | ({"gpu": search.gpus_per_trial} if job.device == "cuda" else {})
    trainable = tune.with_resources(tune.with_parameters(trial, job=job), resources)
    if tune.Tuner.can_restore(f"{path}/{name}", storage_filesystem=filesystem):
        return tune.Tuner.restore(
            f"{path}/{name}",
            trainable,
            storage_filesystem=filesystem,
            resume_unfinished=True,
            resume_errored=True,
            param_space=space,
        )
    drawn = DRAWN in space
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=None if drawn else _proposals(job.config),
            scheduler=None if drawn else _scheduler(job.config),
            num_samples=1 if drawn else trials,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            verbose=0,
        ),
    )


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _proposals(config: Config) -> Any:
    if config.search.sampler == "random":
        return tune.search.BasicVariantGenerator(random_state=config.seed)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric="score", mode="max", seed=config.seed)


def _scheduler(config: Config) -> Any:
    if len(judged_epochs(config)) == 1:
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="epochs",
        metric="score",
        mode="max",
        max_t=config.stage_one.epochs,
        grace_period=config.search.first_epochs,
        reduction_factor=config.search.reduction,
    )


def _row(name: str, job: TrialJob, result: Any, epochs: int) -> TrialRow:
    """A trial by what lies in its own folder; Tune only tells its name, its choices and why it failed."""
    trial_id = Path(result.path).name
    choices = dict(result.config.get(DRAWN, result.config))
    lines = read_scores(open_storage(f"{job.folder_uri}/{trial_id}"))
    row = TrialRow(trial_id, name, choices, "failed", lines=lines)
    if lines:
        last = lines[-1]
        row.epochs, row.score, row.own, row.family = last["epochs"], last["score"], last["own"], last["family"]
        row.sd, row.ended_s = last["sd"], last["at_s"]
        row.status = "done" if row.epochs == epochs else "stopped"
    if result.error is not None:
        row.status, row.error = "failed", last_line(str(Path(result.path) / "error.txt")) or str(result.error)
    return row


@contextmanager
def _watched(name: str, job: TrialJob, trials: int) -> Iterator[None]:
    """A progress bar that reads what the trials have written, so that it tells the truth after a restart too."""
    ended = threading.Event()
    metric = job.config.stage_two.select_by.replace("_", " ")
    with progress_bar(f"search: {name}", trials) as bar:

        def look() -> None:
            storage = open_storage(job.folder_uri)
            files = [stored.path for stored in storage.list() if stored.path.endswith("scores.json")]
            said = [read_scores(open_storage(f"{job.folder_uri}/{Path(path).parent}")) for path in files]
            best = max((line["score"] for lines in said for line in lines), default=0.0)
            bar.update(min(len(said), trials), f"trials judged, best {metric} {best:.3f}")

        def watch() -> None:
            while not ended.wait(LOOK_EVERY_S):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()


def _without_seed(choices: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if name != "seed"}
