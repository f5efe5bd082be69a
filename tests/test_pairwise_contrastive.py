"""The supervised contrastive sum against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.pairs import EACH_BLOCK, LABELS, NUM_ROWS, PLACES, cut_pool, pairs, pool_of, random_rows, with_gradients
from trainer import pairwise_blocks, pairwise_contrastive
from trainer.pairwise import contrastive_total


def dense_contrastive(anchors, pool, labels, first, temperature):
    """Mean over the positives of -log softmax, anchor by anchor, as eq. 2 of Khosla et al. has it."""
    total = torch.zeros((), dtype=pool.dtype)
    for i in range(len(anchors)):
        positives, negatives = pairs(i, labels, first)
        if positives:
            similarity = (pool @ anchors[i]) / temperature
            denominator = similarity[positives + negatives].logsumexp(0)
            total = total - (similarity[positives] - denominator).mean()
    return total


# Rows of a chunk of anchors, whose least is D = 4; largest similarity / T about 1, 50 and 50,000.
@EACH_BLOCK
@pytest.mark.parametrize("temperature", [1.0, 0.02, 2e-5])
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_contrastive_total_equals_the_dense_one(num_anchors, first, temperature, block, monkeypatch):
    cut_pool(monkeypatch, block)
    monkeypatch.setitem(pairwise_contrastive.CHUNK_BYTES, "cpu", 8 * NUM_ROWS * block)
    pool = pool_of()
    anchors, own = pool[first : first + num_anchors], LABELS[first : first + num_anchors]
    weight = torch.tensor(-1.7, dtype=torch.float64)
    ours = with_gradients(
        lambda a, p: contrastive_total(a, own, p, LABELS, temperature, first)[0], anchors, pool, weight
    )
    dense = with_gradients(lambda a, p: dense_contrastive(a, p, LABELS, first, temperature), anchors, pool, weight)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * float(y.abs().max()))
    counts = contrastive_total(anchors, own, pool, LABELS, temperature, first)[1]
    assert counts.tolist() == [len(pairs(i, LABELS, first)[0]) for i in range(num_anchors)]


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrastive_total_accumulates_in_float32(temperature, dtype, monkeypatch):
    monkeypatch.setitem(pairwise_contrastive.CHUNK_BYTES, "cpu", 0)
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 4 * 64 * 100)
    pool, labels = functional.normalize(random_rows(4096, 64)).to(dtype), torch.arange(4096) % 10
    ours, exact = (
        with_gradients(
            lambda a, p: contrastive_total(a, labels[8:108], p, labels, temperature, 8)[0],
            rows[8:108],
            rows,
            torch.ones(()),
        )
        for rows in (pool, pool.double())
    )
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0)
    for x, y in zip(ours[1:], exact[1:], strict=True):
        rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-5 * float(y.abs().max()))


def test_contrastive_total_passes_gradcheck_and_goes_backward_twice():
    pool, labels = random_rows(9, 3).requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 0, 2, 1, 3])
    anchors = random_rows(4, 3, seed=1).requires_grad_()

    def total(a, p):
        return contrastive_total(a, labels[2:6], p, labels, 0.5, 2)[0]

    assert torch.autograd.gradcheck(total, (anchors, pool))
    assert torch.autograd.gradcheck(lambda a: total(a, pool.detach()), (anchors,))
    assert torch.autograd.gradcheck(lambda p: total(anchors.detach(), p), (pool,))
    value = total(anchors, pool)
    once = torch.autograd.grad(value, (anchors, pool), retain_graph=True)
    twice = torch.autograd.grad(3 * value, (anchors, pool), retain_graph=True)
    for x, y in zip(once, twice, strict=True):
        torch.testing.assert_close(3 * x, y)
    with torch.no_grad():
        assert float(total(anchors, pool)) == pytest.approx(float(value.detach()), rel=1e-12)


def test_contrastive_total_masks_what_has_no_positive():
    pool = pool_of()
    pool[20] = torch.nan  # a class of its own
    labels = torch.arange(NUM_ROWS) % 3
    labels[20] = 7
    total, num_positives = contrastive_total(pool, labels, pool, labels, 0.1, 0)
    assert total.isnan() and num_positives[20] == 0
    # Alone in the pool, or without any anchor: a zero that still has a graph.
    for size, rows in ((1, 1), (0, 3)):
        pool = random_rows(rows, 4).requires_grad_()
        total, _ = contrastive_total(pool[:size], torch.arange(size), pool, torch.arange(rows), 1e-3, 0)
        assert float(total.detach()) == 0 and total.requires_grad
        assert torch.autograd.grad(total, pool)[0].abs().max() == 0
