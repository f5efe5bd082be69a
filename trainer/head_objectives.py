"""What trained heads minimise, for many heads at once: one softmax cross-entropy with four switches.

For a sample of class y the logits z become z' = z + offset - margin_y e_y; the target puts `on_y` on class y and
`off_y` on each other one; the term is weighted by w_y. Every family sets some of these and leaves the others neutral:

- balanced softmax (Ren et al. 2020, arXiv:2007.10740, eq. 3): offset = log pi; logit-adjusted loss (Menon et al. 2021,
  arXiv:2007.07314, eq. 10): offset = tau log pi. The prior is *added* in training, so that z learns to do without it.
- re-weighting by the effective number of samples (Cui et al. 2019, arXiv:1901.05555, section 4):
  w_c ~ (1 - beta) / (1 - beta^n_c), whose limit for beta -> 1 is 1 / n_c.
- LDAM (Cao et al. 2019, arXiv:1906.07413, section 3): margin_c = s * max_margin * (n_min / n_c)^(1/4) on s * cosine;
  with deferred re-weighting (DRW, its algorithm 1) w_c counts from 80 % of the steps on.
- label-aware smoothing (MiSLAS; Zhong et al. 2021, arXiv:2104.00466, in its concave form): the target of class c is
  1 - eps_c, and eps_c / (C - 1) for each other class; eps_c = tail + (head - tail) sin(pi / 2 * r), where r goes from 0
  for the rarest to 1 for the commonest class in proportion to n_c.
- label over-smoothing (LOS; Sun et al., Rethinking Classifier Re-Training in Long-Tailed Recognition: Label Over-Smooth
  Can Balance, ICLR 2025): ordinary label smoothing with a delta near 1: 1 - delta + delta / C, and
  delta / C for each other class.

Shapes: H heads, C classes, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.heads import HeadSpec
from trainer.losses.frequency import effective_number_weights, frequency_margins

DRW_FROM = 0.8
"""Share of the steps after which deferred re-weighting begins (Cao et al. 2019: epoch 160 of 200)."""


class Objective:
    """The loss of H heads, each with its own settings. None depends on another's."""

    def __init__(self, specs: Sequence[HeadSpec], class_counts: np.ndarray, like: Tensor):
        """Work the settings out.

        Args:
            specs: The heads.
            class_counts: Training samples of each class, [C], none of them 0.
            like: A tensor of the dtype and device of the training.
        """
        counts = np.asarray(class_counts, dtype=np.float64)
        log_prior = np.log(counts / counts.sum())

        def table(rows: list[np.ndarray], neutral: float) -> Tensor | None:
            """[H, C]; None where no head of them all uses the setting."""
            values = np.stack(rows)
            return None if (values == neutral).all() else torch.from_numpy(values).to(like)

        targets = [_target(spec, counts) for spec in specs]
        self._offset = table([_prior_strength(spec) * log_prior for spec in specs], 0.0)
        self._margin = table([_margin(spec, counts) for spec in specs], 0.0)
        self._on = table([on for on, _ in targets], 1.0)
        self._off = table([off for _, off in targets], 0.0)
        self._weight = table([_weight(spec, counts) for spec in specs], 1.0)
        deferred = [DRW_FROM if spec.family == "ldam_drw" else 0.0 for spec in specs]
        self._weighted_from = torch.tensor(deferred, dtype=torch.float64)

    def gradient(self, logits: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
        """The loss's gradient by the logits, mean over the B samples.

        Args:
            logits: [A, C, B] of the first A heads; overwritten.
            labels: [B] int64.
            progress: Share of its steps that each of them has taken, float64 [A], on the CPU.

        Returns:
            [A, C, B].
        """
        active, _, batch = logits.shape
        at_label = labels.expand(active, 1, batch)
        if self._offset is not None:
            logits = logits.add_(self._offset[:active, :, None])
        if self._margin is not None:
            logits.scatter_add_(1, at_label, -self._margin[:active, None, labels])
        grad = logits.softmax(dim=1)
        if self._on is None or self._off is None:
            grad.scatter_add_(1, at_label, grad.new_full((), -1.0).expand(active, 1, batch))
        else:
            on, off = self._on[:active, None, labels], self._off[:active, None, labels]
            grad.sub_(off).scatter_add_(1, at_label, off - on)
        if self._weight is not None:
            begun = (progress >= self._weighted_from[:active]).to(grad.device)[:, None]
            weight = torch.where(begun, self._weight[:active, labels], 1.0)
            grad.mul_(weight[:, None])
        return grad.div_(batch)


def _prior_strength(spec: HeadSpec) -> float:
    return {"balanced_softmax": 1.0, "logit_adjusted": spec.tau}.get(spec.family, 0.0)


def _margin(spec: HeadSpec, counts: np.ndarray) -> np.ndarray:
    if spec.family != "ldam_drw":
        return np.zeros_like(counts)
    return frequency_margins(torch.from_numpy(counts), spec.scale * spec.margin).numpy()


def _target(spec: HeadSpec, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the target puts on a sample's own class and on each other one, by class, [C] each."""
    ones, classes = np.ones_like(counts), len(counts)
    if spec.family == "over_smoothing":
        off = spec.smoothing / classes * ones
        return 1 - spec.smoothing + off, off
    if spec.family == "label_aware_smoothing":
        spread = counts.max() - counts.min()
        rank = (counts - counts.min()) / spread if spread else ones
        smoothing = spec.smoothing_tail + (spec.smoothing - spec.smoothing_tail) * np.sin(rank * np.pi / 2)
        return 1 - smoothing, smoothing / max(classes - 1, 1)
    return ones, np.zeros_like(counts)


def _weight(spec: HeadSpec, counts: np.ndarray) -> np.ndarray:
    if spec.family not in ("reweighted", "ldam_drw"):
        return np.ones_like(counts)
    return effective_number_weights(torch.from_numpy(counts), spec.beta).numpy()
