"""The network: a timm backbone, an embedding head for the metric loss, a linear or a cosine classifier.

Shapes: B images, px side of an image, F features of the backbone, D embedding dimensions, C classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.errors import UserError
from trainer.classifiers import CosineLinear, UnitLinear, at_least_float32
from trainer.config import ModelConfig
from trainer.heads import Head
from trainer.weights import load_backbone, one_line

MIRRORED_DIMS: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": (),
    "horizontal": ((3,),),
    "both": ((3,), (2,), (2, 3)),
}
"""Mirror images of [B, 3, px, px] beside the image itself, by the dimensions that are turned round."""


class Output(NamedTuple):
    """What the losses and the evaluation see of a batch."""

    features: Tensor  # [B, F] pooled backbone output; stage two works on these
    embeddings: Tensor  # [B, D], of unit length if the classifier was built with normalise
    logits: Tensor  # [B, C] of the stage-one classifier


class Classifier(nn.Module):
    """Backbone -> features -> embedding (Linear-ReLU-Linear, as in SupCon, arXiv:2004.11362) and class logits.

    Args:
        backbone: Module that turns [B, 3, px, px] into [B, F].
        feature_dim: F.
        num_classes: C.
        config: Widths of the embedding head, dropout, kind of classifier, batch-norm freezing, mirrors.
        normalise: Embeddings of unit length.
    """

    classifier: nn.Linear | CosineLinear

    def __init__(
        self, backbone: nn.Module, feature_dim: int, num_classes: int, config: ModelConfig, normalise: bool = True
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.embedding = nn.Sequential(
            nn.Linear(feature_dim, config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.embedding_dim),
        )
        self.dropout = nn.Dropout(config.drop_rate)
        if config.cosine_scale is None:
            self.classifier = nn.Linear(feature_dim, num_classes)
        else:
            self.classifier = CosineLinear(feature_dim, num_classes, config.cosine_scale)
        self.feature_dim = feature_dim
        self.normalise = normalise
        self.mirrored = MIRRORED_DIMS[config.mirrors]
        self.freeze_batch_norm = config.freeze_batch_norm
        self.checkpoint_activations = config.checkpoint_activations

    def features(self, images: Tensor) -> Tensor:
        """Pooled backbone output [B, F] of images [B, 3, px, px], in the weights' dtype unless autocast chooses.

        Outside training it is the mean over an image and its mirror images, where the configuration asks for them (as
        the ten crops of Krizhevsky et al. 2012, section 4.1, but of features, so that one head serves all).
        Convolutions run channels-last: a third faster on the CPU, and what tensor cores want.
        """
        chosen = torch.is_autocast_enabled(images.device.type)
        dtype = images.dtype if chosen else next(self.backbone.parameters()).dtype
        images = images.to(dtype=dtype, memory_format=torch.channels_last)
        return self.backbone(images) if self.training else mean_over_mirrors(self.backbone, images, self.mirrored)

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings [B, D] of features [B, F]: float32 at least, since similarities are divided by a temperature."""
        embeddings = at_least_float32(self.embedding(features))
        return nn.functional.normalize(embeddings, dim=1) if self.normalise else embeddings

    def forward(self, images: Tensor) -> Output:
        """Images [B, 3, px, px], normalised -> `Output`; embeddings and logits are float32 under bf16 weights."""
        features = self.features(images)
        logits = at_least_float32(self.classifier(self.dropout(features)))
        return Output(features, self.embed(features), logits)

    def own_head(self) -> Head:
        """A copy of the classifier, as a head on raw features."""
        weight = self.classifier.weight.detach().clone()
        if isinstance(self.classifier, CosineLinear):
            weight = self.classifier.scale * nn.functional.normalize(weight, dim=1)
            return Head(weight, weight.new_zeros(len(weight)), normalise=True)
        return Head(weight, self.classifier.bias.detach().clone(), normalise=isinstance(self.classifier, UnitLinear))

    def train(self, mode: bool = True) -> Classifier:
        """As `nn.Module.train`; frozen batch norms stay on their running statistics (their scale and bias learn)."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def mean_over_mirrors(backbone: nn.Module, images: Tensor, mirrored: Sequence[tuple[int, ...]]) -> Tensor:
    """Mean of the features [B, F] of images [B, 3, px, px] and of their mirror images.

    Args:
        backbone: Makes the features.
        images: Any.
        mirrored: Of each mirror image the dimensions that are turned round: `MIRRORED_DIMS`.
    """
    total = backbone(images)
    for dims in mirrored:
        total = total + backbone(images.flip(dims))
    return total / (1 + len(mirrored)) if mirrored else total


def build_model(config: ModelConfig, num_classes: int, image_px: int, normalise: bool = True) -> Classifier:
    """The network that a configuration describes, with its starting weights; random parts follow torch's global seed.

    Args:
        config: Backbone, weights and head.
        num_classes: C.
        image_px: Side of the square images that it will see.
        normalise: Embeddings of unit length.

    Raises:
        UserError: The backbone is unknown or cannot take `image_px`, or its weights are missing or do not fit.
    """
    backbone = _create_backbone(config, image_px)
    feature_dim = _probe(backbone, config.backbone, image_px)
    if config.weights is not None:
        load_backbone(backbone, config.backbone, config.weights)
    if config.checkpoint_activations:
        _checkpoint_activations(backbone, config.backbone)
    return Classifier(backbone, feature_dim, num_classes, config, normalise).train()


def _create_backbone(config: ModelConfig, image_px: int) -> nn.Module:
    import timm

    name = config.backbone
    if ":" in name or "/" in name:
        raise UserError(
            f"model.backbone = {name!r} is a place and no timm network; name the network here and the place in "
            f"model.weights"
        )
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise UserError(
            f"model.backbone = {name!r} is no timm network; did you mean {close[0]!r}? (timm.list_models() has all)"
        )
    known = timm.get_pretrained_cfg(name)
    # Transformers are built for one image size; timm fits their position tables to another when told at birth.
    size: dict[str, Any] = {"img_size": image_px} if known is not None and known.fixed_input_size else {}
    try:
        return timm.create_model(name, num_classes=0, pretrained=False, **size)
    except Exception as error:
        raise UserError(_no_such_size(name, image_px, error)) from error


def _probe(backbone: nn.Module, name: str, image_px: int) -> int:
    """F, seen on an empty image: some timm networks pool to another width than `num_features` says."""
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, 3, image_px, image_px))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(_no_such_size(name, image_px, error)) from error
    if features.ndim != 2:
        raise UserError(
            f"model.backbone = {name!r} gives features of shape {list(features.shape)} instead of one row an image; "
            f"choose a network with global pooling"
        )
    return features.shape[1]


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise UserError(
            f"model.checkpoint_activations: timm's {name!r} cannot recompute its activations; set it to false"
        ) from None


def _no_such_size(name: str, image_px: int, error: Exception) -> str:
    return f"model.backbone = {name!r} cannot take data.image_px = {image_px} ({one_line(error)}); change one of them"
