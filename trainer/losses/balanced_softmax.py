"""Balanced softmax.

Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020 (arXiv 2007.10740), eq. 3.
"""

from __future__ import annotations

from torch import Tensor

from trainer.loss_config import ClassificationConfig
from trainer.losses.classification import CrossEntropy
from trainer.losses.frequency import log_prior


class BalancedSoftmax(CrossEntropy):
    """Cross-entropy of the logits [B, C] + log pi [C], pi the class frequencies: the logits learn to do without them.

    The prior is *added* in training, and nothing is added when the model is used.
    """

    offset: Tensor

    def __init__(self, config: ClassificationConfig, class_counts: Tensor, cosine_scale: float | None = None) -> None:
        super().__init__(config, class_counts, cosine_scale)
        self.register_buffer("offset", self.strength() * log_prior(class_counts), persistent=False)

    def strength(self) -> float:
        """Factor of log pi."""
        return 1.0

    def adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, C] + the prior."""
        return logits + self.offset.to(logits.dtype)
