"""Logit-adjusted cross-entropy.

Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021 (arXiv 2007.07314), eq. 10.
"""

from __future__ import annotations

from trainer.losses.balanced_softmax import BalancedSoftmax


class LogitAdjusted(BalancedSoftmax):
    """Cross-entropy of the logits [B, C] + tau log pi [C]; tau = 1 is balanced softmax."""

    def strength(self) -> float:
        """Factor of log pi: tau."""
        return self.config.tau
