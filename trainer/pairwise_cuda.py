"""The blockwise functions on a GPU: launches of the Triton kernels, and their gradients.

Loaded only where there is a GPU and Triton (`trainer.pairwise_choice`), and held against the PyTorch path in the tests.
Inputs are float32 or bfloat16, sums are float32. float32 factors are multiplied in TF32 only where PyTorch's own
products are; the weights of a bfloat16 backward are rounded to bfloat16 before they are multiplied, as on that path.

Shapes: B anchors of this rank, N rows of the pool, D embedding, C classes, S splits of the pool.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.pairwise_blocks import finite
from trainer.pairwise_choice import tf32_allowed
from trainer.pairwise_triton import backward_kernel, class_sums_kernel, forward_kernel, hardest_kernel

LOG2_E = math.log2(math.e)


def pool_logsumexp(anchors: Tensor, pool: Tensor, temperature: float, first: int) -> Tensor:
    """See `trainer.pairwise_logsumexp.pool_logsumexp`, without a bias of the rows."""
    need_means = torch.is_grad_enabled() and anchors.requires_grad
    return _PoolLogSumExp.apply(anchors, pool, temperature, first, need_means)


def contrastive_total(
    anchors: Tensor,
    anchor_labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    num_positives: Tensor,
    temperature: float,
    first: int,
) -> Tensor:
    """See `trainer.pairwise_contrastive.contrastive_total`, whose second result `num_positives` is."""
    settings = (temperature, first, torch.is_grad_enabled() and anchors.requires_grad)
    return _ContrastiveTotal.apply(anchors, anchor_labels, pool, pool_labels, num_positives, settings)


class _PoolLogSumExp(torch.autograd.Function):
    """See `trainer.pairwise_logsumexp`."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, pool: Tensor, temperature: float, first: int, need_means: bool) -> Tensor:
        log_sum, means = log_sum_exp(anchors, pool, temperature, first, need_means)
        ctx.save_for_backward(anchors, pool, log_sum, means)
        ctx.settings = (temperature, first)
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, pool, log_sum, means = ctx.saved_tensors
        temperature, first = ctx.settings
        weights = torch.where(log_sum.isneginf(), 0, grad / temperature)
        of_anchors = (means * weights[:, None]).to(anchors.dtype) if ctx.needs_input_grad[0] else None
        of_pool = None
        if ctx.needs_input_grad[1]:
            of_pool = pool_gradient(anchors, pool, log_sum, weights, temperature, first)
        return of_anchors, of_pool, None, None, None


