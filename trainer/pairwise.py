"""The blockwise kernel under the pair losses: exact, in memory linear in the pool.

Each function walks over the pool in blocks and keeps running results, so that the [B, N] matrix of similarities never
exists; the backward walks again and recomputes each block. `contrastive_total`, whose anchors end in one number, takes
a chunk of anchors at a time instead, in a buffer of fixed size or of the pool's own, and walks once. Lower precisions
than float32 are summed in float32. On a GPU Triton's kernels take over where they are faster.

Shapes: B anchors of this rank, N rows of the pool. Anchor i is row `first + i` of the pool and is never compared with
itself. This file is the door; each idea has its own file `pairwise_*.py`.
"""

from __future__ import annotations

from trainer.pairwise_blocks import accumulation_dtype
from trainer.pairwise_contrastive import contrastive_total
from trainer.pairwise_logsumexp import pool_logsumexp, positive_similarity
from trainer.pairwise_multi_similarity import multi_similarity_sums
from trainer.pairwise_rows import hardest_rows, semi_hard_rows
from trainer.pairwise_triplets import all_triplet_sums

__all__ = [
    "accumulation_dtype",
    "all_triplet_sums",
    "contrastive_total",
    "hardest_rows",
    "multi_similarity_sums",
    "pool_logsumexp",
    "positive_similarity",
    "semi_hard_rows",
]
