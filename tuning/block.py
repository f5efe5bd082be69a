"""A block of heads: what one Ray Tune trial makes, scores on val and leaves behind.

A finished block is one file, `blocks/NUMBER.safetensors`: what its heads say about each sample of val, or, where the
chosen heads are made, these heads; in the header a row for each of its heads. These files, not Tune's own state, say
what is done: Tune writes its state every ten seconds or more rarely, so after a kill `Tuner.restore` would run finished
trials again.

With K folds a head is trained K times, on train and the other folds of val, and what it says about a sample of val
comes from the one time that it did not see it. The chosen heads are then trained on train and all of val.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune
from safetensors import SafetensorError
from safetensors.torch import load

from cluster.errors import UserError
from cluster.storage import open_storage, worker_environment
from trainer.closed_forms import fit_temperature
from trainer.feature_mirror import fetch_features
from trainer.features import read_features
from trainer.heads import Head, HeadSpec, parse_heads, save_heads
from trainer.stage_two import make_heads, predict
from tuning.choice import Judge
from tuning.folds import training_set, training_sets
from tuning.results import SCORES, Row, head_row

BLOCKS = "blocks/"


@dataclass(frozen=True)
class Job:
    """All blocks of a search and what their trials need.

    Attributes:
        features_uri: Features of train and val: a path that every trial reaches, or an s3:// URI.
        blocks: The heads of each block.
        own: Stage one's classifier on raw features.
        num_classes: C.
        select_by: Metric by which heads are compared.
        folds: K; 1 = heads are trained on train alone.
        storage_uri: Where block files go.
        device: `cpu` or `cuda`.
        keep: Leave the heads themselves, trained on all that may be trained on, with their temperatures.
        environment: For the trials' processes, which may be on other machines.
    """

    features_uri: str
    blocks: list[list[HeadSpec]]
    own: Head
    num_classes: int
    select_by: str
    folds: int
    storage_uri: str
    device: str = "cpu"
    keep: bool = False
    environment: dict[str, str] = field(default_factory=worker_environment)

    def first_head(self, block: int) -> int:
        """Number of a block's first head; head 0 is stage one's own."""
        return 1 + sum(len(specs) for specs in self.blocks[:block])

    def rows(self, block: int) -> list[Row]:
        """The unscored rows of a block."""
        first = self.first_head(block)
        return [head_row(first + i, spec, block) for i, spec in enumerate(self.blocks[block])]


@dataclass(frozen=True)
class Block:
    """What a finished block holds.

    Attributes:
        rows: A row a head.
        predictions: What each head says about val, int32 [H, N].
        heads: The heads, where the job keeps them.
        seconds: What it took to make them and to score them.
    """

    rows: list[Row]
    predictions: np.ndarray
    heads: list[Head]
    seconds: float


class Data:
    """The features that heads are trained on and judged by, opened once a process."""

    def __init__(self, job: Job):
        folder = fetch_features(job.features_uri)
        self.val, train = read_features(folder, "val"), read_features(folder, "train")
        place: Any = job.num_classes, job.device, job.folds + job.keep
        self.folds = list(training_sets(train, self.val, job.folds, *place))
        everything = np.arange(len(self.val) if job.folds > 1 else 0)
        self.all = training_set(train, self.val, everything, *place) if job.keep else None


def make_block(job: Job, block: int, data: Data) -> list[Row]:
    """Make and score the heads of a block, and write its file.

    Returns:
        Its rows.
    """
    began = time.perf_counter()
    specs, rows = job.blocks[block], job.rows(block)
    predictions = np.zeros((len(specs), len(data.val)), dtype=np.int32)
    logits = [torch.zeros(len(data.val), job.num_classes) for _ in specs] if job.keep else []
    sound = np.ones(len(specs), dtype=bool)
    for seen, held_out in data.folds:
        heads = make_heads(specs, seen, job.own)
        sound &= [_is_finite(head) for head in heads]
        x = data.val.x[held_out]
        predictions[:, held_out] = predict(heads, x, job.device)
        for out, head in zip(logits, heads, strict=False):
            out[torch.from_numpy(held_out)] = head.logits(torch.from_numpy(x)).float().cpu()
    judge = Judge(data.val.labels, data.val.groups, job.num_classes, job.select_by)
    fill_scores(rows, predictions, sound, judge)
    final: list[Head] = []
    if data.all is not None:
        final = [_on_cpu(head) for head in make_heads(specs, data.all, job.own)]
        labels = torch.from_numpy(data.val.labels)
        for row, out, head in zip(rows, logits, final, strict=True):
            if not _is_finite(head):  # in folds it may have stayed so
                row["status"] = "diverged"
            row["temperature"] = fit_temperature(out, labels) if row["status"] == "done" else None
    _write(job, block, Block(rows, predictions, final, time.perf_counter() - began))
    return rows


def fill_scores(rows: Sequence[Row], predictions: np.ndarray, sound: np.ndarray, judge: Judge) -> None:
    """Fill status and scores of `rows`; a head that is not finite has diverged."""
    by_metric = {
        name: Judge(judge.labels, judge.groups, judge.num_classes, name).scores(predictions) for name in SCORES
    }
    for i, row in enumerate(rows):
        if not sound[i]:
            row["status"] = "diverged"
            continue
        scores = {name: float(by_metric[name][i]) for name in SCORES}
        row.update(scores, status="done", score=scores[judge.select_by])


def read_block(job: Job, block: int) -> Block:
    """A finished block.

    Raises:
        UserError: Its file is damaged.
    """
    path = _path(block)
    try:
        data = open_storage(job.storage_uri).read(path)
        heads, metadata = parse_heads(data)
        predictions = load(data)["predictions"].numpy()
        kept = [heads[str(i)] for i in range(len(heads))]
        return Block(json.loads(metadata["rows"]), predictions, kept, float(metadata["seconds"]))
    except UserError:
        raise
    except (ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"search result {job.storage_uri}/{path} is damaged ({error}); delete it and run again"
        ) from None


def finished_blocks(storage_uri: str) -> set[int]:
    """Numbers of the blocks whose file is there."""
    return {int(Path(stored.path).stem) for stored in open_storage(storage_uri).list(BLOCKS)}


class BlockTrial(tune.Trainable):
    """A Tune trial: one block, one report. The actor is reused, so the features are opened once a process."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Open the features."""
        assert job is not None
        self.job = job
        os.environ.update(job.environment)
        if job.device == "cpu":
            torch.set_num_threads(1)  # a trial has one core
        self.data = Data(job)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next block needs nothing anew."""
        return True

    def step(self) -> dict[str, Any]:
        """Make the block; the report only feeds the bar and the table in the terminal."""
        rows = make_block(self.job, self.config["block"], self.data)
        return {"scores": [(row["family"], row["score"]) for row in rows], "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: a block that is not finished starts again."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `save_checkpoint`."""


def _write(job: Job, block: int, made: Block) -> None:
    heads = {str(i): head for i, head in enumerate(made.heads)}
    extra = {"predictions": torch.from_numpy(made.predictions)}
    data = save_heads(heads, {"rows": json.dumps(made.rows), "seconds": str(made.seconds)}, extra)
    open_storage(job.storage_uri).write(_path(block), data)


def _is_finite(head: Head) -> bool:
    return bool(torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all())


def _on_cpu(head: Head) -> Head:
    return Head(head.weight.cpu(), head.bias.cpu(), head.normalise)


def _path(block: int) -> str:
    return f"{BLOCKS}{block:05d}.safetensors"
