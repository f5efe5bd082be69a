"""Balanced contrastive learning (BCL): supervised contrastive loss whose denominator is a sum of class means.

Zhu et al., Balanced Contrastive Learning for Long-Tailed Visual Recognition, CVPR 2022 (arXiv 2207.09052): class
averaging and class complement.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.loss_config import LossConfig
from trainer.losses.base import LossSum, MetricLoss, Pool, sum_valid
from trainer.losses.class_logsumexp import class_logsumexp
from trainer.pairwise import positive_similarity


class BalancedContrastive(MetricLoss):
    """See `balanced_contrastive`; with class complement its prototypes are parameters, [C, D], normalised when used.

    The paper makes the prototypes from the classifier's weights by a network of their own; ours are free: what a
    network of a table of weights can reach, the table can.
    """

    needs_unit_length = True

    def __init__(self, config: LossConfig, num_classes: int, dim: int, class_counts: Tensor) -> None:
        super().__init__(config, num_classes, dim, class_counts)
        start = nn.functional.normalize(torch.randn(num_classes, dim), dim=1)
        self.prototypes = nn.Parameter(start) if config.class_complement else None

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        if self.prototypes is not None:
            prototypes = nn.functional.normalize(self.prototypes, dim=1).to(pool.embeddings.dtype)
            own_labels = torch.arange(self.num_classes, device=pool.labels.device)
            pool = Pool(
                torch.cat([pool.embeddings, prototypes]), torch.cat([pool.labels, own_labels]), first=pool.first
            )
        return balanced_contrastive(anchors, labels, pool, self.config.temperature, self.num_classes)


def balanced_contrastive(
    anchors: Tensor, anchor_labels: Tensor, pool: Pool, temperature: float, num_classes: int
) -> LossSum:
    """Sum over this rank's anchors of the class-averaged supervised contrastive loss.

    loss_i = -1 / |P(i)| * sum_{p in P(i)} s_ip / T + log sum_c 1 / |A_c(i)| sum_{a in A_c(i)} exp(s_ia / T),

    with s_ia = z_i . z_a, A_c(i) the rows of class c in the pool without anchor i, P(i) = A_y(i) of anchor i's class y;
    classes without a row are left out. Class complement is the caller's: prototypes are rows of the pool behind the
    others, so that no class is without one and no anchor without a positive. Anchors with empty P(i) are masked.

    W ranks give what one rank does, as for the supervised contrastive loss: |A_c(i)| counts the rows of all ranks.

    Args:
        anchors: [B, D], this rank's embeddings, on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        temperature: T > 0.
        num_classes: C.

    Returns:
        Sum and number of valid anchors; computed in float32 for lower precisions.
    """
    counts = torch.bincount(pool.labels, minlength=num_classes).double()
    own = counts.index_select(0, anchor_labels) - 1
    log_sum = class_logsumexp(
        anchors,
        anchor_labels,
        pool.embeddings,
        pool.labels,
        1 / temperature,
        same_bias=-own.clamp(min=1).log(),
        row_bias=-counts.log().index_select(0, pool.labels),
        first=pool.first,
    )
    similarity, num_positives = positive_similarity(anchors, anchor_labels, pool.embeddings, pool.labels, pool.first)
    losses = log_sum - similarity / num_positives.clamp(min=1) / temperature
    return sum_valid(losses, num_positives > 0, anchor_labels)
