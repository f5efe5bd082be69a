"""The only file where embeddings cross ranks: the pool of all ranks with its gradient, and the global mean.

Every rank calls each function, in the same order, also when it has no valid anchor or no sample at all; the backward of
`gather_pool` is a collective too, so each rank gives backward a loss that depends on its pool. Without a process group,
or with one rank, the same code runs and the messages are skipped.

Shapes: W ranks, B_r embeddings of rank r, N = sum of B_r, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.losses.base import LossSum, Pool
from trainer.pairwise import accumulation_dtype

__all__ = ["LossSum", "Pool", "gather_order", "gather_pool", "gather_sizes", "global_mean"]

# What a rank says of its rows before any are sent: number of rows, of labels, D, dtype as a place in this list.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gather_pool(embeddings: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Pool:
    """Concatenate the embeddings of all ranks, in rank order, with gradient.

    The gradient of this rank's embeddings is the sum, over all ranks, of what their losses give to these rows.

    Args:
        embeddings: [B_r, D] of this rank; B_r may differ between ranks and be 0, D and dtype may not differ.
        labels: [B_r] int64.
        group: None = the default group.

    Raises:
        ValueError: Embeddings of two ranks do not fit together, or embeddings and labels of one; on every rank alike,
            so that none is left waiting.
    """
    rank = _rank(group)
    own = (len(embeddings), len(labels), embeddings.shape[1], DTYPES.index(embeddings.dtype))
    sizes = _check_shapes(_gather_numbers(own, embeddings.device, group))
    if len(sizes) == 1:
        return Pool(embeddings, labels, 0)
    pool = _GatherRows.apply(embeddings, sizes, rank, group)
    return Pool(pool, _gather_rows(labels, sizes, group), sum(sizes[:rank]))


def gather_order(keys: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The gathered pool's rows in an order that does not depend on how the batch was cut into ranks.

    Args:
        keys: [B_r] int64, a number of each row of this rank that it would have on any rank, e.g. position and view.
        group: None = the default group.

    Returns:
        [N] rows of the pool, by rising key; the same on every rank.
    """
    sizes = gather_sizes(len(keys), keys.device, group)
    return (_gather_rows(keys, sizes, group) if len(sizes) > 1 else keys).argsort(stable=True)


def gather_sizes(size: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """One number of each rank, in rank order; `device` is where messages are made."""
    return [numbers[0] for numbers in _gather_numbers((size,), device, group)]


def global_mean(loss: LossSum, num_terms: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The scalar which this rank gives to backward: its average over ranks is the mean over all ranks' terms.

    Derivation. Let S_r be rank r's sum, n the number of terms of all ranks, L_r what rank r gives to backward
    and e_r its embeddings, functions of the parameters t. `gather_pool` hands to e_r the sum of all ranks' gradients,
    so rank r's parameter gradient is

        g_r = (d e_r / d t)^T sum_s d L_s / d e_r,   and   sum_r g_r = d (sum_s L_s) / d t.

    Terms that do not pass the pool (cross-entropy) have d L_s / d e_r = 0 for s != r; the same holds. The engine, like
    DistributedDataParallel, averages: (1/W) sum_r g_r. With L_r = W * S_r / n this is d (sum_r S_r / n) / d t, the
    gradient that one rank with the global batch has. Without the factor W it would be W times too small; with each
    rank's own mean (S_r / n_r) terms of ranks with few of them would weigh more.

    Args:
        loss: This rank's sum.
        num_terms: n, the sum of all ranks' `loss.count`.
        group: None = the default group.

    Returns:
        W * S_r / n; zero, still with a graph, where no rank has a term.
    """
    return loss.total * (_world(group) / max(num_terms, 1))


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order; backward sums the pool's gradient over ranks and returns the own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.settings = (sizes, rank, group)
        return _gather_rows(rows, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes, rank, group = ctx.settings
        # Summed in float32 at least: over many ranks bf16 would lose the small terms.
        padded = _pad(grad.to(accumulation_dtype(grad)), sizes)
        own = padded.new_empty(max(sizes), *padded.shape[1:])
        dist.reduce_scatter_tensor(own, padded, group=group)
        return own[: sizes[rank]].to(grad.dtype), None, None, None


def _gather_numbers(
    numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[tuple[int, ...]]:
    """A few numbers of each rank, in rank order, in one message."""
    world = _world(group)
    if world == 1:
        return [tuple(numbers)]
    parts = torch.empty(world * len(numbers), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(parts, torch.tensor(numbers, device=device), group=group)
    return [tuple(part) for part in parts.view(world, -1).tolist()]


def _check_shapes(shapes: list[tuple[int, ...]]) -> list[int]:
    """Rows of each rank, from rows, labels, D and place in `DTYPES` of each rank."""
    for rank, (rows, labels, dim, dtype) in enumerate(shapes):
        if rows != labels:
            raise ValueError(f"rank {rank} has {rows} embeddings and {labels} labels; each embedding needs one label")
        if (dim, dtype) != shapes[0][2:]:
            raise ValueError(
                f"rank {rank} has embeddings of {dim} x {DTYPES[dtype]} and rank 0 of {shapes[0][2]} x "
                f"{DTYPES[shapes[0][3]]}; every rank must run the same model in the same precision"
            )
    return [shape[0] for shape in shapes]


def _gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """[B_r, ...] of each rank -> [N, ...]. Messages have one size: shorter ranks are padded to the longest."""
    longest = max(sizes)
    message = rows.detach().contiguous()
    if len(rows) < longest:
        message = torch.cat([message, message.new_zeros(longest - len(rows), *rows.shape[1:])])
    gathered = message.new_empty(len(sizes) * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, message, group=group)
    if min(sizes) == longest:
        return gathered
    return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])


def _pad(rows: Tensor, sizes: list[int]) -> Tensor:
    """[N, ...] -> [W * longest, ...], zeros behind the rows of each shorter rank."""
    if min(sizes) == max(sizes):
        return rows.contiguous()
    padded = rows.new_zeros(len(sizes) * max(sizes), *rows.shape[1:])
    for rank, part in enumerate(rows.split(sizes)):
        padded[rank * max(sizes) : rank * max(sizes) + len(part)] = part
    return padded


def _world(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0
