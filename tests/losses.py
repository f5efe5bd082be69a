"""What the tests of the losses share: a small pool, and a working configuration of every loss.

Shapes: N = 12 rows of the pool, B = 8 anchors among them, D = 5, C = 9 classes.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from trainer.loss_config import ClassificationConfig, LossConfig
from trainer.losses import CLASSIFICATION_LOSS_CLASSES, METRIC_LOSS_CLASSES, build_metric_loss
from trainer.losses.base import LossSum, Pool
from trainer.pool import gather_sizes, global_mean

# Class 3 has a single row, classes 5 to 7 none; the anchors are rows 2 to 10 of the pool.
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 4, 0, 8, 8])
FIRST, LAST = 2, 10
NUM_CLASSES, DIM = 9, 5
COUNTS = torch.tensor([100, 50, 30, 2, 20, 1, 1, 0, 10])

METRIC_LOSS_NAMES, CLASSIFICATION_LOSS_NAMES = tuple(METRIC_LOSS_CLASSES), tuple(CLASSIFICATION_LOSS_CLASSES)

COSINE_SCALE = 8.0
"""Of the logits that the classification losses with a margin are given in tests."""

# Every metric loss with settings under which most of its terms are above zero, each setting once off its default;
# progress tells PCCT's stages apart.
METRIC_CASES: dict[str, tuple[LossConfig, float]] = {
    "supervised_contrastive": (LossConfig(name="supervised_contrastive"), 0.0),
    "supervised_contrastive, cold": (LossConfig(name="supervised_contrastive", temperature=0.02), 0.0),
    "balanced_contrastive": (LossConfig(name="balanced_contrastive"), 0.0),
    "balanced_contrastive, averaging alone": (
        LossConfig(name="balanced_contrastive", class_complement=False, temperature=0.3),
        0.0,
    ),
    "batch_hard_triplet": (LossConfig(name="batch_hard_triplet", margin=0.7), 0.0),
    "batch_hard_triplet, negative margin": (LossConfig(name="batch_hard_triplet", margin=-0.5), 0.0),
    "batch_hard_triplet, raw": (LossConfig(name="batch_hard_triplet", margin=5.0, normalise=False), 0.0),
    "semi_hard_triplet": (LossConfig(name="semi_hard_triplet", margin=1.0), 0.0),
    "all_triplet": (LossConfig(name="all_triplet", margin=0.3), 0.0),
    "all_triplet, mean of all": (LossConfig(name="all_triplet", margin=0.3, triplet_mean="all"), 0.0),
    "class_centre_triplet": (LossConfig(name="class_centre_triplet", margin=0.7), 0.0),
    "class_centre_triplet, raw": (LossConfig(name="class_centre_triplet", margin=5.0, normalise=False), 0.0),
    "progressive, triplets": (LossConfig(name="progressive_class_centre_triplet", margin=0.7, centres_from=0.8), 0.6),
    "progressive, centres": (LossConfig(name="progressive_class_centre_triplet", margin=0.7), 0.6),
    "centre": (LossConfig(name="centre"), 0.0),
    "centre, raw": (LossConfig(name="centre", normalise=False), 0.0),
    "multi_similarity": (
        LossConfig(
            name="multi_similarity", positive_scale=3, negative_scale=10, similarity_base=0.3, mining_margin=0.2
        ),
        0.0,
    ),
    "proxy_anchor": (LossConfig(name="proxy_anchor", proxy_scale=8, proxy_margin=0.3), 0.0),
    "proxy_anchor, paper": (LossConfig(name="proxy_anchor"), 0.0),
}

CLASSIFICATION_CASES: dict[str, tuple[ClassificationConfig, float]] = {
    "cross_entropy": (ClassificationConfig(), 0.0),
    "cross_entropy, smoothed": (ClassificationConfig(label_smoothing=0.1), 0.0),
    "cross_entropy, re-weighted": (ClassificationConfig(reweight_from=0, beta=1), 0.0),
    "balanced_softmax": (ClassificationConfig(name="balanced_softmax"), 0.0),
    "balanced_softmax, smoothed": (ClassificationConfig(name="balanced_softmax", label_smoothing=0.1), 0.0),
    "logit_adjusted": (ClassificationConfig(name="logit_adjusted", tau=1.5), 0.0),
    "focal": (ClassificationConfig(name="focal"), 0.0),
    "focal, class-balanced": (ClassificationConfig(name="focal", gamma=0.5, reweight_from=0, beta=0.99), 0.0),
    "ldam": (ClassificationConfig(name="ldam"), 0.0),
    "ldam, before re-weighting": (ClassificationConfig(name="ldam", reweight_from=0.8), 0.7),
    "ldam, after re-weighting": (ClassificationConfig(name="ldam", reweight_from=0.8), 0.8),
    "cosface": (ClassificationConfig(name="cosface"), 0.0),
    "cosface, by frequency": (ClassificationConfig(name="cosface", margin=0.2, margin_by_frequency=True), 0.0),
    "arcface": (ClassificationConfig(name="arcface"), 0.0),
    "arcface, by frequency": (ClassificationConfig(name="arcface", margin=1.5, margin_by_frequency=True), 0.0),
}


def embeddings(seed: int = 0, normalised: bool = True, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[N, D] leaf of a graph."""
    rows = torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (functional.normalize(rows, dim=1) if normalised else 3 * rows).to(dtype).requires_grad_()


def build(config: LossConfig):
    """The loss's module in float64, its parameters drawn from one seed."""
    torch.manual_seed(3)
    module = build_metric_loss(config, NUM_CLASSES, DIM, COUNTS)
    assert module is not None
    return module.double()


def of_anchors(module, rows, progress=0.0, first=FIRST, last=LAST, labels=LABELS):
    """The loss of the pool's rows `first` to `last`."""
    return module(rows[first:last], labels[first:last], Pool(rows, labels, first), progress)


def mean_over_ranks(loss: LossSum) -> torch.Tensor:
    """What this rank gives to backward, as the objective does. Every rank takes part."""
    return global_mean(loss, sum(gather_sizes(loss.count, loss.total.device)))
