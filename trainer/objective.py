"""What stage one minimises: classification loss + lambda * metric loss against the embeddings of all workers.

Shapes: B images of this rank in a step, V views of each, D embedding, F feature, C classes, T terms of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import StageOneConfig
from trainer.losses import LossSum, metric_rows
from trainer.model import Output
from trainer.pool import Pool, gather_order, gather_pool, global_mean

if TYPE_CHECKING:
    from data_pipeline.loader import Batch
    from data_pipeline.mix import Mix
    from trainer.memory import CrossBatchMemory


@dataclass(frozen=True)
class Evaluation:
    """The objective of one batch.

    Attributes:
        loss: What this rank gives to backward; its average over ranks is the objective (`trainer.pool.global_mean`).
        total: The objective itself, the same on every rank.
        terms: Mean of each term over all ranks, the same on every rank, without its weight.
        metric_weight: Lambda at this step.
        gathered: The embeddings of this batch from all ranks; None without a metric loss.
        pool: What the anchors were compared with: `gathered` and the memory's rows behind it.
        masked: [M] labels of this rank's anchors that have no term.
        own_sums: [T] this rank's sums.
        signals: Sums over all ranks of what each has to say to the others, the same on every rank.
    """

    loss: Tensor
    total: float
    terms: dict[str, float]
    metric_weight: float
    gathered: Pool | None
    pool: Pool | None
    masked: Tensor
    own_sums: Tensor
    signals: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        """The same on every rank."""
        return math.isfinite(self.total)


class Objective:
    """L = classification loss + lambda * metric loss (arXiv 2207.06975, eq. 1)."""

    def __init__(
        self,
        config: StageOneConfig,
        classification: nn.Module,
        metric_loss: nn.Module | None,
        memory: CrossBatchMemory | None = None,
    ):
        self._config, self._classification = config, classification
        self._metric_loss = metric_loss if config.loss.weight > 0 else None
        self._memory = memory

    def __call__(
        self,
        output: Output,
        labels: Tensor,
        epochs_done: float,
        mix: Mix | None = None,
        signals: Sequence[float] = (),
    ) -> Evaluation:
        """The objective of one batch. Every rank takes part, also in the backward of `loss`.

        Args:
            output: Of the V * B images of this rank, view-major.
            labels: [B], of the same.
            epochs_done: When this step is, in (0, epochs].
            mix: The partners' labels and each image's own share, where images are mixed; the classification loss learns
                from all, the metric loss compares those that are not mixed.
            signals: Of this rank, to be added up over all ranks in the message that the sums need anyway.
        """
        share = epochs_done / self._config.epochs
        labels = labels.repeat(self._config.views)
        terms = {"cross_entropy": self._classify(output.logits, labels, share, mix)}
        weights = [1.0]
        gathered = pool = None
        if self._metric_loss is not None:
            rows, compared = metric_rows(self._config.loss, output.features, output.embeddings), labels
            if mix is not None:  # an image of two classes is no example of either
                unmixed = (mix.share == 1).repeat(self._config.views)
                rows, compared = rows[unmixed], labels[unmixed]
            gathered = pool = gather_pool(rows, compared)
            if self._memory is not None:
                pool = self._memory.extend(gathered)
            terms["metric_loss"] = self._metric_loss(rows, compared, pool, share)
            weights.append(self._config.loss.weight_at(epochs_done))
        own, sums, signalled = _add_up(list(terms.values()), signals)
        parts = [
            weight * global_mean(term, num_terms)
            for weight, term, num_terms in zip(weights, terms.values(), sums[:, 1].long().tolist(), strict=True)
        ]
        means = (sums[:, 0].float() / sums[:, 1].clamp(min=1).float()).tolist()
        return Evaluation(
            loss=sum(parts[1:], parts[0]),
            total=sum(weight * mean for weight, mean in zip(weights, means, strict=True)),
            terms=dict(zip(terms, means, strict=True)),
            metric_weight=weights[-1] if len(weights) > 1 else 0.0,
            gathered=gathered,
            pool=pool,
            masked=torch.cat([term.masked for term in terms.values()]),
            own_sums=own,
            signals=signalled,
        )

    def parameters(self) -> list[nn.Parameter]:
        """The metric loss's own centres, proxies or prototypes."""
        return list(self._metric_loss.parameters()) if self._metric_loss is not None else []

    def remember(self, evaluation: Evaluation, batch: Batch, epochs_done: float) -> None:
        """Put a batch that was learnt from into the memory, if there is one. Every rank takes part.

        Args:
            evaluation: Of the batch.
            batch: Of this rank, with its positions in the epoch.
            epochs_done: When this step is.
        """
        if self._memory is None or evaluation.gathered is None:
            return
        assert batch.positions is not None
        views = self._config.views
        positions = batch.positions if batch.mix is None else batch.positions[(batch.mix.share == 1).cpu().numpy()]
        own = np.concatenate([positions * views + view for view in range(views)])
        # The memory's order must not depend on how the batch was cut into ranks.
        order = gather_order(torch.from_numpy(own).to(evaluation.gathered.labels.device))
        self._memory.add(evaluation.gathered, epochs_done, order)

    def _classify(self, logits: Tensor, labels: Tensor, share: float, mix: Mix | None) -> LossSum:
        if mix is None:
            return self._classification(logits, labels, share)
        # Zhang et al., mixup (arXiv 1710.09412): lam * L(y) + (1 - lam) * L(y_partner), of each image.
        own_share, partners = mix.share.repeat(self._config.views), mix.labels.repeat(self._config.views)
        own = self._classification(logits, labels, share, own_share)
        partner = self._classification(logits, partners, share, 1 - own_share)
        return LossSum(own.total + partner.total, own.count, own.masked)


def _add_up(terms: list[LossSum], signals: Sequence[float]) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """This rank's sums [T]; sums and counts over all ranks [T, 2] in float64; signals over all ranks.

    One message serves the means, the log, the signals, and the agreement of all ranks on whether the loss is finite:
    what is not finite on one rank is not finite in the sum. Every rank takes part.
    """
    own = torch.stack([term.total.detach().float() for term in terms])
    further = [*(term.count for term in terms), *signals]
    message = torch.cat([own.double(), torch.tensor(further, dtype=torch.float64, device=own.device)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(message)
    sums, signalled = message[: 2 * len(terms)], message[2 * len(terms) :]
    return own, sums.view(2, len(terms)).T, tuple(signalled.tolist())
