"""Optimisers that need no DeepSpeed, and which weights they decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from cluster.errors import UserError
from trainer.config import OptimiserConfig


def parameter_groups(model: nn.Module, of_loss: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Decayed weights; biases and the one-dimensional weights of normalisation layers; the loss's own parameters.

    Args:
        model: The network.
        of_loss: Centres, proxies or prototypes, which are not decayed.
        weight_decay: Of the first group.

    Returns:
        The groups that are not empty, as optimisers take them.
    """
    own = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(of_loss), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimiser(groups: list[dict[str, Any]], config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW or SGD of torch, LAMB of timm (You et al., arXiv 1904.00962).

    Raises:
        UserError: `options` holds what the optimiser does not know.
    """
    try:
        if config.name == "sgd":
            options = {"momentum": config.momentum, "nesterov": config.momentum > 0, **config.options}
            return torch.optim.SGD(groups, lr=config.lr, **options)
        if config.name == "lamb":
            from timm.optim import Lamb

            return Lamb(groups, lr=config.lr, **{"max_grad_norm": None, **config.options})
        return torch.optim.AdamW(groups, lr=config.lr, **config.options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"stage_one.optimiser.options = {config.options} do not suit {config.name} ({error}); give arguments of "
            f"that optimiser"
        ) from None
