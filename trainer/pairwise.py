"""The blockwise kernel under the pair losses: exact, in memory linear in the pool.

Each function walks over the pool in blocks of columns and keeps running results, so that the [B, N] matrix of
similarities never exists; the backward walks again and recomputes each block. Lower precisions than float32 are
widened block by block and accumulated in float32.

Shapes: B anchors of this rank, N rows of the pool, D embedding, C classes, K rows in a block. Anchor i is row
`first + i` of the pool and is never compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of the one [B, K] buffer. On a CPU it should stay in the cache between the passes over it.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
MIN_BLOCK_ROWS = 32

# If no similarity can exceed this, exp needs no shift: exp(30) = 1e13 leaves float32 (1e-38 to 1e38) room on both sides
# for any pool and for the product with exp(-log_sum). T >= 1/30 on the unit sphere is below it; it spares two passes.
MAX_UNSHIFTED = 30.0


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type in which sums are made: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pool_logsumexp(
    anchors: Tensor, pool: Tensor, temperature: float, first: int, block_bytes: int | None = None
) -> Tensor:
    """Log-sum-exp of z_i . z_a / T over the pool rows a != i of each anchor i, with gradient to anchors and pool.

    Args:
        anchors: [B, D].
        pool: [N, D], same dtype and device.
        temperature: T > 0.
        first: Pool row of anchor 0; rows `first` to `first + B` are the anchors.
        block_bytes: Working memory of the buffer; None = `BLOCK_BYTES` of the device.

    Returns:
        [B] in `accumulation_dtype`; -inf, with zero gradient, for an anchor that is alone in the pool.
    """
    return _PoolLogSumExp.apply(anchors, pool, temperature, first, block_bytes)


def positive_similarity(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Sum of z_i . z_p over the other pool rows p of anchor i's class, with gradient to anchors and pool.

    The sum over an anchor's positives is the product with its class's sum over the pool, less its own row: C * D
    numbers stand for the [B, N] mask.

    Args:
        anchors: [B, D].
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        first: Pool row of anchor 0.

    Returns:
        Sums [B] in `accumulation_dtype`, and the number of positives [B] int64.
    """
    num_positives = torch.bincount(pool_labels).index_select(0, anchor_labels) - 1
    return _PositiveSimilarity.apply(anchors, anchor_labels, pool, pool_labels, first), num_positives


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
    dtype, num_anchors = accumulation_dtype(anchors), len(anchors)
    # |a - p|^2 = |a|^2 + (|p|^2 - 2 a . p), and |a|^2 does not change the order. Distances do not change with the
    # origin, but that difference loses digits far away from it, so the origin is put into the middle of the pool.
    centre = pool.mean(0, dtype=dtype)
    doubled = (anchors.to(dtype) - centre).mul_(-2)
    largest = torch.full((num_anchors,), -torch.inf, dtype=dtype, device=pool.device)
    smallest = -largest
    inf = torch.tensor(torch.inf, dtype=dtype, device=pool.device)
    positive, negative = (torch.full((num_anchors,), -1, device=pool.device) for _ in range(2))
    width = _block_rows(num_anchors, pool, dtype, block_bytes)
    masked = torch.empty(num_anchors * width, dtype=dtype, device=pool.device)
    for start, block, distance in _similarity_blocks(doubled, pool, first, width, centre):
        rows = slice(start, start + len(block))
        distance.add_(block.square().sum(1))  # the anchor's own column is -inf and stays so
        same = anchor_labels[:, None] == pool_labels[None, rows]
        out = masked[: distance.numel()].view_as(distance)
        # The own column takes part in neither: -inf is never larger, and among the negatives it is masked as its class.
        values, columns = torch.where(same, distance, -inf, out=out).max(1)
        # `not <=` instead of `>`: a NaN is taken, so that it reaches the loss and is not mistaken for a masked anchor.
        _keep(~(values <= largest), values, columns + start, largest, positive)
        values, columns = torch.where(same, inf, distance, out=out).min(1)
        _keep(~(values >= smallest), values, columns + start, smallest, negative)
    return positive, negative


