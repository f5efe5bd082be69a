"""Supervised contrastive loss.

Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (arXiv 2004.11362), eq. 2 (L_out).
"""

from __future__ import annotations

from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool
from trainer.pairwise import contrastive_total


class SupervisedContrastive(MetricLoss):
    """See `supervised_contrastive`."""

    needs_unit_length = True

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return supervised_contrastive(anchors, labels, pool, self.config.temperature)


def supervised_contrastive(anchors: Tensor, anchor_labels: Tensor, pool: Pool, temperature: float) -> LossSum:
    """Sum over this rank's anchors of L_out, each anchor against the whole pool but itself.

    loss_i = -1 / |P(i)| * sum_{p in P(i)} s_ip / T + log sum_{a != i} exp(s_ia / T),  s_ia = z_i . z_a,

    with P(i) the other rows of anchor i's class. The two terms of eq. 2 are computed apart, so that no [B, N] matrix is
    held. Anchors with empty P(i) are masked; the paper leaves them undefined.

    Args:
        anchors: [B, D], this rank's embeddings, on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        temperature: T > 0.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions.
    """
    total, num_positives = contrastive_total(
        anchors, anchor_labels, pool.embeddings, pool.labels, temperature, pool.first
    )
    valid = num_positives > 0
    return LossSum(total, int(valid.sum()), anchor_labels[~valid])
