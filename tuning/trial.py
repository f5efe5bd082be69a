"""A trial of the search: stage one on one worker, judged by what a small stage two makes of its features.

Everything that a trial leaves lies below `trials/NAME/`: its settings in `choices.json`, its checkpoint, `scores.json`
with a line for each epoch at which it was judged, and `stopped.json` where it fell behind. A trial that dies, or whose
driver dies, goes on from there; one that has ended is not run again. The name is a hash of the settings, so that the
same ones are found again by whoever proposes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.solo import SoloWorker, solo_process_group
from cluster.storage import Storage, open_storage
from data_pipeline.dataset import Dataset, open_dataset
from trainer.extraction import extract
from trainer.stage_checkpoint import load_classifier
from trainer.stage_one import train_on_worker
from trainer.stage_two import make_heads, predict
from tuning.choice import Judge
from tuning.config import Config, StageTwoConfig
from tuning.folds import number_of_folds, training_sets
from tuning.settings import trained_epochs, with_choices
from tuning.space import draw_specs
from tuning.trials_table import TrialRow

SCORES_FILE, CHOICES_FILE, STOPPED_FILE = "scores.json", "choices.json", "stopped.json"
TRIAL = "trial"
"""Under this key Ray Tune gives a trial its `name` and its `choices`."""


@dataclass(frozen=True)
class TrialJob:
    """What all trials share.

    Attributes:
        config: The configuration before a trial's choices.
        dataset_uri: The packed dataset, at a place that every trial reaches.
        folder_uri: The trials' folder; each has its own below it.
        device: `cpu` or `cuda`.
        working_folder: Of the driver; Tune moves away from it, and relative paths mean it.
        environment: For the trial's process.
        began_s: When the search began first, in seconds since the epoch.
    """

    config: Config
    dataset_uri: str
    folder_uri: str
    device: str
    working_folder: str
    environment: dict[str, str]
    began_s: float


def trial_name(choices: Mapping[str, Any], taken: Container[str] = ()) -> str:
    """A trial's name, and that of its folder: a hash of its choices, and a number where the name is taken."""
    text = json.dumps(choices, sort_keys=True)
    name = first = hashlib.sha256(text.encode()).hexdigest()[:8]
    number = 1
    while name in taken:
        number += 1
        name = f"{first}-{number}"
    return name


def judged_epochs(config: Config, epochs: int | None = None) -> list[int]:
    """After how many epochs a trial is judged: where ASHA compares, and at the end.

    Args:
        config: The trial's configuration.
        epochs: That it is trained for; None = as the configuration says.
    """
    epochs, at = epochs or config.stage_one.epochs, config.search.first_epochs
    judged = set()
    while at < epochs and config.search.scheduler == "asha":
        judged.add(at)
        at *= config.search.reduction
    return [*sorted(judged), epochs]


def run_trial(given: dict[str, Any], job: TrialJob | None = None) -> None:
    """What Ray Tune calls for each trial."""
    from ray import tune

    assert job is not None
    os.environ.update(job.environment)
    if os.path.isdir(job.working_folder):
        os.chdir(job.working_folder)
    train_and_judge(job, given[TRIAL]["name"], given[TRIAL]["choices"], tune.report)


