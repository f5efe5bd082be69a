"""Stage one's loop in gloo processes, without Ray: each rank's messages and checkpoints in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trainer.stage_one
from cluster.checkpoint import newest_whole
from cluster.worker import Worker
from data_pipeline.loader import Batch, TrainLoader
from tests.engines import prepare
from trainer.config import TrainerConfig
from trainer.starting_point import StartingPoint


class Interrupted(Exception):
    """Stands for a kill right after a checkpoint."""


class FolderWorker(Worker):
    """Ranks share a folder; rank 0 keeps what was told.

    Args:
        rank: Of this process.
        world: Number of processes.
        folder: Of the run.
        stop_after: Epoch, or name of the checkpoint, after which the run is interrupted.
    """

    def __init__(self, rank: int, world: int, folder: Path, stop_after: int | str | None = None):
        super().__init__(rank, world, "cpu")
        self.folder, self.stop_after = folder, stop_after
        self.told: list[dict[str, Any]] = []

    def tell(self, message: dict[str, Any]) -> None:
        again = "again " if message.get("again") else ""
        message = {**message, "kind": again + message["kind"]}
        self.told.append(json.loads(json.dumps(message)))

    def warn(self, text: str) -> None:
        self.tell({"kind": "warning", "text": text})

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        yield newest_whole(sorted(self.folder.glob("*-*"), key=_step_of, reverse=True))

    def report(self, metrics: dict[str, float], folder: Path, name: str) -> None:
        import torch.distributed as dist

        shutil.copytree(folder, self.folder / name, dirs_exist_ok=True)
        dist.barrier()
        if self.stop_after in (metrics["epoch"], name):
            raise Interrupted


def _step_of(folder: Path) -> int:
    return int(json.loads((folder / "manifest.json").read_text())["extra"]["step"])


def loop(
    rank: int,
    world: int,
    config: TrainerConfig,
    folder: Path,
    stop_after: int | str | None = None,
    change: Callable[[Batch, int], None] | None = None,
    start: StartingPoint | None = None,
) -> list[dict[str, Any]]:
    """Train, and return what rank 0 was told. `folder` holds the packed dataset in `dataset`.

    Args:
        rank: Of this process.
        world: Number of processes.
        config: The configuration.
        folder: Checkpoints go to `folder / config.run`.
        stop_after: Epoch, or name of the checkpoint, after which the run is interrupted.
        change: Called with each batch and its rank before the loop sees it.
        start: What the training goes on from.
    """
    prepare(rank, world)

    class Changed(TrainLoader):
        def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
            for batch in super().epoch(epoch, first_step):
                if change is not None:
                    change(batch, rank)
                yield batch

    worker = FolderWorker(rank, world, folder / config.run, stop_after)
    original = trainer.stage_one.TrainLoader
    trainer.stage_one.TrainLoader = Changed  # type: ignore[misc]
    try:
        trainer.stage_one.train_on_worker(worker, config, str(folder / "dataset"), start=start)
    except Interrupted:
        pass
    finally:
        trainer.stage_one.TrainLoader = original  # type: ignore[misc]
    return worker.told