class _PoolLogSumExp(torch.autograd.Function):
    """See `pool_logsumexp`.

    With s_ia = z_i . z_a / T and w_ia = exp(s_ia - log_sum_i), zero for a = i:
    d log_sum_i / d z_i = sum_a w_ia z_a / T and d log_sum_i / d z_a = w_ia z_i / T.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, pool: Tensor, temperature: float, first: int, block_bytes: int | None
    ) -> Tensor:
        dtype = accumulation_dtype(anchors)
        scaled = anchors.to(dtype) / temperature
        # False too when an embedding is NaN: the running maximum then carries it into the result.
        bounded = _largest_norm(scaled, dtype) * _largest_norm(pool, dtype) <= MAX_UNSHIFTED
        width = _block_rows(len(anchors), pool, dtype, block_bytes)
        total = scaled.new_zeros(len(anchors))
        peak = torch.full_like(total, -torch.inf)
        for _, _, similarity in _similarity_blocks(scaled, pool, first, width):
            if not bounded:
                # Running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867, alg. 3).
                higher = torch.maximum(peak, similarity.amax(1))
                shift = _finite(higher)
                total.mul_(torch.exp(peak - shift))
                peak = higher
                similarity.sub_(shift[:, None])
            total.add_(similarity.exp_().sum(1))
        log_sum = total.log_() if bounded else total.log_().add_(_finite(peak))
        ctx.save_for_backward(anchors, pool, log_sum)
        ctx.settings = (temperature, first, width, bounded)
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, log_sum = ctx.saved_tensors
        temperature, first, width, bounded = ctx.settings
        dtype = log_sum.dtype
        scaled = anchors.to(dtype) / temperature
        # grad_i * w_ia = (grad_i * exp(-log_sum_i)) * exp(s_ia): where exp needs no shift, the bracket moves out of the
        # products and a block is touched by one pass (exp) and two products. Else the block becomes w_ia in place.
        weight = grad * torch.exp(-log_sum) if bounded else grad
        weight = torch.where(log_sum.isneginf(), torch.zeros_like(weight), weight)[:, None]
        shift = None if bounded else _finite(log_sum)[:, None]
        weighted = scaled * weight
        need_anchors, need_pool = ctx.needs_input_grad[:2]
        grad_anchors = torch.zeros_like(scaled) if need_anchors else None
        grad_pool = torch.empty_like(pool) if need_pool else None
        for start, block, similarity in _similarity_blocks(scaled, pool, first, width):
            if shift is not None:
                similarity.sub_(shift)
            similarity.exp_()
            if grad_anchors is not None:
                grad_anchors.addmm_(similarity, block)
            if grad_pool is not None:
                with torch.autocast(pool.device.type, enabled=False):
                    grad_pool[start : start + len(block)] = similarity.T @ weighted
        if grad_anchors is not None:
            grad_anchors = grad_anchors.mul_(weight / temperature).to(anchors.dtype)
        return grad_anchors, grad_pool, None, None, None


class _PositiveSimilarity(torch.autograd.Function):
    """See `positive_similarity`; written out because autograd would make three arrays of the pool's size, not one."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int
    ) -> Tensor:
        sums = _class_sums(pool, pool_labels, int(pool_labels.max()) + 1)
        positives = sums.index_select(0, anchor_labels).sub_(pool[first : first + len(anchors)])
        ctx.save_for_backward(anchors, anchor_labels, pool_labels, positives)
        ctx.settings = (first, len(sums))
        return (positives * anchors).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, anchor_labels, pool_labels, positives = ctx.saved_tensors
        first, num_classes = ctx.settings
        grad_anchors = grad_pool = None
        if ctx.needs_input_grad[0]:
            grad_anchors = (positives * grad[:, None]).to(anchors.dtype)
        if ctx.needs_input_grad[2]:
            # Row p receives grad_i z_i of every anchor i of its class but itself.
            weighted = anchors.to(grad.dtype) * grad[:, None]
            grad_pool = _class_sums(weighted, anchor_labels, num_classes).index_select(0, pool_labels)
            grad_pool[first : first + len(anchors)] -= weighted
            grad_pool = grad_pool.to(anchors.dtype)
        return grad_anchors, None, grad_pool, None, None


def _similarity_blocks(
    anchors: Tensor, pool: Tensor, first: int, width: int, centre: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk over the pool, K = `width` rows at a time.

    Yields:
        First row of the block; the block [K, D] in the anchors' dtype, less `centre`; anchors x block [B, K] with the
        anchors' own columns -inf. The last is one buffer that is used again: the caller may write in it.
    """
    num_anchors = len(anchors)
    buffer = anchors.new_empty(num_anchors * min(width, len(pool)))
    for start in range(0, len(pool), width):
        block = pool[start : start + width].to(anchors.dtype)
        if centre is not None:
            block = block - centre
        similarity = buffer[: num_anchors * len(block)].view(num_anchors, len(block))
        torch.mm(anchors, block.T, out=similarity)
        low, high = max(start - first, 0), min(start + len(block) - first, num_anchors)
        if low < high:
            similarity[low:high, first + low - start :].diagonal().fill_(-torch.inf)
        yield start, block, similarity


def _block_rows(num_anchors: int, pool: Tensor, dtype: torch.dtype, block_bytes: int | None) -> int:
    """K, such that a [B, K] buffer takes `block_bytes`, but not so small that the products become slow."""
    budget = BLOCK_BYTES.get(pool.device.type, BLOCK_BYTES["cuda"]) if block_bytes is None else block_bytes
    least = MIN_BLOCK_ROWS if block_bytes is None else 1
    return min(max(budget // (max(num_anchors, 1) * dtype.itemsize), least), max(len(pool), 1))


def _largest_norm(x: Tensor, dtype: torch.dtype) -> float:
    """Of the rows of [B, D]; 0 for none."""
    return float(torch.linalg.vector_norm(x, dim=1, dtype=dtype).max()) if len(x) else 0.0


def _class_sums(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class, [N, D] -> [C, D] in `accumulation_dtype`."""
    sums = torch.zeros(num_classes, x.shape[1], dtype=accumulation_dtype(x), device=x.device)
    return sums.index_add_(0, labels, x.to(sums.dtype))


def _finite(x: Tensor) -> Tensor:
    """-inf, the maximum of nothing, becomes 0: -inf - -inf is NaN."""
    return torch.where(x.isneginf(), torch.zeros_like(x), x)


def _keep(better: Tensor, values: Tensor, rows: Tensor, best_values: Tensor, best_rows: Tensor) -> None:
    """Take a block's results where they beat the ones so far, in place."""
    torch.where(better, values, best_values, out=best_values)
    torch.where(better, rows, best_rows, out=best_rows)
