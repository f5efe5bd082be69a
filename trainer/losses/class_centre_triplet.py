"""Class-centre involved triplet loss and its progressive schedule (PCCT).

Lei et al., Class-Center Involved Triplet Loss for Skin Disease Classification on Imbalanced Data, ISBI 2020; Chen et
al., PCCT: Progressive Class-Center Triplet Loss for Imbalanced Medical Image Classification, 2022 (arXiv 2207.04793).

From the papers' abstracts: positive and negative of a triplet are replaced by their class centres; PCCT trains first
with triplets drawn equally from each class, then with centres. Chosen here, where only the abstracts were at hand: the
centre is the mean over the pool, the negative one the nearest, and the first stage's triplets are batch-hard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool, paired_distance, sum_valid
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.pairwise import accumulation_dtype


class ClassCentreTriplet(MetricLoss):
    """See `class_centre_triplet`."""

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return class_centre_triplet(anchors, labels, pool, self.config.margin, self.num_classes)


class ProgressiveClassCentreTriplet(MetricLoss):
    """PCCT: batch-hard triplets until `centres_from` of the run, class-centre triplets from there.

    On P x K batches the first stage is class-balanced: each class has as many anchors.
    """

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        if progress < self.config.centres_from:
            return batch_hard_triplet(anchors, labels, pool, self.config.margin)
        return class_centre_triplet(anchors, labels, pool, self.config.margin, self.num_classes)


def class_centre_triplet(
    anchors: Tensor, anchor_labels: Tensor, pool: Pool, margin: float, num_classes: int
) -> LossSum:
    """Sum over this rank's anchors of the triplet loss with class centres in place of positive and negative.

    loss_i = max(0, margin + |z_i - m_y| - min_{c != y} |z_i - m_c|), Euclidean distances, m_c the mean of class c's
    rows in the pool (not brought back to the unit sphere). Gradients go through the centres to every row.

    Anchors that are alone in their class, whose centre is themselves, and those without another class are masked.

    W ranks give what one rank does: the centres are functions of the gathered pool, equal on every rank, and each
    rank's terms send their gradient through them to all ranks' rows (`trainer.pool.gather_pool`). Centres of each
    rank's own rows would differ.

    Args:
        anchors: [B, D], this rank's embeddings, raw or on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        margin: In the unit of the distance.
        num_classes: C; memory is linear in N, and in B x C.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions.
    """
    dtype = accumulation_dtype(anchors)
    counts = torch.bincount(pool.labels, minlength=num_classes)
    sums = pool.embeddings.new_zeros(num_classes, pool.embeddings.shape[1], dtype=dtype)
    sums = sums.index_add(0, pool.labels, pool.embeddings.to(dtype))
    centres = sums / counts.clamp(min=1)[:, None]

    with torch.no_grad():
        distances = torch.cdist(anchors.to(dtype), centres, compute_mode="donot_use_mm_for_euclid_dist")
        others = (counts > 0).repeat(len(anchors), 1).scatter_(1, anchor_labels[:, None], False)
        negative = distances.masked_fill_(~others, torch.inf).argmin(1)  # a NaN is the least: it reaches the loss
    rows = centres.index_select(0, torch.cat([anchor_labels, negative]))
    to_positive, to_negative = paired_distance(torch.cat([anchors, anchors]).to(dtype), rows).chunk(2)
    losses = (margin + to_positive - to_negative).clamp(min=0)
    return sum_valid(losses, (counts.index_select(0, anchor_labels) > 1) & others.any(1), anchor_labels)
