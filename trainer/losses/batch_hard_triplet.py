"""Batch-hard triplet loss.

Hermans, Beyer, Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017 (arXiv 1703.07737), eq. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool, paired_distance, sum_valid
from trainer.pairwise import hardest_rows


class BatchHardTriplet(MetricLoss):
    """See `batch_hard_triplet`."""

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return batch_hard_triplet(anchors, labels, pool, self.config.margin)


def batch_hard_triplet(anchors: Tensor, anchor_labels: Tensor, pool: Pool, margin: float) -> LossSum:
    """Sum over this rank's anchors of the triplet loss with the hardest positive and negative of the whole pool.

    loss_i = max(0, margin + max_p |z_i - z_p| - min_n |z_i - z_n|), Euclidean distances.

    Anchors without a positive or without a negative are masked. The mean that is taken later is over the valid anchors,
    those whose loss is zero included, as in the paper.

    Args:
        anchors: [B, D], this rank's embeddings, raw or on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        margin: In the unit of the distance.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions. Of equally hard rows one is taken.
    """
    positive, negative = hardest_rows(anchors, anchor_labels, pool.embeddings, pool.labels, pool.first)
    # The rows are found without gradient and only then gathered with it: the gradient of a maximum is that of the
    # row which attains it. One gather for both, since its backward makes one array of the pool's size.
    rows = pool.embeddings.index_select(0, torch.cat([positive, negative]).clamp(min=0))
    distances = paired_distance(torch.cat([anchors, anchors]), rows)
    to_positive, to_negative = distances.chunk(2)
    losses = (margin + to_positive - to_negative).clamp(min=0)
    return sum_valid(losses, (positive >= 0) & (negative >= 0), anchor_labels)
