"""How large a configured network is, without memory or weights: built on PyTorch's meta device and walked through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import TrainerConfig
from trainer.losses import build_metric_loss
from trainer.model import Classifier, build_model

PROBE_IMAGES = 2
"""Batch norm in training mode refuses one image where a map has shrunk to one pixel."""


@dataclass(frozen=True)
class NetworkSize:
    """Of the trained network, in float32.

    Attributes:
        parameters: Trained numbers, the metric loss's own included.
        of_loss: Those of the metric loss alone: centres, proxies or prototypes.
        buffer_bytes: Batch norm's statistics and their like.
        forward_flop: Of one image; an addition and a multiplication are two.
        kept_bytes: What backward keeps of one image, without the weights.
        dim: D of what the metric loss compares.
        feature_dim: Of the backbone's output, on which stage two works.
    """

    parameters: int
    of_loss: int
    buffer_bytes: int
    forward_flop: float
    kept_bytes: float
    dim: int
    feature_dim: int


def network_size(config: TrainerConfig, num_classes: int) -> NetworkSize:
    """Count a configuration's network.

    Args:
        config: The configuration. Activation checkpointing is left out: `kept_bytes` is without it.
        num_classes: C.

    Raises:
        UserError: The backbone is unknown or cannot take `data.image_px`.
    """
    plain = config.model.model_copy(update={"weights": None, "checkpoint_activations": False})
    px, loss = config.data.image_px, config.stage_one.loss
    with torch.device("meta"):
        model = build_model(plain, num_classes, px, loss.normalise)
        images = torch.empty(PROBE_IMAGES, 3, px, px)
    dim = model.feature_dim if loss.compare == "feature" else plain.embedding_dim
    # On the CPU: some start from numbers that they compute.
    metric_loss = build_metric_loss(loss, num_classes, dim, torch.ones(num_classes, dtype=torch.int64))
    of_loss = sum(p.numel() for p in metric_loss.parameters()) if metric_loss is not None else 0
    flop, kept_bytes = _walk(model, images)
    return NetworkSize(
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad) + of_loss,
        of_loss=of_loss,
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        forward_flop=flop / PROBE_IMAGES,
        kept_bytes=kept_bytes / PROBE_IMAGES,
        dim=dim,
        feature_dim=model.feature_dim,
    )


def _walk(model: Classifier, images: Tensor) -> tuple[float, int]:
    """FLOP and bytes kept for backward of one forward pass."""
    weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # by storage: several operations keep the same tensor; held, so that no number recurs

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.backbone(images)  # not `model(images)`: autocast does not know the meta device
        model.embed(features), model.classifier(features)
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
