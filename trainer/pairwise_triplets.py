"""All triplets of the pool without listing them.

Batch-all triplet loss: Hermans, Beyer, Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017 (arXiv
1703.07737), eq. 6.

A triplet (i, p, n) is active where t_p = margin + d_ip exceeds d_in. With an anchor's t_p sorted, a binary search of
each d_in tells how many positives it is active with, and a histogram of the places found tells how many negatives each
positive is active with. A sum over pairs of numbers becomes two sums over numbers:

sum_p sum_n max(0, t_p - d_in) = sum_p active_negatives(p) t_p - sum_n active_positives(n) d_in.

Cost: O(B N (D + log P)) operations for up to P positives an anchor, and a copy of the pool sorted by class.

Shapes: B anchors of this rank, N rows of the pool, D embedding, R anchors of one class, P their positives, K negatives
in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import BLOCK_BYTES, accumulation_dtype, check_pair

# Below this share of |a|^2 + |p|^2 a squared distance is made again from the difference: of the digits of
# |a|^2 + |p|^2 - 2 a . p, 10 bits are lost there.
NEAR = 2.0**-10


class _ByClass(NamedTuple):
    """The pool with its rows sorted by class, so that positives and negatives are slices."""

    rows: Tensor  # [N, D], less its centre
    squares: Tensor  # [N]
    centre: Tensor  # [D]
    order: Tensor  # [N] int64, pool row of each sorted row
    starts: list[int]  # [C + 1]


class _Group(NamedTuple):
    """Some anchors of one class with their positives."""

    members: Tensor  # [R] int64, anchors
    rows: Tensor  # [R, D]
    squares: Tensor  # [R]
    positives: slice  # of the sorted pool: P rows, the anchors' own included
    distances: Tensor  # [R, P] to them
    limits: Tensor  # [R, P] margin + distance ascending; the own row first, -inf
    places: Tensor  # [R, P] positive of each limit


def all_triplet_sums(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int, margin: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over every triplet of each anchor, with gradient to anchors and pool.

    sum_i = sum over positives p and negatives n of max(0, margin + |z_i - z_p| - |z_i - z_n|), Euclidean distances.

    Args:
        anchors: [B, D], raw or on the unit sphere.
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        first: Pool row of anchor 0.
        margin: In the unit of the distance.

    Returns:
        Sums [B] in `accumulation_dtype`; active triplets, those over zero, [B] int64; all triplets [B] int64, 0 without
        a positive or a negative.
    """
    check_pair(anchors, pool, first)
    same = torch.bincount(pool_labels).index_select(0, anchor_labels) if len(anchors) else anchor_labels
    sums, active = _AllTriplets.apply(anchors, anchor_labels, pool, pool_labels, first, margin)
    return sums, active, (same - 1) * (len(pool) - same)


