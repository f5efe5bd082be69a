"""Losses and gradients that are not finite: every rank stops at that very step, or leaves it out, and says why."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.worker import Worker
from data_pipeline.loader import Batch
from trainer.config import StageOneConfig
from trainer.engine import Engine
from trainer.model import Output
from trainer.objective import Evaluation

MAX_NAMED = 8
"""Images of a worker that a message names; the others are counted."""


class NonFiniteGuard:
    """Weights are never updated with what is not finite; all ranks take the same way.

    The agreement costs no message of its own. Whether the loss is finite shows in the sums that all ranks add up anyway
    before backward; whether the gradient is, in its norm: at ZeRO 0 every rank has the whole averaged gradient, at
    ZeRO 1 to 3 DeepSpeed adds up the parts' norms itself. The norm is read at each step, also without clipping: one
    pass over the gradient, and on a GPU one wait for backward before the optimiser is launched.

    Args:
        worker: This rank.
        config: Stage one's configuration.
        lr_setting: What the learning rate is called in the user's configuration.
        skipped: Steps that the run has left out so far.
        last_checkpoint: Where the newest checkpoint lies below the run folder; None without any.
    """

    def __init__(
        self,
        worker: Worker,
        config: StageOneConfig,
        lr_setting: str = "stage_one.optimiser.lr",
        skipped: int = 0,
        last_checkpoint: str | None = None,
    ):
        self._worker, self._config, self._lr_setting = worker, config, lr_setting
        self.skipped, self.last_checkpoint = skipped, last_checkpoint
        self._kept: list[Tensor] = []

    def before(self, model: nn.Module) -> None:
        """Keep batch norm's statistics, which the forward pass of a step that is left out would spoil."""
        if self._config.skip_nonfinite_steps:
            self._kept = [buffer.clone() for buffer in model.buffers()]

    def leave_out(self, step: int, batch: Batch, output: Output, evaluation: Evaluation, engine: Engine) -> None:
        """Deal with a step that did not update the weights. Every rank takes part.

        Under fp16 a gradient that is too large for its loss scale is part of the method and does not count.

        Args:
            step: Of the run, from 1.
            batch: Of this rank.
            output: The network's, of `batch`.
            evaluation: Of `batch`.
            engine: Its model takes back the statistics that `before` kept.

        Raises:
            UserError: More steps than `skip_nonfinite_steps` had to be left out; the same on every rank.
        """
        if evaluation.is_finite and engine.overflowed:
            return
        what = self._describe(batch, output, evaluation)
        where = f"step {step} (epoch {batch.epoch})"
        self.skipped += 1
        if self.skipped > self._config.skip_nonfinite_steps:
            last = self.last_checkpoint
            good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
            left_out = f", after {self.skipped - 1} steps left out" if self.skipped > 1 else ""
            raise UserError(
                f"{what} at {where}{left_out}; the weights were not updated, {good}; lower {self._lr_setting} = "
                f"{self._config.optimiser.lr:g}, or raise stage_one.skip_nonfinite_steps = "
                f"{self._config.skip_nonfinite_steps}, and give another run=..."
            )
        for buffer, kept in zip(engine.model.buffers(), self._kept, strict=True):
            buffer.copy_(kept)
        if self._worker.rank == 0:
            self._worker.tell(
                {"kind": "skipped", "step": step, "epoch": batch.epoch, "skipped": self.skipped, "reason": what}
            )

    def _describe(self, batch: Batch, output: Output, evaluation: Evaluation) -> str:
        """What is not finite, and the images of the ranks from which it came."""
        finite_rows = torch.stack([rows.detach().isfinite().all(1) for rows in output]).all(0)
        finite_images = finite_rows.view(-1, len(batch.keys)).all(0).tolist() if batch.keys else []
        bad_images = [key for key, finite in zip(batch.keys, finite_images, strict=True) if not finite]
        own_loss_is_finite = bool(evaluation.own_sums.isfinite().all())
        told: list[Any] = [None] * self._worker.world
        dist.all_gather_object(told, (bad_images, own_loss_is_finite, batch.keys))
        # Outputs first: through the pool they spoil the loss of every other rank.
        images = {rank: bad for rank, (bad, _, _) in enumerate(told) if bad}
        if images:
            return f"the loss is {evaluation.total}, from outputs that are not finite for {_named(images)}"
        images = {rank: keys for rank, (_, finite, keys) in enumerate(told) if not finite}
        if images:
            return f"the loss is {evaluation.total}, from the batch of {_named(images)}"
        return f"the gradient is not finite (loss {evaluation.total:g}), in the batch of " + _named(
            {rank: keys for rank, (_, _, keys) in enumerate(told)}
        )


def _named(images: dict[int, list[str]]) -> str:
    """`worker 0: a, b; worker 1: c and 24 more`."""
    parts = []
    for rank, keys in images.items():
        more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
        parts.append(f"worker {rank}: {', '.join(keys[:MAX_NAMED])}{more}")
    return "; ".join(parts)
