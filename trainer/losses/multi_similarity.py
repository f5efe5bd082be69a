"""Multi-similarity loss.

Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, CVPR 2019 (arXiv 1904.06627),
eq. 7, 8 and 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool, sum_valid
from trainer.pairwise import multi_similarity_sums


class MultiSimilarity(MetricLoss):
    """See `multi_similarity`."""

    needs_unit_length = True

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        config = self.config
        return multi_similarity(
            anchors,
            labels,
            pool,
            (config.positive_scale, config.negative_scale),
            config.similarity_base,
            config.mining_margin,
        )


def multi_similarity(
    anchors: Tensor, anchor_labels: Tensor, pool: Pool, scales: tuple[float, float], base: float, mining_margin: float
) -> LossSum:
    """Sum over this rank's anchors of the multi-similarity loss over the pairs that the paper's mining keeps.

    loss_i = 1/alpha log(1 + sum_p exp(-alpha (s_ip - base))) + 1/beta log(1 + sum_n exp(beta (s_in - base))),

    over positives p less similar than the most similar negative + mining_margin and negatives n more similar than the
    least similar positive - mining_margin, s_ia = z_i . z_a. Anchors without a positive or without a negative are
    masked; one whose pairs are all mined away has the term 0.

    Args:
        anchors: [B, D], this rank's embeddings, on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        scales: alpha and beta, both > 0.
        base: lambda of the paper, a similarity.
        mining_margin: epsilon of the paper, a similarity >= 0.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions.
    """
    positive, negative, _ = multi_similarity_sums(
        anchors, anchor_labels, pool.embeddings, pool.labels, pool.first, scales, base, mining_margin
    )
    own = torch.bincount(pool.labels).index_select(0, anchor_labels)
    return sum_valid(positive / scales[0] + negative / scales[1], (own > 1) & (own < len(pool.labels)), anchor_labels)
