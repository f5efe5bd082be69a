"""Losses as pure functions of tensors: no process groups, no engine (see `trainer/pool.py` for what crosses ranks)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from trainer.losses.base import LossSum, Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.supervised_contrastive import supervised_contrastive

if TYPE_CHECKING:
    from trainer.config import LossConfig

MetricLoss = Callable[[Tensor, Tensor, Pool, "LossConfig"], LossSum]

# `stage_one.loss.name` -> (anchors [B, D], anchor_labels [B], pool, config) -> LossSum. Each takes its own settings.
METRIC_LOSSES: dict[str, MetricLoss] = {
    "supervised_contrastive": lambda anchors, labels, pool, config: supervised_contrastive(
        anchors, labels, pool, config.temperature
    ),
    "batch_hard_triplet": lambda anchors, labels, pool, config: batch_hard_triplet(
        anchors, labels, pool, config.margin
    ),
}
