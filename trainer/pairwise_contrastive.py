"""The supervised contrastive sum over the pool, its gradient made in the forward.

Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (arXiv 2004.11362), eq. 2 (L_out).

The loss of all anchors together is one number, whose gradient is known up to one factor as soon as the value is. So a
chunk of anchors meets the whole pool once: its similarities are made, turned into weights and multiplied out into both
gradients before the next chunk takes their place. That is three matrix products and one exp for each pair where a
backward that makes the similarities again takes four and two. (Computing gradients of a last layer in the forward: Hsu
et al., Liger Kernel, 2024, arXiv 2410.10989, section 3.2.)

Shapes: B anchors of this rank, N rows of the pool, D embedding, C classes, R anchors in a chunk, K rows in a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import (
    MAX_UNSHIFTED,
    accumulation_dtype,
    block_rows,
    check_pair,
    class_sums,
    factor_dtype,
    finite,
    largest_norm,
    multiply,
    scaled_factors,
    similarity_tile,
)
from trainer.pairwise_choice import is_supported, use_triton

# Bytes of a chunk's similarities, [R, N]. Where the pool itself is larger, they may take as much as the pool: with few
# anchors in a chunk the matrix products are slow. Memory stays linear in the pool.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}


class _Settings(NamedTuple):
    temperature: float
    first: int
    need_anchors: bool
    need_pool: bool


def contrastive_total(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, temperature: float, first: int
) -> tuple[Tensor, Tensor]:
    """Sum of L_out over the anchors that have a positive, with gradient to anchors and pool.

    sum_i [log sum_{a != i} exp(s_ia) - 1/|P(i)| sum_{p in P(i)} s_ip],  s_ia = z_i . z_a / T,

    with P(i) the other pool rows of anchor i's class. The sum over an anchor's positives is the product with its
    class's sum over the pool, less its own row: C * D numbers stand for the [B, N] mask.

    Args:
        anchors: [B, D].
        anchor_labels: [B] int64.
        pool: [N, D], same dtype and device.
        pool_labels: [N] int64.
        temperature: T > 0.
        first: Pool row of anchor 0; rows `first` to `first + B` are the anchors.

    Returns:
        Scalar in `accumulation_dtype`, and the number of positives [B] int64.

    Raises:
        ValueError: Anchors that are no rows of the pool (`check_pair`).
    """
    check_pair(anchors, pool, first)
    num_positives = torch.bincount(pool_labels).index_select(0, anchor_labels) - 1

    def on_torch(a: Tensor, p: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled()
        settings = _Settings(temperature, first, wanted and a.requires_grad, wanted and p.requires_grad)
        return _ContrastiveTotal.apply(a, anchor_labels, p, pool_labels, num_positives, settings)

    if is_supported(pool):

        def on_triton(a: Tensor, p: Tensor) -> Tensor:
            from trainer import pairwise_cuda

            return pairwise_cuda.contrastive_total(a, anchor_labels, p, pool_labels, num_positives, temperature, first)

        if use_triton("contrastive_total", anchors, pool, on_torch, on_triton):
            return on_triton(anchors, pool), num_positives
    return on_torch(anchors, pool), num_positives


class _ContrastiveTotal(torch.autograd.Function):
    """See `contrastive_total`.

    With w_ia = exp(s_ia - log_sum_i), zero for a = i and for anchors that do not count, d total / d z_i = sum_a w_ia
    z_a / T and d total / d z_a = sum_i w_ia z_i / T, less the same with 1/|P(i)| in place of w_ia over the positives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        pool: Tensor,
        pool_labels: Tensor,
        num_positives: Tensor,
        settings: _Settings,
    ) -> Tensor:
        inputs = (anchors, anchor_labels, pool, pool_labels, num_positives)
        total, ctx.grads = _value_and_gradients(inputs, settings)
        ctx.save_for_backward(*inputs)
        ctx.settings = settings
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors  # raises where the graph was freed
        # Handed on, not copied, being as large as the pool; only a backward after `retain_graph=True` makes them anew.
        grads = _value_and_gradients(inputs, ctx.settings)[1] if ctx.grads is None else ctx.grads
        ctx.grads = None
        of_anchors, of_pool = (None if of is None else of.mul_(grad).to(inputs[0].dtype) for of in grads)
        return of_anchors, None, of_pool, None, None, None


_Gradients = tuple[Tensor | None, Tensor | None]


def _value_and_gradients(inputs: tuple[Tensor, ...], settings: _Settings) -> tuple[Tensor, _Gradients]:
    anchors, anchor_labels, pool, pool_labels, num_positives = inputs
    scaled = anchors.to(accumulation_dtype(anchors)) / settings.temperature
    total, grads = _log_sums(anchors, scaled, pool, num_positives > 0, settings)
    total -= _positives(scaled, anchor_labels, pool, pool_labels, num_positives, grads, settings)
    if grads[0] is not None:
        grads[0].div_(settings.temperature)
    return total, grads


