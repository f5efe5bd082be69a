"""Classifiers on the backbone's features that are more than a linear layer, and how a head becomes one.

Shapes: B images, F features of the backbone, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.heads import Head


class CosineLinear(nn.Module):
    """Logits that are `scale` times the cosine of feature and class weight, as margin losses want them.

    Wang et al., CosFace, CVPR 2018 (arXiv:1801.09414), eq. 3; no bias.

    Args:
        feature_dim: F.
        num_classes: C.
        scale: s.
    """

    def __init__(self, feature_dim: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(num_classes, feature_dim), dim=1))
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, C], in float32 at least: s times the rounding of a bf16 cosine is a tenth of a logit."""
        with torch.autocast(features.device.type, enabled=False):
            features = nn.functional.normalize(at_least_float32(features), dim=1)
            weight = nn.functional.normalize(self.weight.to(features.dtype), dim=1)
            return self.scale * features @ weight.T


class UnitLinear(nn.Linear):
    """A linear layer on features of unit length: a cosine head with a bias, or whose weights differ in length."""

    def forward(self, features: Tensor) -> Tensor:
        """[B, F] -> [B, C], in float32 at least."""
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(nn.functional.normalize(at_least_float32(features), dim=1))


def classifier_of(head: Head) -> nn.Linear | CosineLinear:
    """A classifier that starts as a head: cosine if the head is scale * cosine, so that it stays so in training."""
    num_classes, feature_dim = head.weight.shape
    lengths = head.weight.norm(dim=1)
    if head.normalise and not head.bias.any() and torch.allclose(lengths, lengths.mean(), rtol=1e-4):
        cosine = CosineLinear(feature_dim, num_classes, float(lengths.mean()))
        cosine.weight.data.copy_(nn.functional.normalize(head.weight, dim=1))
        return cosine
    linear = (UnitLinear if head.normalise else nn.Linear)(feature_dim, num_classes)
    linear.weight.data.copy_(head.weight)
    linear.bias.data.copy_(head.bias)
    return linear


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit tensors in float32, others as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
