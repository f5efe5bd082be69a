"""What `rarelens plan` shows: the sizes of the dataset, the table over numbers of workers, the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from cluster.errors import UserError
from cluster.storage import open_storage
from data_pipeline.config import DataConfig
from data_pipeline.dataset import DATASET_FILE, open_dataset
from trainer.config import TrainerConfig
from trainer.machine import Machine
from trainer.network_size import NetworkSize, network_size
from trainer.plan import TABLE_WORKERS, DataSize, Prediction, predict

__all__ = ["assumed_size", "data_size", "network_size", "predictions", "table", "to_json"]

BYTES_PER_PIXEL = 0.5
"""Of a photograph as JPEG at the quality that `pack` writes; HAM10000 at 160 px: 13,260 bytes an image with tar."""


def data_size(config: TrainerConfig, images: int | None, num_classes: int | None) -> DataSize:
    """Of the packed dataset where there is one, else of a set of so many training images.

    Args:
        config: Says where the packed dataset is, how it is split and how large the images are.
        images: Training images; None = of the packed dataset.
        num_classes: C; None = of the packed dataset, else 10.

    Raises:
        UserError: There is no packed dataset and `images` is not given.
    """
    if images is not None:
        return assumed_size(config.data, images, num_classes or 10)
    uri = config.data.packed or f"{config.run}/dataset"
    if not open_storage(uri).exists(DATASET_FILE):
        raise UserError(f"{uri} holds no packed dataset to plan for; give its training images by --images, or pack it")
    dataset = open_dataset(uri)
    by_kind = {
        (split, kind): float(sum(s.bytes for s in dataset.shards if (s.split, s.kind) == (split, kind)))
        for split, kind in (("train", "body"), ("train", "tail"), ("val", "whole"))
    }
    counts = {split: int(dataset.class_counts(split).sum()) for split in ("train", "val")}
    return DataSize(counts["train"], counts["val"], num_classes or len(dataset.classes), *by_kind.values())


def assumed_size(data: DataConfig, images: int, num_classes: int) -> DataSize:
    """Of a set that is not packed yet: so many training images, of the size and in the splits that `data` asks for."""
    px = data.pack_px or data.image_px
    train_bytes = images * px * px * 4 / 3 * BYTES_PER_PIXEL  # the long side is longer
    val_images = int(images * data.split.val / data.split.train)
    tail_bytes = min(train_bytes, data.tail_budget_mib * 2**20)
    val_bytes = train_bytes * val_images / images
    return DataSize(images, val_images, num_classes, train_bytes - tail_bytes, tail_bytes, val_bytes)


def predictions(
    config: TrainerConfig, data: DataSize, network: NetworkSize, kind: Machine, workers: int
) -> list[Prediction]:
    """The table's numbers of workers, with the one that is asked for among them."""
    return [predict(config, data, network, kind, number) for number in sorted({*TABLE_WORKERS, workers})]


def table(rows: list[Prediction], config: TrainerConfig, kind: Machine, asked: int) -> Table:
    """For the terminal; the number of workers that was asked for is bold."""
    made = Table(
        title=f"{config.model.backbone}, {config.data.image_px} px, batch {config.stage_one.batch_size}, "
        f"ZeRO {config.stage_one.zero_stage}, on {kind.name} machines ({kind.source})"
    )
    for name in HEADINGS:
        made.add_column(name, justify="left" if name == "notes" else "right")
    for item in rows:
        made.add_row(*row(item), style="bold" if item.workers == asked else None)
    return made


HEADINGS = (
    "GPUs", "images each", "images/s", "S3 MB/s", "S3 MB first epoch, later",
    "pool MB, ms", "gradient MB, ms", "GiB each", "checkpoint MB, s", "steps/epoch", "hours", "USD", "notes",
)  # fmt: skip


def row(item: Prediction) -> list[str]:
    """A line of the table, by `HEADINGS`."""
    sent = item.messages
    pool_bytes = sent.pool_forward_bytes + sent.pool_backward_bytes
    return [
        str(item.workers),
        str(item.images_per_worker),
        f"{item.images_per_s:,.0f}",
        f"{item.s3_bytes_per_s / 1e6:,.1f}",
        f"{item.s3_first_epoch_bytes / 1e6:,.0f}, {item.s3_later_epoch_bytes / 1e6:,.0f}",
        f"{pool_bytes / 1e6:.3f}, {sent.pool_s * 1e3:.1f}",
        f"{sent.gradient_bytes / 1e6:.1f}, {sent.gradient_s * 1e3:.1f}",
        f"{item.memory.total / 2**30:.1f}",
        f"{item.checkpoint_bytes / 1e6:,.0f}, {item.upload_s:.1f}",
        f"{item.steps_per_epoch:,}",
        f"{item.wall_h:,.2f}",
        f"{item.cost_usd:,.2f}",
        "; ".join(item.notes),
    ]


def to_json(rows: list[Prediction], data: DataSize, network: NetworkSize, kind: Machine) -> str:
    """Everything, the constants too."""
    found = {"machine": asdict(kind), "data": asdict(data), "network": asdict(network)}
    return json.dumps({**found, "predictions": [item.to_json() for item in rows]}, indent=2) + "\n"