class _AllTriplets(torch.autograd.Function):
    """See `all_triplet_sums`.

    d sum_i / d d_ip = active_negatives(p) and d sum_i / d d_in = -active_positives(n). With w the slope over the
    distance, d sum_i / d z_i = sum_j w_ij (z_i - z_j) and d sum_i / d z_j = w_ij (z_j - z_i). Equal rows, between which
    there is no gradient, have zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        pool: Tensor,
        pool_labels: Tensor,
        first: int,
        margin: float,
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros(len(anchors), dtype=torch.float64, device=pool.device)
        active = torch.zeros(len(anchors), dtype=torch.int64, device=pool.device)
        sorted_pool = _sort_by_class(pool, pool_labels)
        for group in _groups(sorted_pool, anchors, anchor_labels, first, margin):
            counts = torch.zeros_like(group.places)
            # In float64: the two sums are far larger than their difference.
            total = group.limits.new_zeros(len(group.members), dtype=torch.float64)
            for _, distances, active_positives in _negatives(sorted_pool, group, counts):
                total.sub_((active_positives * distances).sum(1, dtype=torch.float64))
            # The own row's -inf is never active.
            total.add_((counts[:, 1:] * group.limits[:, 1:]).sum(1, dtype=torch.float64))
            sums[group.members] = total
            active[group.members] = counts.sum(1)
        ctx.save_for_backward(anchors, anchor_labels, pool, pool_labels)
        ctx.settings = (first, margin)
        ctx.mark_non_differentiable(active)
        return sums.to(accumulation_dtype(anchors)), active

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        anchors, anchor_labels, pool, pool_labels = ctx.saved_tensors
        first, margin = ctx.settings
        need_anchors, need_pool = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        sorted_pool = _sort_by_class(pool, pool_labels)
        grad_anchors = torch.zeros(anchors.shape, dtype=grad.dtype, device=pool.device)
        grad_sorted = torch.zeros_like(sorted_pool.rows) if need_pool else None

        def add(group: _Group, rows: slice, slopes: Tensor, distances: Tensor) -> None:
            weights = torch.where(distances == 0, 0, slopes / distances).mul_(grad[group.members, None])
            block = sorted_pool.rows[rows]
            with torch.autocast(pool.device.type, enabled=False):
                grad_anchors[group.members] += weights.sum(1)[:, None] * group.rows - weights @ block
                if grad_sorted is not None:
                    grad_sorted[rows] += weights.sum(0)[:, None] * block - weights.T @ group.rows

        for group in _groups(sorted_pool, anchors, anchor_labels, first, margin):
            counts = torch.zeros_like(group.places)
            for rows, distances, active_positives in _negatives(sorted_pool, group, counts):
                add(group, rows, -active_positives, distances)
            add(group, group.positives, torch.zeros_like(counts).scatter_(1, group.places, counts), group.distances)
        grad_pool = None
        if grad_sorted is not None:
            grad_pool = torch.empty_like(pool)
            grad_pool[sorted_pool.order] = grad_sorted.to(pool.dtype)
        return grad_anchors.to(anchors.dtype) if need_anchors else None, None, grad_pool, None, None, None


def _sort_by_class(pool: Tensor, pool_labels: Tensor) -> _ByClass:
    dtype = accumulation_dtype(pool)
    order = pool_labels.argsort(stable=True)
    # Distances do not change with the origin, but in the pool's middle their expansion loses the fewest digits.
    centre = pool.mean(0, dtype=dtype)
    rows = pool.index_select(0, order).to(dtype) - centre
    starts = [0, *torch.bincount(pool_labels).cumsum(0).tolist()]
    return _ByClass(rows, rows.square().sum(1), centre, order, starts)


def _groups(pool: _ByClass, anchors: Tensor, anchor_labels: Tensor, first: int, margin: float) -> Iterator[_Group]:
    """Walk over the anchors, some of one class at a time."""
    budget = BLOCK_BYTES.get(anchors.device.type, BLOCK_BYTES["cuda"]) // pool.rows.dtype.itemsize
    own = torch.empty_like(pool.order)
    own[pool.order] = torch.arange(len(pool.order), device=own.device)
    own = own[first : first + len(anchors)]  # sorted row of each anchor
    for label in anchor_labels.unique().tolist():
        positives = slice(pool.starts[label], pool.starts[label + 1])
        size = positives.stop - positives.start
        for members in (anchor_labels == label).nonzero().squeeze(1).split(max(budget // size, 1)):
            rows = anchors[members].to(pool.rows.dtype) - pool.centre
            squares = rows.square().sum(1)
            distances = _distances(rows, squares, pool.rows[positives], pool.squares[positives])
            own_columns = (own[members] - positives.start)[:, None]
            limits, places = (distances + margin).scatter_(1, own_columns, -torch.inf).sort(1)
            distances.scatter_(1, own_columns, 0)
            yield _Group(members, rows, squares, positives, distances, limits, places)


def _negatives(pool: _ByClass, group: _Group, counts: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk over a group's negatives: sorted rows, distances [R, K], and with how many positives each is active [R, K].

    `counts` [R, P] is filled with the number of active negatives of each limit; it is complete after the walk.
    """
    num_anchors, num_limits = group.limits.shape
    budget = BLOCK_BYTES.get(counts.device.type, BLOCK_BYTES["cuda"]) // pool.rows.dtype.itemsize
    width = max(budget // num_anchors, 1)
    histogram = counts.new_zeros(num_anchors, num_limits + 1)
    for low, high in ((0, group.positives.start), (group.positives.stop, len(pool.rows))):
        for start in range(low, high, width):
            rows = slice(start, min(start + width, high))
            distances = _distances(group.rows, group.squares, pool.rows[rows], pool.squares[rows])
            reached = torch.searchsorted(group.limits, distances, right=True)  # limits <= distance: not active
            histogram.scatter_add_(1, reached, torch.ones_like(reached))
            yield rows, distances, num_limits - reached
    # Limit j is active with the negatives that reached at most j limits.
    counts.copy_(histogram.cumsum(1)[:, :-1])


def _distances(left: Tensor, left_squares: Tensor, right: Tensor, right_squares: Tensor) -> Tensor:
    """Euclidean distances, [R, D] and [K, D] -> [R, K]."""
    scale = left_squares[:, None] + right_squares
    squares = torch.empty_like(scale)
    torch.addmm(scale, left, right.T, alpha=-2, out=squares)
    near = (squares < NEAR * scale).nonzero()
    for pairs in near.split(max(BLOCK_BYTES["cpu"] // (left.dtype.itemsize * left.shape[1]), 1)):
        i, j = pairs.unbind(1)
        squares[i, j] = (left[i] - right[j]).square_().sum(1)
    return squares.sqrt_()
