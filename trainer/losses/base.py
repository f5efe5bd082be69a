"""What a loss is given and what it returns.

Shapes: B anchors of this rank, N rows of the pool, D embedding, M masked anchors, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from trainer.pairwise import accumulation_dtype

if TYPE_CHECKING:
    from trainer.loss_config import LossConfig

# Rows that were normalised in bf16 are off by up to 2^-8; raw embeddings by far more.
UNIT_LENGTH_TOLERANCE = 0.01


@dataclass(frozen=True)
class Pool:
    """All embeddings that an anchor is compared with, itself included.

    Attributes:
        embeddings: [N, D], in rank order, the same on every rank.
        labels: [N], int64 class of each row, in [0, C).
        first: Row at which this rank's anchors begin: anchor i is row `first + i`.
    """

    embeddings: Tensor
    labels: Tensor
    first: int


@dataclass(frozen=True)
class LossSum:
    """A loss before its mean is taken, because the mean is over the terms of all ranks (`trainer.pool.global_mean`).

    Attributes:
        total: Scalar, sum over the valid anchors of this rank. With none it is a zero that still has a graph, so that
            this rank's backward takes part in the collectives of the others.
        count: Number of terms of this rank: valid anchors; for `all_triplet` triplets. A loss of the whole pool, the
            same on every rank, is one term of each rank: their mean is the loss itself.
        masked: [M] int64, labels of the anchors that have no term.
    """

    total: Tensor
    count: int
    masked: Tensor


class MetricLoss(nn.Module):
    """Base of the metric losses: checks what they are given; a subclass defines `loss_sum`.

    Centres, proxies and prototypes are parameters, the same on every rank; their gradient is that of one rank with the
    global batch after the engine's mean over ranks, as the backbone's is (see `trainer.pool.global_mean`).

    Args:
        config: `stage_one.loss`.
        num_classes: C.
        dim: D of what is compared.
        class_counts: [C], training samples of each class.

    Attributes:
        needs_unit_length: Embeddings must lie on the unit sphere.
    """

    needs_unit_length = False

    def __init__(self, config: LossConfig, num_classes: int, dim: int, class_counts: Tensor) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes

    def forward(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float = 0.0) -> LossSum:
        """The loss of this rank's anchors.

        Args:
            anchors: [B, D], this rank's embeddings.
            labels: [B] int64.
            pool: Of all ranks, rows of past batches behind them; its rows `first` to `first + B` are the anchors.
            progress: Share of the run that is done, in [0, 1].

        Raises:
            UserError: The loss is one of unit vectors and an anchor is none; anchors and pool differ in dtype.
        """
        if anchors.dtype != pool.embeddings.dtype:
            raise UserError(
                f"{self.config.name}: anchors are {anchors.dtype} and the pool is {pool.embeddings.dtype}; convert "
                f"them to one type"
            )
        if self.needs_unit_length:
            _check_unit_length(anchors, self.config.name)
        return self.loss_sum(anchors, labels, pool, progress)

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `forward`, whose checks are done."""
        raise NotImplementedError


def sum_valid(losses: Tensor, valid: Tensor, labels: Tensor) -> LossSum:
    """Add up the terms of the valid anchors.

    Args:
        losses: [B]; may hold anything, infinity and NaN too, where `valid` is false.
        valid: [B] bool.
        labels: [B] int64.
    """
    # `where`, not a product: 0 * inf is NaN. Masked anchors keep a gradient of exactly zero.
    total = torch.where(valid, losses, torch.zeros_like(losses)).sum()
    return LossSum(total, int(valid.sum()), labels[~valid])


def paired_distance(left: Tensor, right: Tensor) -> Tensor:
    """Euclidean distance of paired rows, [B, D] and [B, D] -> [B], float32 at least.

    Its gradient between equal rows, where there is none, is zero instead of NaN.
    """
    dtype = accumulation_dtype(left)
    squared = (left.to(dtype) - right.to(dtype)).square().sum(1)
    apart = squared != 0  # true for NaN, which stays visible
    return torch.where(apart, torch.where(apart, squared, torch.ones_like(squared)).sqrt(), torch.zeros_like(squared))


def _check_unit_length(rows: Tensor, name: str) -> None:
    lengths = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=accumulation_dtype(rows))
    wrong = lengths[(lengths - 1).abs() > UNIT_LENGTH_TOLERANCE]  # not of NaN: the engine tells of a diverged run
    if len(wrong):
        raise UserError(
            f"{name} needs embeddings of unit length and was given one of length {float(wrong[0]):.4g}; set "
            f"stage_one.loss.normalise: true"
        )
