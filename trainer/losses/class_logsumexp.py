"""Log-sum-exp over the pool with one bias for the rows of the anchor's own class and another for each other row.

The blockwise form of sums that tell an anchor's own class from the others, where `pool_logsumexp` treats all rows
alike: class means that leave the anchor out, sums over positives or over negatives alone. Memory is linear in the pool.

Shapes: B anchors of this rank, N rows of the pool, D embedding, K rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import accumulation_dtype, block_rows, finite, similarity_blocks


def class_logsumexp(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    scale: float,
    same_bias: Tensor,
    row_bias: Tensor,
    first: int | None = None,
) -> Tensor:
    """The log of sum_a exp(scale * z_i . z_a + b_ia), b_ia = same_bias_i for rows of anchor i's class, else row_bias_a.

    With gradient to anchors and pool; the biases are constants, and -inf leaves rows out.

    Args:
        anchors: [B, D].
        anchor_labels: [B] int64.
        pool: [N, D], same device; the dtype of the anchors or a lower one.
        pool_labels: [N] int64.
        scale: Of the similarity, of either sign.
        same_bias: [B].
        row_bias: [N].
        first: Pool row of anchor 0, so that each anchor leaves its own row out; None = anchors are no rows of the pool.

    Returns:
        [B] in `accumulation_dtype`; -inf, with zero gradient, for an anchor with no row.
    """
    settings = (scale, len(pool) if first is None else first)
    return _ClassLogSumExp.apply(anchors, anchor_labels, pool, pool_labels, same_bias, row_bias, settings)


class _ClassLogSumExp(torch.autograd.Function):
    """See `class_logsumexp`.

    With e_ia the exponent and w_ia = exp(e_ia - log_sum_i): d log_sum_i / d z_i = scale sum_a w_ia z_a and
    d log_sum_i / d z_a = scale w_ia z_i.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        pool: Tensor,
        pool_labels: Tensor,
        same_bias: Tensor,
        row_bias: Tensor,
        settings: tuple[float, int],
    ) -> Tensor:
        scaled = anchors.to(accumulation_dtype(anchors)) * settings[0]
        biases = (same_bias.to(scaled.dtype), row_bias.to(scaled.dtype))
        total = scaled.new_zeros(len(anchors))
        peak = torch.full_like(total, -torch.inf)
        for _, _, exponent in _exponents(scaled, anchor_labels, pool, pool_labels, biases, settings[1]):
            # Running maximum (Milakov and Gimelshein 2018, arXiv 1805.02867, alg. 3).
            higher = torch.maximum(peak, exponent.amax(1))
            shift = finite(higher)
            total.mul_(torch.exp(peak - shift)).add_(exponent.sub_(shift[:, None]).exp_().sum(1))
            peak = higher
        log_sum = total.log_().add_(finite(peak))
        ctx.save_for_backward(anchors, anchor_labels, pool, pool_labels, *biases, log_sum)
        ctx.settings = settings
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, anchor_labels, pool, pool_labels, same_bias, row_bias, log_sum = ctx.saved_tensors
        scale, first = ctx.settings
        scaled = anchors.to(log_sum.dtype) * scale
        shift = finite(log_sum)[:, None]  # without any row each exponent is -inf, and so every weight 0
        weighted = scaled * grad[:, None]
        need_anchors, need_pool = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_anchors = torch.zeros_like(scaled) if need_anchors else None
        grad_pool = torch.empty_like(pool) if need_pool else None
        blocks = _exponents(scaled, anchor_labels, pool, pool_labels, (same_bias, row_bias), first)
        for rows, block, exponent in blocks:
            weight = exponent.sub_(shift).exp_()
            with torch.autocast(pool.device.type, enabled=False):
                if grad_anchors is not None:
                    grad_anchors.addmm_(weight, block)
                if grad_pool is not None:
                    grad_pool[rows] = weight.T @ weighted
        if grad_anchors is not None:
            grad_anchors = grad_anchors.mul_(grad[:, None] * scale).to(anchors.dtype)
        return grad_anchors, None, grad_pool, None, None, None, None


def _exponents(
    scaled: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, biases: tuple[Tensor, Tensor], first: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk over the pool: the rows, the block [K, D], the exponents [B, K] in a buffer that is used again."""
    same_bias, row_bias = biases
    width = block_rows(len(scaled), pool, scaled.dtype, None)
    for start, block, exponent in similarity_blocks(scaled, pool, first, width):
        rows = slice(start, start + len(block))
        same = anchor_labels[:, None] == pool_labels[None, rows]
        yield rows, block, exponent.add_(torch.where(same, same_bias[:, None], row_bias[None, rows]))
