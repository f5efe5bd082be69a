"""Stage two's search: blocks of heads as Ray Tune trials, chosen on val alone."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import tune

from cluster.errors import UserError
from cluster.progress import Bar, progress_bar
from cluster.storage import open_storage, to_pyarrow
from trainer.features import MANIFEST_FILE, Features, read_features
from trainer.heads import Head, HeadSpec, save_heads
from tuning.block import BlockTrial, Job, finished_blocks, read_block, score_heads
from tuning.config import StageTwoConfig
from tuning.results import OWN, WINNER_FILE, SearchResult, best_by_family, head_row, rank, read_results, write_results
from tuning.space import blocks_of, draw_specs

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset
    from tuning.config import Config

FOLDER = "stage_two"
RETRIES = 1  # a trial that dies twice is recorded as failed


def search_stage_two(config: Config, dataset: Dataset, run: RunFolder) -> SearchResult:
    """Search the heads on the run's features and leave the outcome in `stage_two/` of the run folder; done once.

    Args:
        config: The whole configuration.
        dataset: The packed dataset.
        run: The run folder; it holds stage one's checkpoint and the features of train and val.
    """
    from cluster.launch import resolve_workers, start_ray
    from trainer.extraction import fetch_checkpoint
    from trainer.stage_one import load_classifier

    if run.storage.exists(f"{FOLDER}/{WINNER_FILE}"):
        return read_results(run.fetch(FOLDER))
    trained = run.read_json("stage_one/result.json")
    assert trained is not None, "stage one comes first"
    checkpoint = fetch_checkpoint(run, trained["checkpoint"])
    classifier = load_classifier(checkpoint, config, len(dataset.classes)).classifier
    start_ray(config.cluster)
    _, device = resolve_workers(config.cluster)
    result = search_heads(
        run.fetch("features/stage_one"),
        Head(classifier.weight.detach().clone(), classifier.bias.detach().clone()),
        dataset.class_counts("train"),
        config.stage_two,
        config.seed,
        f"{run.uri}/{FOLDER}",
        gpus_per_trial=0.25 if device == "cuda" else 0.0,
    )
    write_results(run.path(f"{FOLDER}/{WINNER_FILE}").parent, result)
    run.publish(FOLDER)
    return result


def search_heads(
    features_folder: str | Path,
    own: Head,
    class_counts: np.ndarray,
    config: StageTwoConfig,
    seed: int,
    storage_uri: str,
    *,
    gpus_per_trial: float = 0.0,
    trial: type[BlockTrial] = BlockTrial,
) -> SearchResult:
    """Make and score the heads that `config` asks for, and choose on val.

    Finished blocks lie below `storage_uri`, in a folder named after everything that decides their content: the same
    search goes on where it was stopped, another one never meets its files. Ray must be initialised.

    Args:
        features_folder: Features of train and val, at a path that every trial reaches.
        own: Stage one's classifier, on raw features.
        class_counts: Training samples of each class, [C].
        config: Families, budget, ranges, metric.
        seed: The run's seed.
        storage_uri: Folder or s3:// URI for the blocks.
        gpus_per_trial: Share of a GPU for each trial; 0 = one core.
        trial: What a Tune trial runs.

    Returns:
        A row for every head, the best head of each family, the winner. Heads of trials that failed have no score.

    Raises:
        UserError: The features are missing, or every trial failed.
    """
    if "://" not in storage_uri:
        storage_uri = str(Path(storage_uri).resolve())  # trials work in folders of their own
    val = read_features(features_folder, "val")
    specs = draw_specs(config, seed)
    job = Job(
        features_folder=str(Path(features_folder).resolve()),
        blocks=blocks_of(specs, config.heads_per_trial),
        own=Head(own.weight.float().cpu(), own.bias.float().cpu()),
        class_counts=np.asarray(class_counts),
        select_by=config.select_by,
        storage_uri=f"{storage_uri}/{_fingerprint(features_folder, own, class_counts, config, specs)}",
        device="cuda" if gpus_per_trial else "cpu",
    )
    errors = run_blocks(job, gpus_per_trial, trial)
    return _collect(job, errors, val)


def run_blocks(job: Job, gpus_per_trial: float = 0.0, trial: type[BlockTrial] = BlockTrial) -> dict[int, str]:
    """Run the blocks that are not finished, each as a Tune trial.

    A trial that dies is tried once more and then given up; the others go on. Given up ones are tried again by a later
    call.

    Returns:
        The error of each block that was given up.

    Raises:
        UserError: Every block of the search was given up.
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
    with progress_bar("stage two search", sum(len(specs) for specs in job.blocks)) as bar:
        watcher = _Watcher(job, bar, done)
        with redirect_stdout(StringIO()):  # Tune prints where its own files lie; ours is another table
            _tuner(job, pending, gpus_per_trial, trial, watcher).fit()
    missing = set(pending) - finished_blocks(job.storage_uri)
    errors = {block: watcher.errors.get(block, "the trial ended without a result") for block in sorted(missing)}
    if len(errors) == len(job.blocks):
        first = next(iter(errors.values()))
        raise UserError(
            f"all {len(errors)} trials of the search failed, the first with: {first}; mend that and run again"
        )
    return errors


