"""All-triplet loss, "batch all".

Hermans, Beyer, Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017 (arXiv 1703.07737), eq. 6, and
the mean over active triplets of its section 3 (BA != 0).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainer.losses.base import LossSum, MetricLoss, Pool
from trainer.pairwise import all_triplet_sums


class AllTriplet(MetricLoss):
    """See `all_triplet`."""

    def loss_sum(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        """See `MetricLoss.forward`."""
        return all_triplet(anchors, labels, pool, self.config.margin, self.config.triplet_mean)


def all_triplet(
    anchors: Tensor, anchor_labels: Tensor, pool: Pool, margin: float, mean_over: Literal["active", "all"]
) -> LossSum:
    """Sum over every triplet of this rank's anchors with the whole pool.

    loss = sum_i sum_p sum_n max(0, margin + |z_i - z_p| - |z_i - z_n|), Euclidean distances.

    Most triplets soon have no loss, and a mean over all of them vanishes with it; the paper therefore prefers the mean
    over the active ones. Either way the terms that are counted are triplets, so the global mean is over the triplets of
    all ranks: W ranks give what one rank does. Anchors without a positive or without a negative are masked.

    Args:
        anchors: [B, D], this rank's embeddings, raw or on the unit sphere.
        anchor_labels: [B] int64.
        pool: Of all ranks; its rows `first` to `first + B` are the anchors.
        margin: In the unit of the distance.
        mean_over: Which triplets are counted: those with a loss above zero, or all.

    Returns:
        Sum and number of triplets; computed in float32 for lower precisions.
    """
    sums, active, triplets = all_triplet_sums(anchors, anchor_labels, pool.embeddings, pool.labels, pool.first, margin)
    counted = active if mean_over == "active" else triplets
    return LossSum(sums.sum(), int(counted.sum()), anchor_labels[triplets == 0])
