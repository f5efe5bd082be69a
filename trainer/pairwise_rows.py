"""Which rows of the pool a triplet is made of: hardest and semi-hard, found in blocks and without gradient.

Shapes: B anchors of this rank, N rows of the pool, D embedding, K rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.pairwise_blocks import (
    accumulation_dtype,
    block_rows,
    check_pair,
    factor_dtype,
    scaled_factors,
    similarity_blocks,
)
from trainer.pairwise_choice import is_supported, use_triton


@torch.no_grad()
def hardest_rows(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    first: int,
    block_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Pool rows of each anchor's farthest positive and nearest negative by Euclidean distance, without gradient.

    Args:
        anchors: [B, D].
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        first: Pool row of anchor 0.
        block_bytes: Working memory of each buffer; None = `BLOCK_BYTES` of the device.

    Returns:
        Two [B] int64, -1 where there is no such row.
    """
    check_pair(anchors, pool, first)
    if is_supported(pool) and block_bytes is None and not pool.isnan().any():  # the kernels' order knows no NaN

        def on_triton(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            from trainer import pairwise_cuda

            return pairwise_cuda.hardest_rows(a, anchor_labels, p, pool_labels, first)

        def on_torch(a: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
            return _hardest_rows(a, anchor_labels, p, pool_labels, first, None)

        if use_triton("hardest_rows", anchors, pool, on_torch, on_triton):
            return on_triton(anchors, pool)
    return _hardest_rows(anchors, anchor_labels, pool, pool_labels, first, block_bytes)


def _hardest_rows(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int, block_bytes: int | None
) -> tuple[Tensor, Tensor]:
    dtype, num_anchors = accumulation_dtype(anchors), len(anchors)
    largest = torch.full((num_anchors,), -torch.inf, dtype=dtype, device=pool.device)
    smallest = -largest
    inf = torch.tensor(torch.inf, dtype=dtype, device=pool.device)
    positive, negative = (torch.full((num_anchors,), -1, device=pool.device) for _ in range(2))
    width = block_rows(num_anchors, pool, dtype, block_bytes)
    masked = torch.empty(num_anchors * width, dtype=dtype, device=pool.device)
    for rows, distance in _distance_blocks(_factors(anchors, pool), pool, first, width):
        same = anchor_labels[:, None] == pool_labels[None, rows]
        out = masked[: distance.numel()].view_as(distance)
        # The own column takes part in neither: -inf is never larger, and among the negatives it is masked as its class.
        _keep(torch.where(same, distance, -inf, out=out), rows.start, largest, positive, farthest=True)
        _keep(torch.where(same, inf, distance, out=out), rows.start, smallest, negative, farthest=False)
    return positive, negative


@torch.no_grad()
def semi_hard_rows(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    positive_rows: Tensor,
    first: int,
    block_bytes: int | None = None,
) -> Tensor:
    """Pool row of each anchor's nearest negative among those farther away than a given positive, without gradient.

    Schroff et al., FaceNet, CVPR 2015 (arXiv 1503.03832), section 3.2, the last equation: negatives n with
    |a - p|^2 < |a - n|^2.

    Farther means: by more than the rounding error of the two squared distances, so that a negative at the positive's
    own place is never taken for a farther one.

    Args:
        anchors: [B, D].
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        positive_rows: [B] int64, pool row of each anchor's positive, -1 for none.
        first: Pool row of anchor 0.
        block_bytes: Working memory of each buffer; None = `BLOCK_BYTES` of the device.

    Returns:
        [B] int64, -1 where there is no such row or no positive.
    """
    check_pair(anchors, pool, first)
    dtype, num_anchors = accumulation_dtype(anchors), len(anchors)
    if not num_anchors:
        return positive_rows.clone()
    factors = _factors(anchors, pool)
    threshold = _just_over(factors, pool, positive_rows.clamp(min=0))[:, None]
    nearest = torch.full((num_anchors,), torch.inf, dtype=dtype, device=pool.device)
    inf = torch.tensor(torch.inf, dtype=dtype, device=pool.device)
    negative = torch.full((num_anchors,), -1, device=pool.device)
    width = block_rows(num_anchors, pool, dtype, block_bytes)
    for rows, distance in _distance_blocks(factors, pool, first, width):
        excluded = anchor_labels[:, None] == pool_labels[None, rows]
        excluded |= distance <= threshold  # not `~(>)`: a NaN stays in and reaches the loss
        _keep(torch.where(excluded, inf, distance, out=distance), rows.start, nearest, negative, farthest=False)
    return torch.where(positive_rows < 0, -1, negative)


class _Factors(NamedTuple):
    """What is multiplied with the pool for -2 a . p."""

    rows: Tensor  # [B, D]
    scale: float | None
    centre: Tensor | None  # [D], to be taken off the pool's rows


def _factors(anchors: Tensor, pool: Tensor) -> _Factors:
    """Distances do not change with the origin, but |p|^2 - 2 a . p loses digits far away from it: it is put elsewhere.

    Into the middle of the pool. bfloat16 factors could not hold the difference; two different rows of 8 binary digits
    are farther apart than the rounding of a float32 sum anyway.
    """
    if factor_dtype(pool) == torch.bfloat16:
        return _Factors(*scaled_factors(anchors, -2.0), None)
    dtype = accumulation_dtype(anchors)
    centre = pool.mean(0, dtype=dtype)
    centre = torch.where(centre.isfinite(), centre, 0)  # a row that is NaN must stay the only one
    return _Factors((anchors.to(dtype) - centre).mul_(-2), None, centre)


def _just_over(factors: _Factors, pool: Tensor, rows: Tensor) -> Tensor:
    """|p|^2 - 2 a . p [B] of one row an anchor, and the rounding error that such a number may have in a block."""
    dtype = accumulation_dtype(pool)
    chosen = pool.index_select(0, rows).to(dtype)
    if factors.centre is not None:
        chosen -= factors.centre
    doubled = factors.rows.to(dtype) * (1 if factors.scale is None else factors.scale)
    # A dot product of D terms is off by about sqrt(D) eps of its factors' norms (Higham, Accuracy and Stability of
    # Numerical Algorithms, 2nd ed., 3.1).
    scale = torch.linalg.vector_norm(chosen, dim=1).add_(torch.linalg.vector_norm(doubled, dim=1)).square_()
    distance = (doubled * chosen).sum(1).add_(chosen.square().sum(1))
    return distance.add_(scale, alpha=2 * torch.finfo(dtype).eps * pool.shape[1] ** 0.5)


def _distance_blocks(factors: _Factors, pool: Tensor, first: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Walk over the pool: its rows and |a - p|^2 - |a|^2 = |p|^2 - 2 a . p [B, K], own columns -inf.

    |a|^2 does not change the order of an anchor's distances.
    """
    blocks = similarity_blocks(factors.rows, pool, first, width, factors.scale, factors.centre)
    for start, block, distance in blocks:
        distance.add_(block.to(distance.dtype).square().sum(1))
        yield slice(start, start + len(block)), distance


def _keep(distance: Tensor, start: int, best: Tensor, best_rows: Tensor, farthest: bool) -> None:
    """Take a block's farthest or nearest [B, K] where they beat the best so far, in place."""
    values = distance.amax(1) if farthest else distance.amin(1)
    # `not <=` instead of `>`: a NaN is taken, so that it reaches the loss and is not mistaken for a masked anchor.
    better = (~(values <= best if farthest else values >= best)).nonzero().squeeze(1)
    # Where it stands is asked of the rows that got better: a search costs ten times what the value alone does.
    few = 4 * len(better) < len(distance)  # else their copy would cost memory
    searched = distance[better] if few else distance
    columns = searched.argmax(1) if farthest else searched.argmin(1)
    best_rows[better] = (columns if few else columns[better]) + start
    best[better] = values[better]
