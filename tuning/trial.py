"""A trial of the search: stage one on one worker, judged by what a small stage two makes of its features.

Everything that a trial leaves lies below `trials/ID/`: its checkpoint, and `scores.json` with a line for each epoch at
which it was judged. A trial that dies, or whose driver dies, goes on from there; one that was finished only says its
scores again.
"""

from __future__ import annotations

import json
import os
import time
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
from tuning.settings import with_choices
from tuning.space import draw_specs

SCORES_FILE = "scores.json"
DRAWN = "choices"
"""Name under which settings come that were drawn before, instead of one by one."""


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


def judged_epochs(config: Config) -> list[int]:
    """After how many epochs a trial is judged: where ASHA compares, and at the end."""
    epochs, at = config.stage_one.epochs, config.search.first_epochs
    judged = set()
    while at < epochs and config.search.scheduler == "asha":
        judged.add(at)
        at *= config.search.reduction
    return [*sorted(judged), epochs]


def run_trial(choices: dict[str, Any], job: TrialJob | None = None) -> None:
    """What Ray Tune calls for each trial."""
    from ray import tune

    assert job is not None
    os.environ.update(job.environment)
    if os.path.isdir(job.working_folder):
        os.chdir(job.working_folder)
    train_and_judge(job, tune.get_context().get_trial_id(), choices, tune.report)


def train_and_judge(job: TrialJob, trial_id: str, choices: dict[str, Any], report: Any) -> None:
    """Train with `choices` laid over the configuration, and report each epoch of `judged_epochs` with its score.

    Args:
        job: What all trials share.
        trial_id: Name of the trial's folder.
        choices: Setting -> value.
        report: Called with `epochs`, `score`, `own`, `family` and what was said before, if this is a repetition.
    """
    config = with_choices(job.config, choices.get(DRAWN, choices))
    storage = open_storage(f"{job.folder_uri}/{trial_id}")
    said = read_scores(storage)
    for line in said:
        report(line)
    if said and said[-1]["epochs"] == config.stage_one.epochs:
        return
    dataset = open_dataset(job.dataset_uri)

    def on_report(metrics: dict[str, Any], folder: Path) -> None:
        epochs = int(metrics["epoch"]) + 1
        if epochs not in judged_epochs(config) or any(line["epochs"] == epochs for line in said):
            return
        line = {
            "epochs": epochs,
            "at_s": round(time.time() - job.began_s, 1),
            **judge(config, dataset, folder, job.device),
        }
        said.append(line)
        storage.write(SCORES_FILE, json.dumps(said).encode())
        report(line)

    if job.device == "cpu":
        torch.set_num_threads(max(1, int(config.search.cpus_per_trial)))
    with solo_process_group(job.device):
        train_on_worker(SoloWorker(job.device, storage, on_report), config, job.dataset_uri)


def read_scores(storage: Storage) -> list[dict[str, Any]]:
    """What a trial has said so far."""
    return json.loads(storage.read(SCORES_FILE)) if storage.exists(SCORES_FILE) else []


def judge(config: Config, dataset: Dataset, checkpoint: Path, device: str) -> dict[str, Any]:
    """A small stage two on the features of a checkpoint.

    Returns:
        `score`: of the best of `search.heads` heads on val, by `stage_two.select_by`; `sd`: its standard deviation over
        resamples of val; `family` of that head; `own`: score of stage one's classifier.
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
    for seen, held_out in training_sets(train, val, folds, classes):
        predictions[:, held_out] = predict(make_heads(specs, seen, own), val.x[held_out])
    measure = Judge(val.labels, val.groups, classes, wanted.select_by)
    scores = measure.scores(predictions)
    best = int(scores.argmax())
    own_score = float(measure.scores(predict([own], val.x))[0])
    sd = float(measure.resampled(predictions[[best]]).std())
    return {"score": float(scores[best]), "sd": sd, "family": specs[best].family, "own": own_score}
