"""What a step cost and said: a line every `log_every_steps` steps, for log.jsonl, TensorBoard and the progress bar."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.worker import Worker
from data_pipeline.loader import TrainLoader
from trainer.config import StageOneConfig
from trainer.engine import Engine
from trainer.objective import Evaluation

MIB = 2**20
LINES_KEPT = 20
"""Of a checkpoint. The driver asks for lines twice a second."""


class ToldLines:
    """What rank 0 tells the driver. Checkpoints hold the last of it: a driver that is killed may not have written it.

    Args:
        worker: This rank.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self.last: deque[dict[str, Any]] = deque(maxlen=LINES_KEPT)

    def tell(self, line: dict[str, Any]) -> None:
        """Tell the driver, from rank 0."""
        if self._worker.rank == 0:
            self.last.append(line)
            self._worker.tell(line)

    def tell_again(self, lines: Iterable[dict[str, Any]]) -> None:
        """Tell what a checkpoint holds; `again` lets the driver pass over what it knows."""
        for line in lines:
            self.last.append(line)
            if self._worker.rank == 0:
                self._worker.tell({**line, "again": True})


class StepLog:
    """Tells the driver of the steps; between two lines it only counts.

    Args:
        worker: This rank.
        told: Takes the lines.
        loader: Knows how long the loop has waited for it.
        config: Stage one's configuration.
        classes: Class names.
    """

    def __init__(
        self,
        worker: Worker,
        told: ToldLines,
        loader: TrainLoader,
        config: StageOneConfig,
        classes: tuple[str, ...],
    ):
        self._told = told
        self._worker, self._loader, self._config, self._classes = worker, loader, config, classes
        self._steps, self._anchors = 0, 0
        self._masked: list[Tensor] = []
        self._since = self._paused_at = time.perf_counter()
        self._waited = self._waited_at_pause = loader.wait_s

    def resume(self) -> None:
        """Steps begin, or go on after a validation, whose time and waiting are not theirs."""
        self._since += time.perf_counter() - self._paused_at
        self._waited += self._loader.wait_s - self._waited_at_pause

    def pause(self) -> None:
        """Steps end, or stop for a validation."""
        self._paused_at, self._waited_at_pause = time.perf_counter(), self._loader.wait_s

    def step(self, step: int, epoch: int, lr: float, evaluation: Evaluation, engine: Engine) -> None:
        """Count a step; on each `log_every_steps`-th one all ranks take part, and rank 0 tells.

        Args:
            step: Of the run, from 1.
            epoch: From 0.
            lr: Learning rate of the step.
            evaluation: Of this rank's batch.
            engine: Knows the gradient's norm.
        """
        self._steps += 1
        self._masked.append(evaluation.masked)
        self._anchors += len(evaluation.gathered.labels) if evaluation.gathered is not None else 0
        if step % self._config.log_every_steps:
            return
        seconds = time.perf_counter() - self._since
        masked, waited_s, memory_mib = self._over_ranks()
        if self._worker.rank == 0:
            line: dict[str, Any] = {"kind": "step", "step": step, "epoch": epoch, "loss": evaluation.total}
            line |= evaluation.terms | {"lr": lr, "grad_norm": engine.grad_norm}
            line |= {
                "images_per_s": self._steps * self._config.batch_size / seconds,
                "step_s": seconds / self._steps,
                "wait_share": waited_s / seconds,
                "peak_memory_mib": memory_mib,
            }
            if engine.loss_scale is not None:
                line["loss_scale"] = engine.loss_scale
            self._told.tell(line | self._pool_figures(evaluation, masked))
        self._steps, self._anchors, self._masked = 0, 0, []
        self._since, self._waited = time.perf_counter(), self._loader.wait_s

    def _over_ranks(self) -> tuple[list[int], float, float]:
        """Anchors without a term by class, seconds of waiting (mean), peak memory in MiB (largest), of all ranks."""
        masked = torch.cat(self._masked)
        counts = torch.bincount(masked, minlength=len(self._classes)).double()
        own = torch.cat([counts, counts.new_tensor([self._loader.wait_s - self._waited, _peak_memory_mib()])])
        parts = own.new_empty(self._worker.world, len(own))
        dist.all_gather_into_tensor(parts, own[None])
        sums, largest = parts.sum(0).tolist(), parts.max(0).values.tolist()
        return [int(n) for n in sums[:-2]], sums[-2] / self._worker.world, largest[-1]

    def _pool_figures(self, evaluation: Evaluation, masked: list[int]) -> dict[str, Any]:
        if evaluation.gathered is None or evaluation.pool is None:
            return {}
        rows_of_class = torch.bincount(evaluation.pool.labels, minlength=len(self._classes))
        positives = rows_of_class.index_select(0, evaluation.gathered.labels) - 1
        return {
            "metric_weight": evaluation.metric_weight,
            "pool_rows": len(evaluation.pool.labels),
            "positives_per_anchor": float(positives.double().mean()),
            "anchors_without_term": sum(masked),
            "anchors_without_term_share": sum(masked) / max(1, self._anchors),
            "anchors_without_term_by_class": {
                name: count for name, count in zip(self._classes, masked, strict=True) if count
            },
        }


def _peak_memory_mib() -> float:
    """The largest memory of this process so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
