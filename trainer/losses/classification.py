"""Cross-entropy of the classifier, and the base of the losses that change its logits first.

Shapes: B samples of this rank (each view counts as one), C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.loss_config import ClassificationConfig
from trainer.losses.base import LossSum
from trainer.losses.frequency import effective_number_weights
from trainer.pairwise import accumulation_dtype


class CrossEntropy(nn.Module):
    """Softmax cross-entropy with label smoothing and deferred re-weighting; a subclass changes logits or terms.

    Class weights by the effective number of samples count from `reweight_from` of the run on (DRW; Cao et al., NeurIPS
    2019, arXiv 1906.07413, algorithm 1).

    Args:
        config: `stage_one.classification`.
        class_counts: [C], training samples of each class.
        cosine_scale: s of a classifier whose logits are s * cosine; None for a linear one.
    """

    class_weights: Tensor

    def __init__(self, config: ClassificationConfig, class_counts: Tensor, cosine_scale: float | None = None) -> None:
        super().__init__()
        self.config = config
        # Follows from data and configuration, so that checkpoints need not hold it.
        weights = effective_number_weights(class_counts, config.beta)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, progress: float = 0.0, weights: Tensor | None = None) -> LossSum:
        """The loss of this rank's samples.

        Args:
            logits: [B, C].
            labels: [B] int64; with V views the caller repeats them.
            progress: Share of the run that is done, in [0, 1].
            weights: [B], factor of each sample's term; its share of the image where two are mixed.

        Returns:
            Sum of the weighted terms and number of samples, whatever their weights; computed in float32 for lower
            precisions. No sample is masked.
        """
        logits = self.adjust(logits.to(accumulation_dtype(logits)), labels)
        if self.config.reweight_from is not None and progress >= self.config.reweight_from:
            by_class = self.class_weights.to(logits.dtype).index_select(0, labels)
            weights = by_class if weights is None else by_class * weights
        return self.loss_sum(logits, labels, weights)

    def adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is done to the logits [B, C] before the softmax."""
        return logits

    def loss_sum(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> LossSum:
        """The weighted sum over the adjusted logits."""
        return cross_entropy(logits, labels, self.config.label_smoothing, weights)


def cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> LossSum:
    """Sum of the cross-entropy of this rank's samples.

    Label smoothing (Szegedy et al., CVPR 2016, arXiv 1512.00567, section 7): the target is 1 - eps on the label, and
    eps / C besides on each class.

    Args:
        logits: [B, C].
        labels: [B] int64; with V views the caller repeats them.
        label_smoothing: eps in [0, 1).
        weights: [B], factor of each sample's term.

    Returns:
        Sum and number of samples; computed in float32 for lower precisions. No sample is masked.
    """
    logits = logits.to(accumulation_dtype(logits))
    if weights is None:
        total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return LossSum(total, len(labels), labels[:0])
    terms = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return weighted_sum(terms, labels, weights)


def weighted_sum(terms: Tensor, labels: Tensor, weights: Tensor | None) -> LossSum:
    """Sum of terms [B], each times its weight [B]; every sample counts as one."""
    weighted = terms if weights is None else terms * weights.to(terms.dtype)
    return LossSum(weighted.sum(), len(labels), labels[:0])


def at_labels(labels: Tensor, values: Tensor, like: Tensor) -> Tensor:
    """`values` [B] in the columns of their labels, zero elsewhere: [B, C] like `like`."""
    return torch.zeros_like(like).scatter_(1, labels[:, None], values.to(like.dtype)[:, None])
