"""Focal loss.

Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (arXiv 1708.02002), eq. 4, in its softmax form. With class
weights from the start (`reweight_from: 0`) it is the class-balanced focal loss of Cui et al., CVPR 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.losses.base import LossSum
from trainer.losses.classification import CrossEntropy, weighted_sum


class Focal(CrossEntropy):
    """-(1 - p_y)^gamma log p_y, p_y the softmax probability of the label: what is well classified weighs little."""

    def loss_sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> LossSum:
        """The weighted sum."""
        return focal(logits, labels, self.config.gamma, weights)


def focal(logits: Tensor, labels: Tensor, gamma: float, weights: Tensor | None = None) -> LossSum:
    """Sum of the focal loss of this rank's samples.

    Args:
        logits: [B, C], float32 or float64.
        labels: [B] int64.
        gamma: >= 0; 0 is cross-entropy.
        weights: [B], factor of each sample's term.
    """
    log_p = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    # 1 - p without cancellation near p = 1; the bound keeps the slope of x^gamma, gamma < 1, finite at 0.
    missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return weighted_sum(-(missing**gamma) * log_p, labels, weights)
