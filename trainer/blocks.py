"""The blocks of a backbone, from images to features, as timm counts them, and which of them learn."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from cluster.errors import UserError
from trainer.model import Classifier


def backbone_blocks(backbone: nn.Module) -> list[list[str]]:
    """Names of the parameters of each block, the stem first; every parameter is in one block.

    Blocks are the coarse groups by which timm lowers learning rates layer by layer: stages of a convolutional network,
    single blocks of a transformer. What holds no weights but a normalisation's belongs to the block before it.
    """
    from timm.models import group_parameters

    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        return [[name for name, _ in backbone.named_parameters()]]
    shapes = {name: parameter.ndim for name, parameter in backbone.named_parameters()}
    groups = group_parameters(backbone, matcher(coarse=True))
    blocks: list[list[str]] = []
    for number in sorted(groups):
        if blocks and all(shapes[name] <= 1 for name in groups[number]):
            blocks[-1].extend(groups[number])
        else:
            blocks.append(list(groups[number]))
    return blocks


def freeze_all_but(model: Classifier, name: str, learning: int | Literal["all"]) -> None:
    """Let the last blocks of the backbone and the classifier learn, and nothing else.

    The embedding head never learns: there is no metric loss.

    Args:
        model: Its parameters' `requires_grad` are set.
        name: Of the backbone, for the message.
        learning: Number of blocks, or `all`.

    Raises:
        UserError: The backbone has fewer blocks.
    """
    check_blocks(model.backbone, name, learning)
    blocks = backbone_blocks(model.backbone)
    first = 0 if learning == "all" else len(blocks) - learning
    learn = {parameter for block in blocks[first:] for parameter in block}
    model.embedding.requires_grad_(False)
    for parameter_name, parameter in model.backbone.named_parameters():
        parameter.requires_grad_(parameter_name in learn)


def check_blocks(backbone: nn.Module, name: str, learning: int | Literal["all"]) -> None:
    """Refuse more blocks than there are.

    Raises:
        UserError: The backbone has fewer blocks.
    """
    number = len(backbone_blocks(backbone))
    if learning != "all" and learning > number:
        raise UserError(
            f"fine_tune.blocks = {learning} is more than the {number} blocks of model.backbone = {name!r}; lower it, "
            f"or set it to all"
        )
