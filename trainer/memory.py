"""Cross-batch memory: embeddings of past batches as further rows of the pool, without gradient.

Wang et al., Cross-Batch Memory for Embedding Learning, CVPR 2020 (arXiv 1912.06798), algorithm 1: embeddings drift so
slowly after the first epochs that those of past batches still serve as negatives and positives. What is ours: one
content for all ranks, and an eviction that keeps rare classes.

Shapes: N rows of all ranks in a step, M rows that the memory has room for, K <= M rows in it, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cluster.errors import UserError
from trainer.config import MemoryConfig
from trainer.losses.base import Pool
from trainer.pool_size import check_pool_fits


class CrossBatchMemory:
    """The newest embeddings of past batches; with class-aware eviction the newest of each class.

    Its content is the same on every rank by construction: what goes in is the gathered pool, which all ranks hold in
    one order, and what goes out follows from labels and order alone. No message is sent. It is empty until
    `start_epoch`, and an empty memory changes nothing.

    A step first compares (`extend`) and then remembers (`add`): no anchor meets itself in the memory. The paper adds
    first; there the batch's own rows are in the pool twice. An earlier view of an anchor's own image may well be in the
    memory: it is a positive like any other.

    Args:
        config: `stage_one.memory`, with `rows` > 0.
        dim: D.
        dtype: Of the embeddings; float32 whatever the network's precision.
        device: Where they are.

    Raises:
        UserError: M rows are more than the device's memory holds.
    """

    def __init__(
        self,
        config: MemoryConfig,
        dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        check_pool_fits(config.rows, dim, dtype, device)
        self._config = config
        self._embeddings = torch.empty(0, dim, dtype=dtype, device=device)
        self._labels = torch.empty(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """K."""
        return len(self._labels)

    def extend(self, pool: Pool) -> Pool:
        """The pool with the memory's rows behind it, oldest first; gradients reach the pool's own rows only.

        Args:
            pool: [N, D] and [N] of the step's batch. Anchors keep their row numbers.

        Returns:
            [N + K, D] and [N + K]; the pool itself while the memory is empty.
        """
        if not len(self):
            return pool
        remembered = self._embeddings.to(pool.embeddings.dtype)
        return Pool(torch.cat([pool.embeddings, remembered]), torch.cat([pool.labels, self._labels]), first=pool.first)

    @torch.no_grad()
    def add(self, pool: Pool, epochs_done: float, order: Tensor | None = None) -> None:
        """Remember a batch, after its backward. Nothing happens up to `start_epoch`.

        Args:
            pool: As gathered, [N, D] and [N], without the memory's rows.
            epochs_done: When this step is, in (0, epochs].
            order: [N], the pool's rows in an order that does not depend on the number of ranks
                (`trainer.pool.gather_order`). Without it, which of a batch's equally evictable rows stays depends on
                how the batch was cut into ranks.
        """
        if epochs_done <= self._config.start_epoch:
            return
        rows, labels = pool.embeddings.detach(), pool.labels
        if order is not None:
            rows, labels = rows.index_select(0, order), labels.index_select(0, order)
        self._fill(torch.cat([self._embeddings, rows.to(self._embeddings)]), torch.cat([self._labels, labels]))

    def state_dict(self) -> dict[str, Tensor]:
        """`embeddings` [K, D] and `labels` [K], oldest first; any rank's serve any rank of any number of ranks."""
        return {"embeddings": self._embeddings, "labels": self._labels}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved memory; of one with more rows than there is room for, the eviction's choice stays.

        Raises:
            UserError: Its embeddings have another width.
        """
        rows, labels = state["embeddings"], state["labels"]
        if rows.shape[1:] != self._embeddings.shape[1:]:
            raise UserError(
                f"the checkpoint's memory holds embeddings of {rows.shape[1]} dimensions and the model makes "
                f"{self._embeddings.shape[1]}; set model.embedding_dim and stage_one.loss.compare as they were"
            )
        self._fill(rows.to(self._embeddings), labels.to(self._labels))

    def _fill(self, rows: Tensor, labels: Tensor) -> None:
        """Keep M of the rows, oldest first."""
        kept = EVICTIONS[self._config.eviction](labels, self._config.rows)
        self._embeddings, self._labels = rows.index_select(0, kept), labels.index_select(0, kept)


def newest(labels: Tensor, size: int) -> Tensor:
    """Evict the oldest rows: a queue, as in the paper.

    Args:
        labels: [L] of all rows, oldest first.
        size: Most rows to keep.

    Returns:
        [min(L, size)] the rows that stay, oldest first.
    """
    return torch.arange(max(0, len(labels) - size), len(labels), device=labels.device)


def newest_of_each_class(labels: Tensor, size: int) -> Tensor:
    """While there are too many rows, evict the oldest row of the class that has most; of several such classes, the
    oldest of these rows.

    So a class loses rows only to keep the largest ones level: with h the level, class c of n_c rows keeps min(n_c, h)
    or, of the classes cut, h + 1; rare classes stay until they have h rows, which takes them longer, by as much as they
    are rarer.

    The same in one go: count each row's newer rows of its own class, a. Evictions come in falling order of a, and for
    equal a the older first; what stays are the `size` first rows in rising order of (a, -age). O(L log L).

    Args:
        labels: [L] of all rows, oldest first.
        size: Most rows to keep.

    Returns:
        [min(L, size)] the rows that stay, oldest first.
    """
    from_newest = torch.arange(len(labels), device=labels.device)
    by_class, rows = labels.flip(0).sort(stable=True)
    newer_of_class = torch.empty_like(rows)
    newer_of_class[rows] = from_newest - torch.searchsorted(by_class, by_class)
    kept = newer_of_class.argsort(stable=True)[:size]  # stable: the newer come first
    return len(labels) - 1 - kept.sort(descending=True).values


# `stage_one.memory.eviction` -> (labels of all rows, oldest first; room) -> rows that stay, oldest first.
EVICTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"oldest": newest, "class_aware": newest_of_each_class}
