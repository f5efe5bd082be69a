"""Losses of the classifier.

Shapes: B samples of this rank (each view counts as one), C classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from trainer.losses.base import LossSum
from trainer.pairwise import accumulation_dtype


def cross_entropy(logits: Tensor, labels: Tensor) -> LossSum:
    """Sum of the cross-entropy of this rank's samples.

    Args:
        logits: [B, C].
        labels: [B] int64; with V views the caller repeats them.

    Returns:
        Sum and number of samples; computed in float32 for lower precisions. No sample is masked.
    """
    total = functional.cross_entropy(logits.to(accumulation_dtype(logits)), labels, reduction="sum")
    return LossSum(total, len(labels), labels[:0])
