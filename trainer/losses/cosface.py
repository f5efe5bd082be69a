"""CosFace: large margin cosine loss.

Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018 (arXiv 1801.09414), eq. 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import UserError
from trainer.loss_config import ClassificationConfig, linear_classifier_message
from trainer.losses.classification import CrossEntropy, at_labels
from trainer.losses.frequency import frequency_margins


class CosineMargin(CrossEntropy):
    """Base of the losses with a margin between a class's cosine and the others', [C] margins, equal or by frequency.

    Raises:
        UserError: The classifier is none of cosines.
    """

    paper_margin: float
    margins: Tensor

    def __init__(self, config: ClassificationConfig, class_counts: Tensor, cosine_scale: float | None = None) -> None:
        super().__init__(config, class_counts, cosine_scale)
        if cosine_scale is None:
            raise UserError(linear_classifier_message(config.name))
        self.scale = cosine_scale
        largest = self.paper_margin if config.margin is None else config.margin
        margins = frequency_margins(class_counts, largest)
        if not (config.margin_by_frequency or self.always_by_frequency()):
            margins = torch.full_like(margins, largest)
        self.register_buffer("margins", margins, persistent=False)

    def always_by_frequency(self) -> bool:
        """Whether margins ~ n_c^(-1/4) are part of the loss."""
        return False


class CosFace(CosineMargin):
    """Cross-entropy of s * (cos_y - m_y) against s * cos_j; m of the paper's face experiments is .35."""

    paper_margin = 0.35

    def adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits s * cosine [B, C], less s * m at the labels."""
        return logits - at_labels(labels, self.scale * self.margins.index_select(0, labels), logits)