def _collect(job: Job, errors: dict[int, str], val: Features) -> SearchResult:
    """The finished blocks, the ones that were given up, and stage one's own classifier beside them."""
    own_row = head_row(0, HeadSpec(OWN), None)
    score_heads([own_row], [job.own], val, job)
    rows, heads = [own_row], {0: job.own}
    for block in range(len(job.blocks)):
        if block in errors:
            rows += [{**row, "error": errors[block]} for row in job.rows(block)]
            continue
        block_rows, best = read_block(job, block)
        rows += block_rows
        heads |= {row["head"]: best[family] for family, row in best_by_family(block_rows, job.select_by).items()}
    chosen = best_by_family(rows, job.select_by)
    winner = max(chosen.values(), key=lambda row: rank(row, job.select_by))
    return SearchResult(
        rows=rows,
        heads={family: heads[row["head"]] for family, row in chosen.items()},
        winner=winner["family"],
        select_by=job.select_by,
    )


class _Watcher(tune.Callback):
    """Feeds the progress bar and keeps the errors of trials that were given up."""

    def __init__(self, job: Job, bar: Bar, done: set[int]):
        self.job, self.bar = job, bar
        self.errors: dict[int, str] = {}
        self.heads = sum(len(job.blocks[block]) for block in done)
        self.best = max((row["score"] or 0.0 for block in done for row in read_block(job, block)[0]), default=0.0)
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks; a terminal cannot be, and Tune's copy is never used again."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A block is finished."""
        self.heads += result["heads"]
        self.best = max(self.best, result["best"])
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A block was given up."""
        block = trial.config["block"]
        self.errors[block] = _last_line(trial.error_file)
        self.heads += len(self.job.blocks[block])
        self._show()

    def _show(self) -> None:
        failed = f", {len(self.errors)} trials failed" if self.errors else ""
        self.bar.update(self.heads, f"best {self.job.select_by.replace('_', ' ')} {self.best:.3f}{failed}")


def _tuner(
    job: Job, pending: list[int], gpus_per_trial: float, trial: type[BlockTrial], watcher: _Watcher
) -> tune.Tuner:
    filesystem, path = to_pyarrow(f"{job.storage_uri}/tune")
    attempts = {stored.path.split("/")[1] for stored in open_storage(job.storage_uri).list("tune/")}
    resources = {"cpu": 1.0, "gpu": gpus_per_trial} if gpus_per_trial else {"cpu": 1.0}
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, job=job), resources),
        param_space={"block": tune.grid_search(pending)},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"attempt-{len(attempts):03d}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[watcher],
            verbose=0,
        ),
    )


def _fingerprint(
    features_folder: str | Path, own: Head, class_counts: np.ndarray, config: StageTwoConfig, specs: list[HeadSpec]
) -> str:
    """Short hash of everything that decides what the blocks contain."""
    parts = [
        (Path(features_folder) / MANIFEST_FILE).read_bytes(),
        save_heads({OWN: Head(own.weight.float().cpu(), own.bias.float().cpu())}),
        np.asarray(class_counts, dtype=np.int64).tobytes(),
        json.dumps([config.select_by, config.heads_per_trial, *map(asdict, specs)]).encode(),
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def _last_line(error_file: str | None) -> str:
    """The exception at the end of the traceback that Tune wrote for a failed trial."""
    lines = Path(error_file).read_text().split("\n") if error_file and Path(error_file).is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "the trial died")