def _log_sums(
    anchors: Tensor, scaled: Tensor, pool: Tensor, counted: Tensor, settings: _Settings
) -> tuple[Tensor, _Gradients]:
    """Sum of the log-sum-exps of the anchors that count, and its gradients to anchors / T and to the pool."""
    dtype, narrow, num_anchors = scaled.dtype, factor_dtype(pool), len(scaled)
    # False too when an embedding is NaN: the maximum then carries it into the result.
    bounded = largest_norm(scaled, dtype) * largest_norm(pool, dtype) <= MAX_UNSHIFTED
    of_anchors = torch.zeros_like(scaled) if settings.need_anchors else None
    of_pool = torch.zeros(pool.shape, dtype=dtype, device=pool.device) if settings.need_pool else None
    total = scaled.new_zeros(())
    size = _chunk_size(num_anchors, pool, dtype)
    buffer = scaled.new_empty(size * len(pool))
    factors, scale = scaled_factors(anchors, 1 / settings.temperature)
    for low in range(0, num_anchors, size):
        chunk = slice(low, min(low + size, num_anchors))
        valid = counted[chunk]
        tiles = _tiles(buffer, chunk.stop - low, pool)
        sums, peak = _exponentials(factors[chunk], pool, settings.first + low, tiles, scale, bounded)
        total += torch.where(valid, sums.log().add_(peak), 0).sum()
        weights = torch.where(valid, 1 / sums, 0)[:, None]
        weighted = (scaled[chunk] * weights).to(narrow)
        for rows, tile in tiles:
            exponentials = tile.to(narrow)
            if of_pool is not None:
                multiply(exponentials.T, weighted, of_pool[rows], add=True)
            if of_anchors is not None:
                multiply(exponentials, pool[rows].to(narrow), of_anchors[chunk], add=True)
        if of_anchors is not None:
            of_anchors[chunk] *= weights
    return total, (of_anchors, of_pool)


def _tiles(buffer: Tensor, num_anchors: int, pool: Tensor) -> list[tuple[slice, Tensor]]:
    """Cut [R, N] into parts of some pool rows, each of one piece: these rows and the part [R, K]."""
    width = block_rows(num_anchors, pool, buffer.dtype, None)
    slices = [slice(start, min(start + width, len(pool))) for start in range(0, len(pool), width)]
    return [(rows, buffer[rows.start * num_anchors : rows.stop * num_anchors].view(num_anchors, -1)) for rows in slices]


def _exponentials(
    factors: Tensor, pool: Tensor, first: int, tiles: list[tuple[slice, Tensor]], scale: float | None, bounded: bool
) -> tuple[Tensor, Tensor]:
    """Fill the tiles with exp(s_ia - peak_i), 0 for a = i; returns their sums [R] and the peaks [R]."""
    sums = tiles[0][1].new_zeros(len(factors))
    peak = torch.zeros_like(sums) if bounded else torch.full_like(sums, -torch.inf)
    for rows, tile in tiles:
        similarity_tile(factors, pool[rows], first - rows.start, tile, scale)
        # While the tile is in the cache.
        if bounded:
            sums += tile.exp_().sum(1)
        else:
            peak = torch.maximum(peak, tile.amax(1))
    if not bounded:
        peak = finite(peak)
        for _, tile in tiles:
            sums += tile.sub_(peak[:, None]).exp_().sum(1)
    return sums, peak


def _positives(
    scaled: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    num_positives: Tensor,
    grads: _Gradients,
    settings: _Settings,
) -> Tensor:
    """Sum over the anchors of their positives' mean similarity; its gradients are taken off `grads`."""
    of_anchors, of_pool = grads
    own = slice(settings.first, settings.first + len(scaled))
    num_classes = int(pool_labels.max()) + 1 if len(pool_labels) else 0
    shares = torch.where(num_positives > 0, 1 / num_positives.to(scaled.dtype), 0)[:, None]
    means = class_sums(pool, pool_labels, num_classes).index_select(0, anchor_labels).sub_(pool[own])
    means = torch.where(num_positives[:, None] > 0, means * shares, 0)
    if of_anchors is not None:
        of_anchors -= means
    if of_pool is not None:
        # Row p receives z_i / |P(i)| of every anchor i of its class but itself.
        shared = torch.where(shares > 0, scaled * shares, 0)
        sums = class_sums(shared, anchor_labels, num_classes)
        for rows in torch.arange(len(pool), device=pool.device).split(max(len(scaled), 1)):
            of_pool[rows[0] : rows[-1] + 1] -= sums.index_select(0, pool_labels[rows])
        of_pool[own] += shared
    return torch.where(num_positives > 0, (means * scaled).sum(1), 0).sum()


def _chunk_size(num_anchors: int, pool: Tensor, dtype: torch.dtype) -> int:
    """R, such that [R, N] takes `CHUNK_BYTES`, or as much as the pool in `dtype` where that is more."""
    budget = CHUNK_BYTES.get(pool.device.type, CHUNK_BYTES["cuda"])
    return max(min(max(budget // (max(len(pool), 1) * dtype.itemsize), pool.shape[1]), num_anchors), 1)
