"""What losses derive from the class frequencies: margins, weights, priors.

Shapes: C classes. Counts are those of the training samples; a class without any counts as if it had one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frequency_margins(class_counts: Tensor, largest: float) -> Tensor:
    """Margins ~ n_c^(-1/4), the rarest class's being `largest`; float64 [C].

    Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019 (arXiv 1906.07413),
    eq. 9: the trade-off between the classes' generalisation bounds is best at this power.
    """
    counts = _at_least_one(class_counts)
    return largest * (counts.min() / counts) ** 0.25


def effective_number_weights(class_counts: Tensor, beta: float) -> Tensor:
    """Weights ~ (1 - beta) / (1 - beta^n_c), or their limit 1 / n_c for beta = 1; float64 [C].

    Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019 (arXiv 1901.05555), section 4.
    Scaled so that their mean over the training samples is 1: a mean over samples then keeps its size, and the learning
    rate its meaning.
    """
    counts = _at_least_one(class_counts)
    if beta == 1:
        weights = 1 / counts
    elif beta == 0:
        weights = torch.ones_like(counts)
    else:
        weights = (1 - beta) / -torch.expm1(counts * torch.log(counts.new_tensor(beta)))
    return weights * counts.sum() / (weights * counts).sum()


def log_prior(class_counts: Tensor) -> Tensor:
    """Logarithm of the class frequencies, float64 [C]."""
    counts = _at_least_one(class_counts)
    return torch.log(counts / counts.sum())


def _at_least_one(class_counts: Tensor) -> Tensor:
    return torch.as_tensor(class_counts).double().clamp(min=1)
