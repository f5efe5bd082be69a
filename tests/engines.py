"""Engines in gloo processes: a tiny network and a fixed stream of batches, and a plain torch loop to hold them to."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig, StageOneConfig
from trainer.losses import LossSum, Pool
from trainer.model import Classifier, build_model

NUM_CLASSES = 4
BATCH = 8
PX = 32


class Proxies(nn.Module):
    """A metric loss with a parameter of its own: squared distance to the proxy of the label."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(NUM_CLASSES, dim))

    def forward(self, anchors: Tensor, labels: Tensor, pool: Pool, progress: float) -> LossSum:
        return LossSum((anchors - self.proxies[labels]).square().sum(), len(labels), labels[:0])


def prepare(rank: int, world: int) -> None:
    """What Ray Train and `cluster.launch` set for a worker."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def tiny_model(**changes: Any) -> Classifier:
    torch.manual_seed(3)
    settings = {"backbone": "test_resnet", "hidden_dim": 16, "embedding_dim": 8, "freeze_batch_norm": True, **changes}
    return build_model(ModelConfig(**settings), NUM_CLASSES, PX)


def stage(**changes: Any) -> StageOneConfig:
    optimiser = {"lr": 3e-3, "weight_decay": 0.1, **changes.pop("optimiser", {})}
    return StageOneConfig(**{"batch_size": BATCH, "views": 1, "optimiser": optimiser, **changes})


def images_and_labels(step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This rank's share of the batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(BATCH, 3, PX, PX, generator=generator)
    labels = torch.randint(NUM_CLASSES, (BATCH,), generator=generator)
    return images.chunk(world)[rank], labels.chunk(world)[rank]
