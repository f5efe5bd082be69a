"""LDAM: label-distribution-aware margin loss; with `reweight_from: .8` LDAM-DRW.

Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019 (arXiv 1906.07413),
eq. 12 and 13; deferred re-weighting: algorithm 1.
"""

from __future__ import annotations

from trainer.losses.cosface import CosFace


class Ldam(CosFace):
    """Cross-entropy of s * (cos_y - m_y) against s * cos_j with m_c ~ n_c^(-1/4), the rarest class's m being .5.

    Logits s * cosine [B, C], labels [B]: see `CrossEntropy.forward`.
    """

    paper_margin = 0.5

    def always_by_frequency(self) -> bool:
        """The margins by frequency are what LDAM is."""
        return True
