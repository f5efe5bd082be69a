"""What stage one trains, put together from the configuration: network, loss, engine, memory, moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from cluster.worker import Worker
from data_pipeline.loader import TrainLoader
from trainer.batch_norm import synchronise_batch_norm
from trainer.config import TrainerConfig
from trainer.engine import Engine
from trainer.losses import build_classification_loss, build_metric_loss
from trainer.memory import CrossBatchMemory
from trainer.model import build_model
from trainer.nonfinite import NonFiniteGuard
from trainer.objective import Objective
from trainer.pool_size import check_pool_fits
from trainer.step_log import ToldLines
from trainer.weight_average import WeightAverage

if TYPE_CHECKING:
    from trainer.starting_point import StartingPoint


@dataclass(frozen=True)
class Trainee:
    """Everything that a step changes, and all that a checkpoint holds.

    Attributes:
        name: Folder of the checkpoints below the run folder.
        engine: The network and its optimiser.
        objective: What is minimised.
        average: Moving average of the weights; None = off.
        memory: Embeddings of past batches; None = off.
        loader: This rank's batches.
        guard: Against what is not finite.
        told: What the driver was told last.
    """

    name: str
    engine: Engine
    objective: Objective
    average: WeightAverage | None
    memory: CrossBatchMemory | None
    loader: TrainLoader
    guard: NonFiniteGuard
    told: ToldLines


def build_trainee(
    worker: Worker,
    config: TrainerConfig,
    class_counts: np.ndarray,
    loader: TrainLoader,
    device: torch.device,
    name: str = "stage_one",
    start: StartingPoint | None = None,
) -> Trainee:
    """Put it together as the configuration says. Every rank takes part.

    Args:
        worker: This rank.
        config: The configuration.
        class_counts: [C], training samples of each class.
        loader: This rank's batches.
        device: Where the network goes.
        name: Folder of the checkpoints below the run folder.
        start: What the training goes on from; None = the starting weights of the configuration.

    Raises:
        UserError: The backbone, its weights, the losses, the pool or DeepSpeed's settings do not fit.
    """
    stage, num_classes, counts = config.stage_one, len(class_counts), torch.from_numpy(class_counts)
    # Every rank builds the same weights from the same seed; DeepSpeed broadcasts rank 0's besides.
    torch.manual_seed(config.seed)
    model = build_model(config.model, num_classes, config.data.image_px, normalise=stage.loss.normalise)
    if start is not None:
        start.prepare(model, config.model.backbone)
    model.to(device)
    if config.model.sync_batch_norm:
        synchronise_batch_norm(model)

    dim = model.feature_dim if stage.loss.compare == "feature" else config.model.embedding_dim
    metric_loss = build_metric_loss(stage.loss, num_classes, dim, counts)
    classification = build_classification_loss(stage.classification, counts, config.model.cosine_scale)
    memory = None
    if metric_loss is not None:
        metric_loss.to(device)
        check_pool_fits(stage.batch_size * stage.views + stage.memory.rows, dim, torch.float32, device)
        if stage.memory.rows:
            memory = CrossBatchMemory(stage.memory, dim, device=device)

    return Trainee(
        name=name,
        average=WeightAverage(model, stage.ema_decay) if stage.ema_decay is not None else None,
        engine=Engine(model, stage, worker.world, worker.device, metric_loss),  # after the average, which copies it
        objective=Objective(stage, classification.to(device), metric_loss, memory),
        memory=memory,
        loader=loader,
        guard=NonFiniteGuard(worker, stage, "stage_one.optimiser.lr" if start is None else "fine_tune.lr"),
        told=ToldLines(worker),
    )
