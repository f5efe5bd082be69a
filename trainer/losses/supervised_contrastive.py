"""Supervised contrastive loss.

Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (arXiv 2004.11362), eq. 2 (L_out).
"""

from __future__ import annotations

from torch import Tensor

from trainer.losses.base import LossSum, Pool, sum_valid
from trainer.pairwise import pool_logsumexp, positive_similarity


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
    log_sum = pool_logsumexp(anchors, pool.embeddings, temperature, pool.first)
    similarity, num_positives = positive_similarity(anchors, anchor_labels, pool.embeddings, pool.labels, pool.first)
    losses = log_sum - similarity / num_positives.clamp(min=1) / temperature
    return sum_valid(losses, num_positives > 0, anchor_labels)
