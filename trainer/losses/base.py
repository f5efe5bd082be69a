"""What a loss is given and what it returns.

Shapes: B anchors of this rank, N rows of the pool, D embedding, M masked anchors, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
    """A loss before its mean is taken, because the mean is over the anchors of all ranks (`trainer.pool.global_mean`).

    Attributes:
        total: Scalar, sum over the valid anchors of this rank. With none it is a zero that still has a graph, so that
            this rank's backward takes part in the collectives of the others.
        count: Number of valid anchors of this rank.
        masked: [M] int64, labels of the anchors that have no term.
    """

    total: Tensor
    count: int
    masked: Tensor

    def masked_per_class(self, num_classes: int) -> Tensor:
        """How many anchors of each class have no term, [C] int64, on the loss's device."""
        return torch.bincount(self.masked, minlength=num_classes)


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