class _ContrastiveTotal(torch.autograd.Function):
    """See `trainer.pairwise_contrastive`; here the backward makes the similarities again, since they never leave."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        anchor_labels: Tensor,
        pool: Tensor,
        pool_labels: Tensor,
        num_positives: Tensor,
        settings: tuple[float, int, bool],
    ) -> Tensor:
        temperature, first, need_means = settings
        log_sum, means = log_sum_exp(anchors, pool, temperature, first, need_means)
        num_classes = int(pool_labels.max()) + 1 if len(pool_labels) else 0
        valid = num_positives > 0
        positives = class_sums(pool, pool_labels, num_classes).index_select(0, anchor_labels)
        positives = (positives - pool[first : first + len(anchors)]) / num_positives.clamp(min=1)[:, None]
        losses = log_sum - (positives * anchors).sum(1) / temperature
        slopes = None if means is None else torch.where(valid[:, None], (means - positives) / temperature, 0)
        ctx.save_for_backward(anchors, anchor_labels, pool, pool_labels, num_positives, log_sum, slopes)
        ctx.settings = (temperature, first, num_classes)
        return torch.where(valid, losses, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        anchors, anchor_labels, pool, pool_labels, num_positives, log_sum, slopes = ctx.saved_tensors
        temperature, first, num_classes = ctx.settings
        of_anchors = (slopes * grad).to(anchors.dtype) if ctx.needs_input_grad[0] else None
        of_pool = None
        if ctx.needs_input_grad[2]:
            valid = num_positives > 0
            weights = torch.where(valid, grad / temperature, 0)
            shares = torch.where(valid, weights / num_positives, 0)[:, None]
            shared = torch.where(valid[:, None], anchors * shares, 0)
            less = (class_sums(shared, anchor_labels, num_classes), pool_labels, shared)
            of_pool = pool_gradient(anchors, pool, log_sum, weights, temperature, first, less)
        return of_anchors, None, of_pool, None, None, None


def log_sum_exp(
    anchors: Tensor, pool: Tensor, temperature: float, first: int, need_means: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of z_i . z_a / T over the pool rows a != first + i, and the mean of these rows under its weights.

    Args:
        anchors: [B, D] float32 or bfloat16, D <= 256.
        pool: [N, D], same dtype and device.
        temperature: T > 0.
        first: Pool row of anchor 0.
        need_means: Whether the means are wanted; they are T times the gradient to the anchors.

    Returns:
        [B] float32, -inf for an anchor alone in the pool; means [B, D] float32 or None.
    """
    anchors, pool = anchors.contiguous(), pool.contiguous()
    (num_anchors, dim), num_rows = anchors.shape, len(pool)
    splits = _num_splits(num_anchors, num_rows, pool.device)
    rows_per_split = -(-num_rows // splits)
    peaks, sums = torch.empty(2, splits, num_anchors, dtype=torch.float32, device=pool.device)
    means = torch.empty(splits, num_anchors, dim if need_means else 0, dtype=torch.float32, device=pool.device)
    forward_kernel[lambda meta: (triton.cdiv(num_anchors, meta["BLOCK_M"]), splits)](
        anchors, pool, peaks, sums, means, num_anchors, num_rows, first, LOG2_E / temperature, rows_per_split,
        D=dim, BLOCK_D=_block_d(dim), NEED_MEANS=need_means, PRECISION=_precision(pool),
    )  # fmt: skip
    peak = finite(peaks.amax(0))
    factors = torch.exp2(peaks - peak)
    total = (sums * factors).sum(0)
    log_sum = (torch.log2(total) + peak) / LOG2_E
    if not need_means:
        return log_sum, None
    # An anchor alone in the pool has a total of 0 and means of 0.
    return log_sum, torch.einsum("sb,sbd->bd", factors, means) / torch.where(total == 0, 1, total)[:, None]


def pool_gradient(
    anchors: Tensor,
    pool: Tensor,
    log_sum: Tensor,
    weights: Tensor,
    temperature: float,
    first: int,
    less: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Sum over the anchors of weight_i exp(z_i . z_a / T - log_sum_i) z_i for each pool row a != first + i.

    Args:
        anchors: [B, D], as for `log_sum_exp`.
        pool: [N, D].
        log_sum: [B] float32.
        weights: [B] float32, the incoming gradient over T; 0 where `log_sum` is -inf.
        temperature: T > 0.
        first: Pool row of anchor 0.
        less: Taken off: sums [C, D] float32 of a row's class, the classes [N] of the rows, and [B, D] float32 by which
            an anchor's own row has less in its class's sum.

    Returns:
        [N, D] in the pool's dtype.
    """
    anchors, pool = anchors.contiguous(), pool.contiguous()
    (num_anchors, dim), num_rows = anchors.shape, len(pool)
    out = torch.empty_like(pool)
    shift = torch.where(log_sum.isneginf(), 0, log_sum * LOG2_E).contiguous()
    sums, labels, own = less or (shift, shift, shift)  # not read
    backward_kernel[lambda meta: (triton.cdiv(num_rows, meta["BLOCK_N"]),)](
        anchors, pool, shift, weights.contiguous(), sums, labels, own, out, num_anchors, num_rows, first,
        LOG2_E / temperature,
        D=dim, BLOCK_D=_block_d(dim), LESS=less is not None, PRECISION=_precision(pool),
    )  # fmt: skip
    return out


def class_sums(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class, [N, D] -> [C, D] float32, in the same order each time."""
    x, dim = x.contiguous(), x.shape[1]
    splits = _num_splits(num_classes, len(x), x.device)
    sums = torch.empty(splits, num_classes, dim, dtype=torch.float32, device=x.device)
    class_sums_kernel[lambda meta: (triton.cdiv(num_classes, meta["BLOCK_M"]), splits)](
        x, labels.contiguous(), sums, num_classes, len(x), -(-len(x) // splits), D=dim, BLOCK_D=_block_d(dim)
    )
    return sums.sum(0)


def hardest_rows(
    anchors: Tensor, anchor_labels: Tensor, pool: Tensor, pool_labels: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """See `trainer.pairwise_rows.hardest_rows`; for embeddings without NaN, D <= 256."""
    anchors, pool = anchors.contiguous(), pool.contiguous()
    (num_anchors, dim), num_rows, device = anchors.shape, len(pool), pool.device
    # The origin in the pool's middle, as on PyTorch's path. bfloat16 could not hold the difference; its products are
    # exact, and two different rows of 8 binary digits are farther apart than the rounding of a float32 sum.
    centre = pool.mean(0, dtype=torch.float32) if pool.dtype == torch.float32 else torch.zeros(dim, device=device)
    splits = _num_splits(num_anchors, num_rows, device)
    values = torch.empty(2, splits, num_anchors, dtype=torch.float32, device=device)
    rows = torch.empty(2, splits, num_anchors, dtype=torch.int64, device=device)
    hardest_kernel[lambda meta: (triton.cdiv(num_anchors, meta["BLOCK_M"]), splits)](
        anchors, anchor_labels.contiguous(), pool, pool_labels.contiguous(), centre, values[0], rows[0], values[1],
        rows[1], num_anchors, num_rows, first, -(-num_rows // splits),
        D=dim, BLOCK_D=_block_d(dim), CENTRED=pool.dtype == torch.float32, PRECISION=_precision(pool),
    )  # fmt: skip
    farthest, nearest = values[0].max(0), values[1].min(0)
    positive = torch.where(farthest.values.isneginf(), -1, rows[0].gather(0, farthest.indices[None]).squeeze(0))
    negative = torch.where(nearest.values.isposinf(), -1, rows[1].gather(0, nearest.indices[None]).squeeze(0))
    return positive, negative


def _num_splits(num_anchors: int, num_rows: int, device: torch.device) -> int:
    """S: about four programs for each processor of the GPU, of at least a thousand rows each."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(min(4 * processors * 64 // max(num_anchors, 1), -(-num_rows // 1024)), 1)


def _block_d(dim: int) -> int:
    return max(triton.next_power_of_2(dim), 16)  # the least that the matrix units take


def _precision(x: Tensor) -> Any:
    """Of products of float32: TF32 where the user allowed it for PyTorch's own products."""
    return "tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee"
