"""What the blockwise functions share: the walk over the pool, and sums that are made in float32 or better.

Shapes: B anchors of this rank, N rows of the pool, D embedding, C classes, K rows in a block. Anchor i is row
`first + i` of the pool and is never compared with itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of the one [B, K] buffer. On a CPU it should stay in the cache between the passes over it.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
MIN_BLOCK_ROWS = 32

# Devices whose matrix units take bfloat16 and sum in float32, as PyTorch offers it.
NARROW_DEVICES = {"cuda"}

# If no similarity can exceed this, exp needs no shift: exp(30) = 1e13 leaves float32 (1e-38 to 1e38) room on both sides
# for any pool and for the product with exp(-log_sum). T >= 1/30 on the unit sphere is below it; it spares two passes.
MAX_UNSHIFTED = 30.0


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The type in which sums are made: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def factor_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrix products take their factors; their sums are always in `accumulation_dtype`.

    bfloat16 stays as it is where the device multiplies it into float32 (tensor cores). Products of two such numbers are
    exact in float32, so similarities lose nothing; the backward's weights are rounded to it.
    """
    narrow = x.dtype == torch.bfloat16 and x.device.type in NARROW_DEVICES
    return torch.bfloat16 if narrow else accumulation_dtype(x)


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
    """Left x right into `out`, or onto it, summed in the type of `out`, which the factors have or are narrower than."""
    if left.dtype != out.dtype and left.device.type == "cpu":
        left, right = left.to(out.dtype), right.to(out.dtype)  # PyTorch has no such product on the CPU
    if left.dtype == out.dtype:
        if add:
            out.addmm_(left, right)
        else:
            torch.mm(left, right, out=out)
    elif add:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def multiply_into(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Left x right into `out`, which may be narrower than the sums are."""
    if out.dtype == accumulation_dtype(out):
        multiply(left, right, out)
    else:
        wide = torch.empty(out.shape, dtype=accumulation_dtype(out), device=out.device)
        multiply(left, right, wide)
        out.copy_(wide)


def check_pair(anchors: Tensor, pool: Tensor, first: int) -> None:
    """Anchors must be rows of the pool.

    Raises:
        ValueError: Another dtype, device or width, or rows that reach beyond the pool.
    """
    if anchors.dtype != pool.dtype:
        raise ValueError(
            f"anchors are {anchors.dtype} but the pool is {pool.dtype}: both must have one dtype, cast one of them"
        )
    if anchors.device != pool.device:
        raise ValueError(
            f"anchors are on {anchors.device} but the pool is on {pool.device}: both must be on one device, move one"
        )
    if anchors.shape[1] != pool.shape[1]:
        raise ValueError(
            f"anchors have {anchors.shape[1]} columns but the pool has {pool.shape[1]}: both must come from one head"
        )
    if not 0 <= first <= len(pool) - len(anchors):
        raise ValueError(
            f"first = {first} with {len(anchors)} anchors reaches out of a pool of {len(pool)} rows: "
            "each anchor must be a row of the pool"
        )


def scaled_factors(anchors: Tensor, scale: float) -> tuple[Tensor, float | None]:
    """Anchors as factors of products with the pool that are to be multiplied by `scale`, and what is left of it.

    None is left where the factors are wide. Rounded to bfloat16 they would no longer be exact.
    """
    if factor_dtype(anchors) == anchors.dtype == torch.bfloat16:
        return anchors, scale
    return anchors.to(accumulation_dtype(anchors)) * scale, None


def similarity_blocks(
    anchors: Tensor, pool: Tensor, first: int, width: int, scale: float | None = None, centre: Tensor | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Walk over the pool, K = `width` rows at a time.

    Args:
        anchors: [B, D], the pool's dtype or wider.
        pool: [N, D].
        first: Pool row of anchor 0; beyond the pool where anchors are no rows of it.
        width: K.
        scale: By which the products are multiplied.
        centre: [D], taken off the pool's rows.

    Yields:
        First row of the block; the block [K, D] in the factors' dtype, less `centre`; scale * anchors x block [B, K] in
        `accumulation_dtype`, the anchors' own columns -inf. That is one buffer used again: the caller may write in it.
    """
    num_anchors = len(anchors)
    anchors = anchors.to(factor_dtype(anchors))
    buffer = anchors.new_empty(num_anchors * min(width, len(pool)), dtype=accumulation_dtype(anchors))
    for start in range(0, len(pool), width):
        block = pool[start : start + width].to(anchors.dtype)
        if centre is not None:
            block = block - centre
        similarity = buffer[: num_anchors * len(block)].view(num_anchors, len(block))
        similarity_tile(anchors, block, first - start, similarity, scale)
        yield start, block, similarity


def similarity_tile(anchors: Tensor, block: Tensor, first: int, out: Tensor, scale: float | None = None) -> None:
    """Scale * anchors x block into `out`, with -inf where row `first + i` of the block is anchor i.

    Args:
        anchors: [B, D] in `factor_dtype`.
        block: [K, D].
        first: Row of anchor 0 counted from the block's begin; it and others may lie outside.
        out: [B, K] in `accumulation_dtype`.
        scale: None = 1.
    """
    multiply(anchors, block.to(anchors.dtype).T, out)
    if scale is not None:
        out.mul_(scale)
    low, high = max(-first, 0), min(len(block) - first, len(anchors))
    if low < high:
        out[low:high, first + low :].diagonal().fill_(-torch.inf)


def block_rows(num_anchors: int, pool: Tensor, dtype: torch.dtype, block_bytes: int | None) -> int:
    """K, such that a [B, K] buffer takes `block_bytes`, but not so small that the products become slow."""
    budget = BLOCK_BYTES.get(pool.device.type, BLOCK_BYTES["cuda"]) if block_bytes is None else block_bytes
    least = MIN_BLOCK_ROWS if block_bytes is None else 1
    return min(max(budget // (max(num_anchors, 1) * dtype.itemsize), least), max(len(pool), 1))


def largest_norm(x: Tensor, dtype: torch.dtype) -> float:
    """Of the rows of [B, D]; 0 for none."""
    return float(torch.linalg.vector_norm(x, dim=1, dtype=dtype).max()) if len(x) else 0.0


def class_sums(x: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sum of the rows of each class, [N, D] -> [C, D] in `accumulation_dtype`."""
    sums = torch.zeros(num_classes, x.shape[1], dtype=accumulation_dtype(x), device=x.device)
    return sums.index_add_(0, labels, x.to(sums.dtype))


def finite(x: Tensor) -> Tensor:
    """-inf, the maximum of nothing, becomes 0: -inf - -inf is NaN."""
    return torch.where(x.isneginf(), torch.zeros_like(x), x)
