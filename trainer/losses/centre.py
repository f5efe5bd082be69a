"""Centre loss.

Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016, eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.loss_config import LossConfig
from trainer.losses.base import LossSum, MetricLoss, Pool
from trainer.pairwise import accumulation_dtype


class Centre(MetricLoss):
    """See `centre`. The centres are parameters, [C, D], learnt by the loss's own gradient.

    The paper moves each centre by a damped mean of its samples' offsets; like most code since, the first author's of
    arXiv 2207.06975 too, ours lets the optimiser do it, at `lr_ratio` times the learning rate.
    """

    def __init__(self, config: LossConfig, num_classes: int, dim: int, class_counts: Tensor) -> None:
        super().__init__(config, num_classes, dim, class_counts)
        start = torch.randn(num_classes, dim)
        self.centres = nn.Parameter(nn.functional.normalize(start, dim=1) if config.normalise else start)

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`; the pool has no part in it."""
        return centre(anchors, labels, self.centres)


def centre(anchors: Tensor, anchor_labels: Tensor, centres: Tensor) -> LossSum:
    """Sum over this rank's anchors of 1/2 |z_i - c_y|^2.

    W ranks give what one rank does: terms are of local anchors and of centres that are the same on every rank, so the
    engine's mean over ranks of W / n times a rank's sum is the global mean, for centres as for the backbone.

    Args:
        anchors: [B, D], this rank's embeddings, raw or on the unit sphere.
        anchor_labels: [B] int64.
        centres: [C, D].

    Returns:
        Sum and number of anchors, none of them masked; computed in float32 for lower precisions.
    """
    dtype = accumulation_dtype(anchors)
    offsets = anchors.to(dtype) - centres.to(dtype).index_select(0, anchor_labels)
    return LossSum(offsets.square().sum() / 2, len(anchor_labels), anchor_labels[:0])
