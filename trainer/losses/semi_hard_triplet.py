"""Semi-hard triplet loss.

Schroff, Kalenichenko, Philbin, FaceNet: A Unified Embedding for Face Recognition and Clustering, CVPR 2015 (arXiv
1503.03832), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool, paired_distance, sum_valid
from trainer.pairwise import hardest_rows, semi_hard_rows


class SemiHardTriplet(MetricLoss):
    """See `semi_hard_triplet`."""

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return semi_hard_triplet(anchors, labels, pool, self.config.margin)


def semi_hard_triplet(anchors: Tensor, anchor_labels: Tensor, pool: Pool, margin: float) -> LossSum:
    """Sum over this rank's anchors of the triplet loss with a semi-hard negative out of the whole pool.

    loss_i = max(0, margin + |z_i - z_p| - |z_i - z_n|), Euclidean distances, p the farthest positive and n the nearest
    of the negatives that are farther than p: it violates at most the margin, not the order, so that training does not
    collapse early on as it can with the hardest negatives. FaceNet forms such a triplet with every positive, of squared
    distances; one with the farthest positive needs one search of the pool an anchor.

    Anchors without a positive, or without a negative farther than it, are masked. The mean that is taken later is over
    the valid anchors, those whose loss is zero included.

    Args:
        anchors: [B, D], this rank's embeddings, raw or on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        margin: In the unit of the distance.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions.
    """
    positive, _ = hardest_rows(anchors, anchor_labels, pool.embeddings, pool.labels, pool.first)
    negative = semi_hard_rows(anchors, anchor_labels, pool.embeddings, pool.labels, positive, pool.first)
    rows = pool.embeddings.index_select(0, torch.cat([positive, negative]).clamp(min=0))
    to_positive, to_negative = paired_distance(torch.cat([anchors, anchors]), rows).chunk(2)
    losses = (margin + to_positive - to_negative).clamp(min=0)
    return sum_valid(losses, (positive >= 0) & (negative >= 0), anchor_labels)
