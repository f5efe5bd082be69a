"""A block of heads: what one Ray Tune trial makes, scores on val and leaves behind.

A finished block is one file, `blocks/NUMBER.safetensors`: the best head of each family in it, and in the header a row
for each of its heads. These files, not Tune's own state, say what is done: Tune writes its state every ten seconds or
more rarely, so after a kill `Tuner.restore` would run finished trials again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import tune

from cluster.errors import UserError
from cluster.storage import open_storage
from trainer.features import Features, read_features
from trainer.heads import Head, HeadSpec, parse_heads, save_heads
from trainer.metrics import METRICS
from trainer.stage_two import TrainingSet, make_heads, predict
from tuning.results import SCORES, Row, best_by_family, head_row

BLOCKS = "blocks/"


@dataclass(frozen=True)
class Job:
    """All blocks of a search and what their trials need.

    Attributes:
        features_folder: Features of train and val, at a path that every trial reaches.
        blocks: The heads of each block.
        own: Stage one's classifier on raw features.
        class_counts: Training samples of each class, [C].
        select_by: Metric by which heads are compared.
        storage_uri: Where block files go.
        device: `cpu` or `cuda`.
    """

    features_folder: str
    blocks: list[list[HeadSpec]]
    own: Head
    class_counts: np.ndarray
    select_by: str
    storage_uri: str
    device: str = "cpu"

    def first_head(self, block: int) -> int:
        """Number of a block's first head; head 0 is stage one's own."""
        return 1 + sum(len(specs) for specs in self.blocks[:block])

    def rows(self, block: int) -> list[Row]:
        """The unscored rows of a block."""
        first = self.first_head(block)
        return [head_row(first + i, spec, block) for i, spec in enumerate(self.blocks[block])]


def make_block(job: Job, block: int, train: TrainingSet, val: Features) -> list[Row]:
    """Make and score the heads of a block, and write its file.

    Returns:
        Its rows.
    """
    heads = make_heads(job.blocks[block], train, job.own)
    rows = job.rows(block)
    score_heads(rows, heads, val, job)
    first = job.first_head(block)
    best = {family: heads[row["head"] - first] for family, row in best_by_family(rows, job.select_by).items()}
    best = {family: Head(head.weight.cpu(), head.bias.cpu(), head.normalise) for family, head in best.items()}
    open_storage(job.storage_uri).write(_path(block), save_heads(best, {"rows": json.dumps(rows)}))
    return rows


def score_heads(rows: list[Row], heads: list[Head], val: Features, job: Job) -> None:
    """Fill status and scores of `rows` from what `heads` predict on val; a head that is not finite has diverged."""
    predictions = predict(heads, val.x, job.device)
    for row, head, predicted in zip(rows, heads, predictions, strict=True):
        if not (torch.isfinite(head.weight).all() and torch.isfinite(head.bias).all()):
            row["status"] = "diverged"
            continue
        scores = {name: float(METRICS[name](val.labels, predicted, len(job.class_counts))) for name in SCORES}
        row.update(scores, status="done", score=scores[job.select_by])


def read_block(job: Job, block: int) -> tuple[list[Row], dict[str, Head]]:
    """Rows and best heads of a finished block.

    Raises:
        UserError: Its file is damaged.
    """
    try:
        heads, metadata = parse_heads(open_storage(job.storage_uri).read(_path(block)))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"search result {job.storage_uri}/{_path(block)} is damaged ({error}); delete it and run again"
        ) from None
    return json.loads(metadata["rows"]), heads


def finished_blocks(storage_uri: str) -> set[int]:
    """Numbers of the blocks whose file is there."""
    return {int(Path(stored.path).stem) for stored in open_storage(storage_uri).list(BLOCKS)}


class BlockTrial(tune.Trainable):
    """A Tune trial: one block, one report. The actor is reused, so the features are opened once a process."""

    def setup(self, config: dict[str, Any], job: Job | None = None) -> None:
        """Open the features."""
        assert job is not None
        self.job = job
        if job.device == "cpu":
            torch.set_num_threads(1)  # a trial has one core
        train = read_features(job.features_folder, "train")
        self.train_set = TrainingSet(train.x, train.labels, job.class_counts, device=job.device)
        self.val = read_features(job.features_folder, "val")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next block needs nothing anew."""
        return True

    def step(self) -> dict[str, Any]:
        """Make the block; the report only feeds the progress bar."""
        rows = make_block(self.job, self.config["block"], self.train_set, self.val)
        scores = [row["score"] for row in rows if row["status"] == "done"]
        return {"heads": len(rows), "best": max(scores, default=0.0), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing to keep: a block that is not finished starts again."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """See `save_checkpoint`."""


def _path(block: int) -> str:
    return f"{BLOCKS}{block:05d}.safetensors"