def train_and_judge(
    job: TrialJob, name: str, choices: dict[str, Any], report: Callable[[dict[str, Any]], None]
) -> None:
    """Train with `choices` laid over the configuration, and report each epoch of `judged_epochs` with its score.

    Args:
        job: What all trials share.
        name: Of the trial's folder.
        choices: Setting -> value.
        report: Called with `epochs`, `score`, `own`, `family` and what was said before, if this is a repetition.
    """
    config = with_choices(job.config, choices)
    storage = open_storage(f"{job.folder_uri}/{name}")
    storage.write(CHOICES_FILE, json.dumps(choices).encode())
    said = read_scores(storage)
    for line in said:
        report(line)
    if said and said[-1]["epochs"] == config.stage_one.epochs:
        return
    dataset = open_dataset(job.dataset_uri)
    untold: list[dict[str, Any]] = []

    def on_report(metrics: dict[str, Any], folder: Path) -> None:
        epochs = int(metrics["epoch"]) + 1
        if config.stage_one.select_by not in metrics:  # of the middle of an epoch
            return
        if epochs not in judged_epochs(config) or any(line["epochs"] == epochs for line in said):
            return
        line = {
            "epochs": epochs,
            "at_s": round(time.time() - job.began_s, 1),
            **judge(config, dataset, folder, job.device),
        }
        said.append(line)
        storage.write(SCORES_FILE, json.dumps(said).encode())
        untold.append(line)

    def on_kept() -> None:
        while untold:  # last of all, since Tune may end the trial here
            report(untold.pop())

    if job.device == "cpu":
        torch.set_num_threads(max(1, int(config.search.cpus_per_trial)))
    with solo_process_group(job.device):
        train_on_worker(SoloWorker(job.device, storage, on_report, on_kept), config, job.dataset_uri)


def read_scores(storage: Storage) -> list[dict[str, Any]]:
    """What a trial has said so far."""
    return json.loads(storage.read(SCORES_FILE)) if storage.exists(SCORES_FILE) else []


class TrialsSoFar:
    """What the trials of a search have written; read again only where it has grown."""

    def __init__(self, job: TrialJob):
        self._storage, self._config = open_storage(job.folder_uri), job.config
        self._read: dict[str, tuple[int, Any]] = {}

    def rows(self) -> list[TrialRow]:
        """A row a trial that has begun, by name; one that has not ended is under way."""
        said: dict[str, dict[str, Any]] = {}
        for stored in self._storage.list():
            name, _, file = stored.path.partition("/")
            if file not in (CHOICES_FILE, SCORES_FILE, STOPPED_FILE):
                continue
            if self._read.get(stored.path, (-1, None))[0] != stored.bytes:
                self._read[stored.path] = stored.bytes, json.loads(self._storage.read(stored.path))
            said.setdefault(name, {})[file] = self._read[stored.path][1]
        return [self._row(name, files) for name, files in sorted(said.items()) if CHOICES_FILE in files]

    def _row(self, name: str, files: Mapping[str, Any]) -> TrialRow:
        choices, lines = files[CHOICES_FILE], files.get(SCORES_FILE, [])
        ended = bool(lines) and lines[-1]["epochs"] == trained_epochs(self._config.stage_one.epochs, choices)
        status = "done" if ended else "stopped" if STOPPED_FILE in files else "under way"
        return TrialRow.of(name, choices, lines, status)


def judge(config: Config, dataset: Dataset, checkpoint: Path, device: str) -> dict[str, Any]:
    """A small stage two on the features of a checkpoint.

    Returns:
        `score`: of the best of `search.heads` heads on val, by `stage_two.select_by`; `noise`: what resamples of val,
        the same ones for every trial, add to it; `sd`: their standard deviation; `family` of that head; `own`: score of
        stage one's classifier.
    """
    classes = len(dataset.classes)
    where = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    model = load_classifier(checkpoint, config, classes).to(where)
    train, val = (extract(model, dataset, config, split, device=where) for split in ("train", "val"))
    own = model.cpu().own_head()
    wanted = config.stage_two
    specs = draw_specs(StageTwoConfig(**{**wanted.model_dump(), "heads": config.search.heads}), config.seed)
    folds = number_of_folds(wanted.folds, val.labels, val.groups)
    predictions = np.zeros((len(specs), len(val)), dtype=np.int32)
    for seen, held_out in training_sets(train, val, folds, classes, device):
        predictions[:, held_out] = predict(make_heads(specs, seen, own), val.x[held_out], device)
    measure = Judge(val.labels, val.groups, classes, wanted.select_by)
    scores = measure.scores(predictions)
    best = int(scores.argmax())
    own_score = float(measure.scores(predict([own], val.x))[0])
    noise = measure.resampled(predictions[[best]])[0] - scores[best]
    return {
        "score": float(scores[best]),
        "sd": float(noise.std()),
        "family": specs[best].family,
        "own": own_score,
        "noise": noise.round(4).tolist(),
    }
