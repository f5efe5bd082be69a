"""Sums of the multi-similarity loss over the pool, in blocks.

Wang et al., Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning, CVPR 2019 (arXiv 1904.06627).

Shapes: B anchors of this rank, N rows of the pool, D embedding, K rows in a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import (
    accumulation_dtype,
    block_rows,
    check_pair,
    factor_dtype,
    multiply,
    multiply_into,
    similarity_blocks,
)


class _Settings(NamedTuple):
    first: int
    alpha: float
    beta: float
    base: float
    epsilon: float
    width: int


def multi_similarity_sums(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    first: int,
    scales: tuple[float, float],
    base: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two logarithms of eq. 10 over the mined pairs, with gradient to anchors and pool.

    With s_ik = z_i . z_k and anchor i's row left out:

    pos_log_i = log(1 + sum_k exp(-alpha (s_ik - base))) over the positives with s_ik < max_negatives s_in + epsilon,
    neg_log_i = log(1 + sum_n exp(beta (s_in - base))) over the negatives with s_in > min_positives s_ik - epsilon

    (mining: eq. 7 and 8). The loss is the mean of pos_log / alpha + neg_log / beta. An anchor without a positive or
    without a negative has no mined pair: both are 0, with zero gradient.

    Args:
        anchors: [B, D], on the unit sphere in the paper.
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        first: Pool row of anchor 0.
        scales: alpha and beta, both > 0.
        base: Similarity lambda of the paper.
        epsilon: Slack of the mining, >= 0; infinity takes every pair of an anchor that has both kinds.

    Returns:
        pos_log [B] and neg_log [B] in `accumulation_dtype`; counts [2, B] int64 of the mined positives and negatives.
    """
    check_pair(anchors, pool, first)
    width = block_rows(len(anchors), pool, accumulation_dtype(anchors), None)
    settings = _Settings(first, *scales, base, epsilon, width)
    return _MultiSimilarity.apply(anchors, anchor_labels, pool, pool_labels, settings)


class _MultiSimilarity(torch.autograd.Function):
    """See `multi_similarity_sums`.

    d pos_log_i / d s_ik = -alpha exp(-alpha (s_ik - base) - pos_log_i), d neg_log_i / d s_in = beta exp(beta (s_in -
    base) - neg_log_i), over the mined pairs; which pairs are mined has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        ceiling, floor = _mining_limits(anchors, anchor_labels, pool, pool_labels, settings)
        # Log-sum-exp with the running maximum; its first term is the 1, exp(0).
        peaks = ceiling.new_zeros(2, len(anchors))
        totals = torch.ones_like(peaks)
        counts = torch.zeros(2, len(anchors), dtype=torch.int64, device=pool.device)
        for _, same, similarity in _pairs(anchors, anchor_labels, pool, pool_labels, settings):
            mined = _mined(same, similarity, ceiling, floor)
            for kind, pairs in enumerate((mined & same, mined & ~same)):
                counts[kind].add_(pairs.sum(1))
                slope = settings.beta if kind else -settings.alpha
                exponents = torch.where(pairs, (similarity - settings.base) * slope, -torch.inf)
                higher = torch.maximum(peaks[kind], exponents.amax(1))
                totals[kind].mul_(torch.exp(peaks[kind] - higher))
                peaks[kind] = higher
                totals[kind].add_(exponents.sub_(higher[:, None]).exp_().sum(1))
        logs = totals.log_().add_(peaks)
        ctx.save_for_backward(anchors, anchor_labels, pool, pool_labels, ceiling, floor, logs)
        ctx.settings = settings
        ctx.mark_non_differentiable(counts)
        return logs[0].clone(), logs[1].clone(), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_positive: Tensor, grad_negative: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        anchors, anchor_labels, pool, pool_labels, ceiling, floor, logs = ctx.saved_tensors
        settings: _Settings = ctx.settings
        factors = anchors.to(factor_dtype(anchors))
        need_anchors, need_pool = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_anchors = torch.zeros(anchors.shape, dtype=logs.dtype, device=pool.device) if need_anchors else None
        grad_pool = torch.empty_like(pool) if need_pool else None
        positive_factor = (-settings.alpha * grad_positive)[:, None]
        negative_factor = (settings.beta * grad_negative)[:, None]
        for rows, same, similarity in _pairs(anchors, anchor_labels, pool, pool_labels, settings):
            mined = _mined(same, similarity, ceiling, floor)
            centred = similarity - settings.base
            exponents = torch.where(
                same, centred * -settings.alpha - logs[0][:, None], centred * settings.beta - logs[1][:, None]
            )
            # Pairs that are not mined may be infinite: exp(-inf) = 0 instead of a product with 0.
            weights = torch.where(mined, exponents, -torch.inf).exp_()
            weights.mul_(torch.where(same, positive_factor, negative_factor))
            weights = weights.to(factors.dtype)
            if grad_anchors is not None:
                multiply(weights, pool[rows].to(factors.dtype), grad_anchors, add=True)
            if grad_pool is not None:
                multiply_into(weights.T, factors, grad_pool[rows])
        if grad_anchors is not None:
            grad_anchors = grad_anchors.to(anchors.dtype)
        return grad_anchors, None, grad_pool, None, None


def _pairs(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, settings: _Settings
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Walk over the pool: rows, whether the classes are the same [B, K], similarities [B, K] with own columns -inf."""
    for start, block, similarity in similarity_blocks(anchors, pool, settings.first, settings.width):
        rows = slice(start, start + len(block))
        yield rows, anchor_labels[:, None] == pool_labels[None, rows], similarity


def _mined(same: Tensor, similarity: Tensor, ceiling: Tensor, floor: Tensor) -> Tensor:
    """Which pairs take part, [B, K]. A NaN does, so that it reaches the loss; the anchors' own columns do not."""
    left_out = torch.where(same, similarity >= ceiling[:, None], similarity <= floor[:, None])
    return ~(left_out | similarity.isneginf())


def _mining_limits(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor]:
    """Similarity [B] under which a positive is mined, -inf without negatives, and over which a negative is."""
    least = torch.full((len(anchors),), torch.inf, dtype=accumulation_dtype(anchors), device=pool.device)
    largest = -least
    for _, same, similarity in _pairs(anchors, anchor_labels, pool, pool_labels, settings):
        largest = torch.maximum(largest, similarity.masked_fill(same, -torch.inf).amax(1))
        others = similarity.masked_fill_(~same | similarity.isneginf(), torch.inf)
        least = torch.minimum(least, others.amin(1))
    # `where`, since an infinite epsilon would turn "there is none" into a NaN.
    ceiling = torch.where(largest.isneginf(), largest, largest + settings.epsilon)
    return ceiling, torch.where(least.isposinf(), least, least - settings.epsilon)
