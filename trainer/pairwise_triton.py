"""The blockwise kernels for CUDA in Triton: similarities stay on the chip. `trainer.pairwise_cuda` launches them.

The forward is that of Dao et al., FlashAttention, NeurIPS 2022 (arXiv 2205.14135), alg. 1, with the pool as keys and
values, cut into splits because few anchors alone would leave most of the GPU idle. It keeps each anchor's weighted mean
of the pool, from which its gradient follows without another walk.

Shapes: B anchors, N rows of the pool, D embedding, C classes, S splits of the pool; a program handles BLOCK_M anchors
and BLOCK_N rows at a time, BLOCK_D is D rounded up to a power of 2. A kernel's arguments are pointers and sizes.
"""

# ruff: noqa: PLR0913, PLR0917, D103
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# Which of these is fastest is timed once for each kind of input, by Triton. One in the interpreter, which only tests.
_SHAPES = ((128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))
_CONFIGS = [
    triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
    for block_m, block_n, warps, stages in (_SHAPES if not triton.knobs.runtime.interpret else ((16, 64, 4, 1),))
]

# The interpreter multiplies the bits of bfloat16.
_WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _multiply(left, right, onto, PRECISION: tl.constexpr):
    if _WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, onto, input_precision=PRECISION)


@triton.autotune(_CONFIGS, key=["D", "NEED_MEANS", "PRECISION"])
@triton.jit
def forward_kernel(
    anchors, pool, peaks, sums, means, num_anchors, num_rows, first, scale, rows_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NEED_MEANS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    own = first + i
    a = tl.load(anchors + i[:, None] * D + d[None, :], mask=(i < num_anchors)[:, None] & (d < D)[None, :], other=0.0)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = split * rows_per_split
    high = tl.minimum(low + rows_per_split, num_rows)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = pool + j.to(tl.int64)[:, None] * D + d[None, :]
        p = tl.load(at, mask=(j < high)[:, None] & (d < D)[None, :], other=0.0)
        s = _multiply(a, tl.trans(p), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
        s = tl.where((j < high)[None, :] & (j[None, :] != own[:, None]), s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)  # -inf - -inf is NaN
        w = tl.exp2(s - shift[:, None])
        kept = tl.exp2(peak - shift)
        total = total * kept + tl.sum(w, 1)
        if NEED_MEANS:
            mean = _multiply(w.to(p.dtype), p, mean * kept[:, None], PRECISION)
        peak = higher
    to = split * num_anchors + i
    tl.store(peaks + to, peak, mask=i < num_anchors)
    tl.store(sums + to, total, mask=i < num_anchors)
    if NEED_MEANS:
        at = means + to.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, mean, mask=(i < num_anchors)[:, None] & (d < D)[None, :])


@triton.autotune(_CONFIGS, key=["D", "PRECISION"])
@triton.jit
def backward_kernel(
    anchors, pool, shifts, weights, class_sums, pool_labels, own_rows, out, num_anchors, num_rows, first, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LESS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = (j < num_rows)[:, None] & (d < D)[None, :]
    at = j.to(tl.int64)[:, None] * D + d[None, :]
    p = tl.load(pool + at, mask=inside, other=0.0)
    gradient = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if LESS:
        label = tl.load(pool_labels + j, mask=j < num_rows, other=0)
        gradient -= tl.load(class_sums + label[:, None] * D + d[None, :], mask=inside, other=0.0)
        i = j - first
        is_anchor = ((i >= 0) & (i < num_anchors))[:, None] & (d < D)[None, :]
        gradient += tl.load(own_rows + i[:, None] * D + d[None, :], mask=is_anchor, other=0.0)
    for start in range(0, num_anchors, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        mask = i < num_anchors
        a = tl.load(anchors + i[:, None] * D + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)
        shift = tl.load(shifts + i, mask=mask, other=0.0)
        weight = tl.load(weights + i, mask=mask, other=0.0)
        s = _multiply(p, tl.trans(a), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION) * scale - shift[None, :]
        counts = (j[:, None] != (first + i)[None, :]) & mask[None, :]
        w = tl.exp2(tl.where(counts, s, -float("inf"))) * weight[None, :]
        gradient = _multiply(w.to(a.dtype), a, gradient, PRECISION)
    tl.store(out + at, gradient.to(out.dtype.element_ty), mask=inside)


@triton.autotune(_CONFIGS, key=["D"])
@triton.jit
def class_sums_kernel(
    x, labels, out, num_classes, num_rows, rows_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    low = split * rows_per_split
    high = tl.minimum(low + rows_per_split, num_rows)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = x + j.to(tl.int64)[:, None] * D + d[None, :]
        row = tl.load(at, mask=(j < high)[:, None] & (d < D)[None, :], other=0.0)
        label = tl.load(labels + j, mask=j < high, other=-1)
        total = _multiply((c[:, None] == label[None, :]).to(tl.float32).to(row.dtype), row, total, "ieee")
    at = out + (split * num_classes + c).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, total, mask=(c < num_classes)[:, None] & (d < D)[None, :])


@triton.autotune(_CONFIGS, key=["D", "PRECISION"])
@triton.jit
def hardest_kernel(
    anchors, anchor_labels, pool, pool_labels, centre, farthest, positives, nearest, negatives,
    num_anchors, num_rows, first, rows_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CENTRED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    own = first + i
    c = tl.load(centre + d, mask=d < D, other=0.0)
    a = tl.load(anchors + i[:, None] * D + d[None, :], mask=(i < num_anchors)[:, None] & (d < D)[None, :], other=0.0)
    if CENTRED:
        a = a - c[None, :]
    label = tl.load(anchor_labels + i, mask=i < num_anchors, other=0)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    smallest = tl.full([BLOCK_M], float("inf"), tl.float32)
    positive = tl.zeros([BLOCK_M], tl.int64)
    negative = tl.zeros([BLOCK_M], tl.int64)
    low = split * rows_per_split
    high = tl.minimum(low + rows_per_split, num_rows)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        at = pool + j.to(tl.int64)[:, None] * D + d[None, :]
        p = tl.load(at, mask=(j < high)[:, None] & (d < D)[None, :], other=0.0)
        if CENTRED:
            p = p - c[None, :]
        wide = p.to(tl.float32)
        # |a - p|^2 less |a|^2, which does not change the order.
        product = _multiply(a, tl.trans(p), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        distance = tl.sum(wide * wide, 1)[None, :] - 2 * product
        same = label[:, None] == tl.load(pool_labels + j, mask=j < high, other=0)[None, :]
        inside = (j < high)[None, :]
        of_class = tl.where(same & inside & (j[None, :] != own[:, None]), distance, -float("inf"))
        value, column = tl.max(of_class, 1, return_indices=True)
        positive = tl.where(value > largest, start + column, positive)
        largest = tl.maximum(largest, value)
        of_others = tl.where(same | (inside == 0), float("inf"), distance)
        value, column = tl.min(of_others, 1, return_indices=True)
        negative = tl.where(value < smallest, start + column, negative)
        smallest = tl.minimum(smallest, value)
    to = split * num_anchors + i
    tl.store(farthest + to, largest, mask=i < num_anchors)
    tl.store(nearest + to, smallest, mask=i < num_anchors)
    tl.store(positives + to, positive, mask=i < num_anchors)
    tl.store(negatives + to, negative, mask=i < num_anchors)
