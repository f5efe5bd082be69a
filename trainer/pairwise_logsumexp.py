"""Log-sum-exp over the pool, and the sum over an anchor's positives: the two halves of the contrastive losses.

Shapes: B anchors of this rank, N rows of the pool, D embedding, C classes, K rows in a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import (
    MAX_UNSHIFTED,
    accumulation_dtype,
    block_rows,
    check_pair,
    class_sums,
    finite,
    largest_norm,
    multiply,
    multiply_into,
    scaled_factors,
    similarity_blocks,
)
from trainer.pairwise_choice import is_supported, use_triton


def pool_logsumexp(
    anchors: Tensor,
    pool: Tensor,
    temperature: float,
    first: int,
    block_bytes: int | None = None,
    row_bias: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of z_i . z_a / T + bias_a over the pool rows a != i of each anchor i.

    With gradient to anchors, pool and bias. With bias_a = -log n_c of row a's class the sum becomes one of class means,
    as balanced contrastive learning has it (Zhu et al. 2022, arXiv 2207.09052, eq. 4).

    Args:
        anchors: [B, D].
        pool: [N, D], same dtype and device.
        temperature: T > 0.
        first: Pool row of anchor 0; rows `first` to `first + B` are the anchors.
        block_bytes: Working memory of the buffer; None = `BLOCK_BYTES` of the device.
        row_bias: [N], added to each anchor's similarities; -inf leaves a row out.

    Returns:
        [B] in `accumulation_dtype`; -inf, with zero gradient, for an anchor that is alone in the pool.

    Raises:
        ValueError: Anchors that are no rows of the pool (`check_pair`), or a bias that is not one number a row.
    """
    check_pair(anchors, pool, first)
    if row_bias is not None and row_bias.shape != pool.shape[:1]:
        raise ValueError(
            f"row_bias has shape {tuple(row_bias.shape)}: the pool's {len(pool)} rows need one number each"
        )
    if is_supported(pool) and row_bias is None and block_bytes is None:

        def on_triton(a: Tensor, p: Tensor) -> Tensor:
            from trainer import pairwise_cuda

            return pairwise_cuda.pool_logsumexp(a, p, temperature, first)

        def on_torch(a: Tensor, p: Tensor) -> Tensor:
            return _PoolLogSumExp.apply(a, p, None, temperature, first, None)

        if use_triton("pool_logsumexp", anchors, pool, on_torch, on_triton):
            return on_triton(anchors, pool)
    return _PoolLogSumExp.apply(anchors, pool, row_bias, temperature, first, block_bytes)


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
    check_pair(anchors, pool, first)
    num_positives = torch.bincount(pool_labels).index_select(0, anchor_labels) - 1
    return _PositiveSimilarity.apply(anchors, anchor_labels, pool, pool_labels, first), num_positives


class _PoolLogSumExp(torch.autograd.Function):
    """See `pool_logsumexp`.

    With s_ia = z_i . z_a / T + bias_a and w_ia = exp(s_ia - log_sum_i), zero for a = i:
    d log_sum_i / d z_i = sum_a w_ia z_a / T, d log_sum_i / d z_a = w_ia z_i / T and d log_sum_i / d bias_a = w_ia.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        pool: Tensor,
        row_bias: Tensor | None,
        temperature: float,
        first: int,
        block_bytes: int | None,
    ) -> Tensor:
        dtype = accumulation_dtype(anchors)
        scaled = anchors.to(dtype) / temperature
        bias = None if row_bias is None else row_bias.to(dtype)
        # False too when an embedding is NaN: the running maximum then carries it into the result.
        largest_bias = 0.0 if bias is None or not len(bias) else float(bias.abs().max())
        bounded = largest_norm(scaled, dtype) * largest_norm(pool, dtype) + largest_bias <= MAX_UNSHIFTED
        width = block_rows(len(anchors), pool, dtype, block_bytes)
        total = scaled.new_zeros(len(anchors))
        peak = torch.full_like(total, -torch.inf)
        factors, scale = scaled_factors(anchors, 1 / temperature)
        for start, block, similarity in similarity_blocks(factors, pool, first, width, scale):
            if bias is not None:
                similarity.add_(bias[start : start + len(block)])
            if not bounded:
                # Running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867, alg. 3).
                higher = torch.maximum(peak, similarity.amax(1))
                shift = finite(higher)
                total.mul_(torch.exp(peak - shift))
                peak = higher
                similarity.sub_(shift[:, None])
            total.add_(similarity.exp_().sum(1))
        log_sum = total.log_() if bounded else total.log_().add_(finite(peak))
        ctx.save_for_backward(anchors, pool, row_bias, log_sum)
        ctx.settings = (temperature, first, width, bounded)
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, row_bias, log_sum = ctx.saved_tensors
        temperature, first, width, bounded = ctx.settings
        dtype = log_sum.dtype
        scaled = anchors.to(dtype) / temperature
        bias = None if row_bias is None else row_bias.to(dtype)
        # grad_i * w_ia = (grad_i * exp(-log_sum_i)) * exp(s_ia): where exp needs no shift, the bracket moves out of the
        # products and a block is touched by one pass (exp) and two products. Else the block becomes w_ia in place.
        weight = grad * torch.exp(-log_sum) if bounded else grad
        weight = torch.where(log_sum.isneginf(), torch.zeros_like(weight), weight)[:, None]
        shift = None if bounded else finite(log_sum)[:, None]
        weighted = scaled * weight
        need_anchors, need_pool, need_bias = ctx.needs_input_grad[:3]
        grad_anchors = torch.zeros_like(scaled) if need_anchors else None
        grad_pool = torch.empty_like(pool) if need_pool else None
        grad_bias = torch.empty_like(row_bias) if need_bias else None
        factors, scale = scaled_factors(anchors, 1 / temperature)
        for start, block, similarity in similarity_blocks(factors, pool, first, width, scale):
            rows = slice(start, start + len(block))
            if bias is not None:
                similarity.add_(bias[rows])
            if shift is not None:
                similarity.sub_(shift)
            exponentials = similarity.exp_().to(block.dtype)
            if grad_anchors is not None:
                multiply(exponentials, block, grad_anchors, add=True)
            if grad_pool is not None:
                multiply_into(exponentials.T, weighted.to(block.dtype), grad_pool[rows])
            if grad_bias is not None:
                multiply_into(similarity.T, weight, grad_bias[rows, None])
        if grad_anchors is not None:
            grad_anchors = grad_anchors.mul_(weight / temperature).to(anchors.dtype)
        return grad_anchors, grad_pool, grad_bias, None, None, None


class _PositiveSimilarity(torch.autograd.Function):
    """See `positive_similarity`; written out because autograd would make three arrays of the pool's size, not one."""

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int
    ) -> Tensor:
        num_classes = int(pool_labels.max()) + 1 if len(pool_labels) else 0
        sums = class_sums(pool, pool_labels, num_classes)
        positives = sums.index_select(0, anchor_labels).sub_(pool[first : first + len(anchors)])
        ctx.save_for_backward(anchors, anchor_labels, pool_labels, positives)
        ctx.settings = (first, num_classes)
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
            grad_pool = class_sums(weighted, anchor_labels, num_classes).index_select(0, pool_labels)
            grad_pool[first : first + len(anchors)] -= weighted
            grad_pool = grad_pool.to(anchors.dtype)
        return grad_anchors, None, grad_pool, None, None
