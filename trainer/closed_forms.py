"""Heads in closed form: made from stage one's classifier, from class means, from the class frequencies.

Shapes: N samples, D feature, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cluster.errors import UserError
from trainer.heads import Head

_CHUNK_BYTES = 64 * 2**20


def tau_norm(own: Head, tau: float) -> Head:
    """Tau-normalised classifier: w_c / ||w_c||^tau (Kang et al. 2020, arXiv:1910.09217, section 4).

    Stage one's bias is left out, as in the paper and in its reference code (facebookresearch/classifier-balancing,
    tau_norm.py); so tau = 0 is stage one's classifier without its bias.

    Args:
        own: Stage one's classifier.
        tau: 0 changes no weight, 1 makes all of the same length.
    """
    norm = own.weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.weight.dtype).tiny)
    return Head(own.weight / norm**tau, torch.zeros_like(own.bias), own.normalise)


def logit_adjustment(own: Head, class_counts: np.ndarray, tau: float) -> Head:
    """Post-hoc logit adjustment: argmax_y f_y(x) - tau log pi_y (Menon et al. 2021, arXiv:2007.07314, eq. 9).

    The prior is *subtracted*. At tau = 1, and with f the log-probabilities under the training prior, this is the
    classifier of the smallest balanced error.

    Args:
        own: Stage one's classifier.
        class_counts: Training samples of each class, [C]; pi is their share.
        tau: 0 is stage one's classifier.

    Raises:
        UserError: A class has no training sample.
    """
    prior = torch.as_tensor(log_prior(class_counts)).to(own.bias)
    return Head(own.weight.clone(), own.bias - tau * prior, own.normalise)


def nearest_class_mean(class_means: Tensor, normalise: bool) -> Head:
    """Nearest class mean on raw features, by Euclidean distance or by cosine (Kang et al. 2020, arXiv:1910.09217).

    -||x - mu||^2 = 2 mu.x - ||mu||^2 - ||x||^2, whose last term is the same for all classes; and cos(x, mu) is the
    product of both at unit length. Not standardised: the distances that stage one shaped are kept.

    Args:
        class_means: mu, [C, D].
        normalise: Cosine instead of Euclidean.
    """
    if normalise:
        unit = torch.nn.functional.normalize(class_means, dim=1)
        return Head(unit, unit.new_zeros(len(unit)), normalise=True)
    return Head(2 * class_means, -class_means.square().sum(dim=1))


def log_prior(class_counts: np.ndarray) -> np.ndarray:
    """Logarithm of the prior, log pi_c, of the training counts [C]; float64.

    Raises:
        UserError: A class has no training sample, so that its prior has no logarithm.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    if not (counts > 0).all():
        raise UserError(
            f"class {int(np.argmin(counts))} has no training sample, and stage two needs at least one of every class; "
            "pack the dataset again with images of it, or without the class"
        )
    return np.log(counts / counts.sum())


def fit_temperature(logits: Tensor, labels: Tensor, bounds: tuple[float, float] = (0.01, 1e4)) -> float:
    """Temperature T that minimises the NLL of softmax(logits / T) (Guo et al. 2017, arXiv:1706.04599, section 4.2).

    In beta = 1 / T the NLL is convex with derivative mean(E_p[z] - z_y), so bisection on its sign is exact; where
    every sample is right, or none is, the NLL falls for ever and a bound is the answer.

    Args:
        logits: z, [N, C].
        labels: [N].
        bounds: Smallest and largest T.
    """
    rows = max(1, _CHUNK_BYTES // (8 * logits.shape[1]))  # in float64, and never all of them at once
    parts = list(zip(logits.split(rows), labels.split(rows), strict=True))

    def slope(log_beta: float) -> float:
        total = 0.0
        for part, of_part in parts:
            z = part.double()
            expected = (float(np.exp(log_beta)) * z).softmax(dim=1).mul_(z).sum(dim=1)
            total += float((expected - z.gather(1, of_part[:, None])[:, 0]).sum())
        return total

    low, high = -np.log(bounds[1]), -np.log(bounds[0])
    for _ in range(60):
        middle = (low + high) / 2
        if slope(middle) <= 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))
