"""All-triplet sums against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.pairs import EACH_BLOCK, LABELS, NUM_ROWS, PLACES, cut_pool, pairs, pool_of, random_rows, with_gradients
from trainer.pairwise import all_triplet_sums


def loop_all_triplets(anchors, pool, labels, first, margin):
    """Differentiable, triplet by triplet."""
    sums, active, total = [], [], []
    for i in range(len(anchors)):
        # The norm of an exact zero has gradient zero in PyTorch.
        distance = [torch.linalg.vector_norm(anchors[i] - row) for row in pool]
        positives, negatives = pairs(i, labels, first)
        terms = [margin + distance[p] - distance[n] for p in positives for n in negatives]
        over = [term for term in terms if term > 0]
        sums.append(sum(over, torch.zeros((), dtype=pool.dtype)))
        active.append(len(over))
        total.append(len(terms))
    return torch.stack(sums), active, total


@EACH_BLOCK
@pytest.mark.parametrize("margin", [0.2, 0.0, 5.0])
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_all_triplets_equal_a_loop(num_anchors, first, margin, block, monkeypatch):
    cut_pool(monkeypatch, block)
    pool = pool_of()
    anchors, own = pool[first : first + num_anchors], LABELS[first : first + num_anchors]
    weights = random_rows(num_anchors, seed=1)
    ours = with_gradients(lambda a, p: all_triplet_sums(a, own, p, LABELS, first, margin)[0], anchors, pool, weights)
    loop = with_gradients(lambda a, p: loop_all_triplets(a, p, LABELS, first, margin)[0], anchors, pool, weights)
    for x, y in zip(ours, loop, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    _, active, total = all_triplet_sums(anchors, own, pool, LABELS, first, margin)
    _, *counts = loop_all_triplets(anchors, pool, LABELS, first, margin)
    assert [active.tolist(), total.tolist()] == counts


def test_all_triplets_of_equal_rows():
    # Each row stands in the pool three times, once under another class: distances of zero, sums of ties at margin 0.
    pool = pool_of()[:6].repeat(3, 1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1] * 2 + [1, 1, 1, 0, 0, 0])
    weights = random_rows(len(pool), seed=1)
    torch.testing.assert_close(
        all_triplet_sums(pool, labels, pool, labels, 0, 0.0)[0], loop_all_triplets(pool, pool, labels, 0, 0.0)[0]
    )
    ours = with_gradients(lambda a, p: all_triplet_sums(a, labels, p, labels, 0, 0.3)[0], pool, pool, weights)
    loop = with_gradients(lambda a, p: loop_all_triplets(a, p, labels, 0, 0.3)[0], pool, pool, weights)
    for x, y in zip(ours, loop, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_triplets_accumulate_in_float32(dtype):
    pool = functional.normalize(random_rows(2048, 64)).to(dtype)
    pool[1024:] = pool[:1024] * 1.001  # many nearly equal rows: their distance is no difference of large numbers
    labels, weights = torch.arange(2048) % 10, random_rows(16, seed=1)
    results = [
        with_gradients(lambda a, p: all_triplet_sums(a, labels[8:24], p, labels, 8, 0.2)[0], rows[8:24], rows, weights)
        for rows in (pool, pool.double())
    ]
    assert [x.dtype for x in results[0]] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=0)
    for x, y in zip(results[0][1:], results[1][1:], strict=True):
        rounding = 2**-8 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-3 * float(y.abs().max()))


@pytest.mark.parametrize("labels", [torch.zeros(NUM_ROWS, dtype=torch.int64), torch.arange(NUM_ROWS)])
def test_all_triplets_without_one_kind_of_pair_are_none(labels):
    pool = pool_of().requires_grad_()
    sums, active, total = all_triplet_sums(pool, labels, pool, labels, 0, 0.5)
    assert sums.abs().max() == 0 and active.sum() == 0 and total.sum() == 0
    assert torch.autograd.grad(sums.sum(), pool)[0].abs().max() == 0
