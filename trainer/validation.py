"""The val split over all workers, and what has to agree between them before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cluster.worker import Worker
from data_pipeline.damage import check_left_out
from data_pipeline.dataset import Dataset
from data_pipeline.loader import Batch
from data_pipeline.passes import evaluation_batches
from trainer.config import TrainerConfig
from trainer.metrics import METRICS
from trainer.model import Output
from trainer.trainee import Trainee


def ready_to_evaluate(trainee: Trainee, batches: Iterable[Batch] | None = None) -> Callable[[Tensor], Output]:
    """The network that is evaluated, in evaluation mode and the same on every rank. Every rank takes part.

    Args:
        trainee: Its moving average is evaluated where it has one.
        batches: Of this rank, on which batch norm's statistics are re-estimated; None = those of training are kept.
    """
    engine, average = trainee.engine, trainee.average
    engine.train(False)
    average_batch_norm(engine.model)
    model, predict = engine.model, engine.__call__
    if average is not None:
        model, predict = average.model, partial(engine.run, average.model)
        average_batch_norm(model)
    if batches is not None:
        reestimate_batch_norm(model, predict, batches)
    model.eval()
    return predict


def average_batch_norm(model: nn.Module) -> None:
    """Average running means and variances over ranks, each of which saw its own images. Every rank takes part.

    After it all ranks hold the same model, so that it does not matter whose buffers a checkpoint keeps.
    """
    buffers = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in (m.running_mean, m.running_var)]
    if not buffers or dist.get_world_size() == 1:
        return
    flat = torch.cat([b.flatten().float() for b in buffers])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):  # type: ignore[union-attr]
        buffer.copy_(mean.view_as(buffer))  # type: ignore[union-attr]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, predict: Callable[[Tensor], Output], batches: Iterable[Batch]) -> None:
    """Running statistics of the weights as they are: plain means over batches, then over ranks. Every rank takes part.

    Those of training belong to weights that have changed since, and weigh the last batches most. With a sampling of its
    own this is the shift that Zhong et al. (MiSLAS, CVPR 2021, arXiv:2104.00466, section 3.3) ask for.

    Args:
        model: Its running statistics are replaced.
        predict: Runs the model, which is in training mode meanwhile, without learning.
        batches: Of this rank; as many on every rank.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's word for a plain mean
    model.train()
    for batch in batches if norms else ():
        predict(batch.images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    average_batch_norm(model)


@torch.no_grad()
def validate(
    predict: Callable[[Tensor], Output], dataset: Dataset, config: TrainerConfig, worker: Worker, device: torch.device
) -> dict[str, float]:
    """Each sample of val once over all workers -> METRICS of the own classifier. Every rank takes part.

    Args:
        predict: The network in evaluation mode.
        dataset: The packed dataset.
        config: Batch size and image settings.
        worker: This rank.
        device: Where the network is.

    Raises:
        UserError: More than `data.max_damaged` images of val are damaged; every rank raises it.
    """
    batch_size = config.features.batch_size
    rows, predictions = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    batches = evaluation_batches(
        dataset,
        config.data,
        "val",
        batch_size=batch_size,
        rank=worker.rank,
        world=worker.world,
        device=device,
        warn=worker.warn,
    )
    num_batches = 0
    worker.beat("validation")  # before the graph of the first batch is built
    for batch in worker.beating(batches, "validation"):
        num_batches += 1
        rows.append(batch.rows)
        predictions.append(predict(batch.images).logits.argmax(1).cpu().numpy())
    if config.stage_one.zero_stage == 3:  # a forward pass is a collective: all ranks do as many
        longest = -(-len(dataset.index("val")) // worker.world)
        side = config.data.image_px
        for _ in range(num_batches, -(-longest // batch_size)):
            predict(torch.zeros(1, 3, side, side, device=device))
    worker.beat("validation, figures")
    parts: list[Any] = [None] * worker.world
    dist.all_gather_object(parts, (np.concatenate(rows), np.concatenate(predictions)))
    seen = np.concatenate([p[0] for p in parts])
    check_left_out(dataset, "val", seen, config.data.max_damaged)
    labels = dataset.index("val").label[seen]
    predicted = np.concatenate([p[1] for p in parts])
    return {name: float(metric(labels, predicted, len(dataset.classes))) for name, metric in METRICS.items()}
