"""ArcFace: additive angular margin loss.

Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019 (arXiv 1801.07698), eq. 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.losses.classification import at_labels
from trainer.losses.cosface import CosineMargin


class ArcFace(CosineMargin):
    """Cross-entropy of s * cos(theta_y + m_y) against s * cos(theta_j), m in radians, .5 in the paper.

    Beyond theta_y = pi - m_y, where cos(theta + m) would rise again, it goes on as cos(theta) - m sin(m), as in the
    authors' code: the logit falls with the angle everywhere.
    """

    paper_margin = 0.5

    def adjust(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits s * cosine [B, C] with the margin at the labels."""
        margin = self.margins.to(logits.dtype).index_select(0, labels)
        at_label = logits.gather(1, labels[:, None]).squeeze(1)
        # Rounding takes cosines a little beyond 1, and the slope of the sine is infinite at 1.
        bound = 1 - torch.finfo(logits.dtype).eps
        cosine = (at_label / self.scale).clamp(-bound, bound)
        sine = (1 - cosine.square()).sqrt()
        turned = torch.where(
            cosine > torch.cos(math.pi - margin),
            cosine * margin.cos() - sine * margin.sin(),
            cosine - margin * margin.sin(),
        )
        return logits + at_labels(labels, self.scale * turned - at_label, logits)
