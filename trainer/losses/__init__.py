"""Losses as pure functions of tensors: no process groups, no engine (see `trainer/pool.py` for what crosses ranks)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from trainer.loss_config import ClassificationConfig, LossConfig
from trainer.losses.all_triplet import AllTriplet
from trainer.losses.arcface import ArcFace
from trainer.losses.balanced_contrastive import BalancedContrastive
from trainer.losses.balanced_softmax import BalancedSoftmax
from trainer.losses.base import LossSum, MetricLoss, Pool
from trainer.losses.batch_hard_triplet import BatchHardTriplet
from trainer.losses.centre import Centre
from trainer.losses.class_centre_triplet import ClassCentreTriplet, ProgressiveClassCentreTriplet
from trainer.losses.classification import CrossEntropy
from trainer.losses.cosface import CosFace
from trainer.losses.focal import Focal
from trainer.losses.ldam import Ldam
from trainer.losses.logit_adjusted import LogitAdjusted
from trainer.losses.multi_similarity import MultiSimilarity
from trainer.losses.proxy_anchor import ProxyAnchor
from trainer.losses.semi_hard_triplet import SemiHardTriplet
from trainer.losses.supervised_contrastive import SupervisedContrastive

__all__ = [
    "CLASSIFICATION_LOSS_CLASSES",
    "METRIC_LOSS_CLASSES",
    "LossSum",
    "MetricLoss",
    "Pool",
    "build_classification_loss",
    "build_metric_loss",
    "metric_rows",
]

# `stage_one.loss.name` -> module(anchors [B, D], labels [B], pool, progress) -> LossSum.
METRIC_LOSS_CLASSES: dict[str, type[MetricLoss]] = {
    "supervised_contrastive": SupervisedContrastive,
    "balanced_contrastive": BalancedContrastive,
    "batch_hard_triplet": BatchHardTriplet,
    "semi_hard_triplet": SemiHardTriplet,
    "all_triplet": AllTriplet,
    "class_centre_triplet": ClassCentreTriplet,
    "progressive_class_centre_triplet": ProgressiveClassCentreTriplet,
    "centre": Centre,
    "multi_similarity": MultiSimilarity,
    "proxy_anchor": ProxyAnchor,
}

# `stage_one.classification.name` -> module(logits [B, C], labels [B], progress, weights) -> LossSum.
CLASSIFICATION_LOSS_CLASSES: dict[str, type[CrossEntropy]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjusted": LogitAdjusted,
    "focal": Focal,
    "ldam": Ldam,
    "cosface": CosFace,
    "arcface": ArcFace,
}


def build_metric_loss(config: LossConfig, num_classes: int, dim: int, class_counts: Tensor) -> MetricLoss | None:
    """The metric loss that a configuration names; its parameters start from torch's global seed, equal on every rank.

    Args:
        config: `stage_one.loss`.
        num_classes: C.
        dim: D of what is compared: of the embedding, or of the feature where `config.compare` says so.
        class_counts: [C], training samples of each class.

    Returns:
        None for `none`.

    Raises:
        UserError: There is only one class.
    """
    if config.name == "none":
        return None
    if num_classes < 2:
        raise UserError(
            f"stage_one.loss.name = {config.name!r} tells classes apart and the dataset has {num_classes}; give it two "
            f"classes or more, or set stage_one.loss.name: none"
        )
    return METRIC_LOSS_CLASSES[config.name](config, num_classes, dim, class_counts)


def build_classification_loss(
    config: ClassificationConfig, class_counts: Tensor, cosine_scale: float | None = None
) -> CrossEntropy:
    """The classifier's loss that a configuration names.

    Args:
        config: `stage_one.classification`.
        class_counts: [C], training samples of each class.
        cosine_scale: s of a classifier whose logits are s * cosine (`model.cosine_scale`); None for a linear one.

    Raises:
        UserError: The loss has a margin between cosines and the classifier is linear.
    """
    return CLASSIFICATION_LOSS_CLASSES[config.name](config, class_counts, cosine_scale)


def metric_rows(config: LossConfig, features: Tensor, embeddings: Tensor) -> Tensor:
    """What the metric loss compares, as `config.compare` and `config.normalise` say.

    Args:
        config: `stage_one.loss`.
        features: [B, F], pooled backbone outputs.
        embeddings: [B, D] of the embedding head, of unit length already where `config.normalise`.

    Returns:
        [B, D] the embeddings, or [B, F] the features in float32 at least, of unit length where `config.normalise`.
    """
    if config.compare == "embedding":
        return embeddings
    rows = features if features.dtype == torch.float64 else features.float()
    return nn.functional.normalize(rows, dim=1) if config.normalise else rows
