"""The blockwise kernel against the dense computation, for any block size, and its memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from benchmarks.common import allocator_extra_bytes
from trainer import pairwise_contrastive
from trainer.losses.base import Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.supervised_contrastive import supervised_contrastive
from trainer.pairwise import hardest_rows, pool_logsumexp, positive_similarity

NUM_ANCHORS, NUM_ROWS, FIRST = 7, 23, 5
# One row, sizes that do not divide 23, the whole pool in one block; in float64.
BLOCK_BYTES = [8 * NUM_ANCHORS * rows for rows in (1, 4, 5, 22, 23, 100)]


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_logsumexp(anchors, pool, temperature, first):
    similarity = anchors @ pool.T / temperature
    own = torch.zeros(similarity.shape, dtype=torch.bool)
    own[range(len(anchors)), range(first, first + len(anchors))] = True
    return similarity.masked_fill(own, -torch.inf).logsumexp(1)


def with_gradients(function, anchors, pool, weights):
    anchors, pool = anchors.detach().clone().requires_grad_(), pool.detach().clone().requires_grad_()
    out = function(anchors, pool)
    return out.detach(), *torch.autograd.grad(out, (anchors, pool), weights.to(out.dtype))


# Largest similarity / T about 3 (no shift), 40 (shift) and 40,000 (only right with the running maximum).
@pytest.mark.parametrize("temperature", [1.0, 0.02, 2e-5])
@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_logsumexp_equals_the_dense_one_for_any_block(temperature, block_bytes):
    anchors, pool = (functional.normalize(random_rows(n, 4, seed=n)) for n in (NUM_ANCHORS, NUM_ROWS))
    weights = random_rows(NUM_ANCHORS, seed=1)
    ours = with_gradients(lambda a, p: pool_logsumexp(a, p, temperature, FIRST, block_bytes), anchors, pool, weights)
    dense = with_gradients(lambda a, p: dense_logsumexp(a, p, temperature, FIRST), anchors, pool, weights)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10 * float(y.abs().max()))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logsumexp_passes_gradcheck(scale):
    anchors, pool = (scale * random_rows(n, 3, seed=n) for n in (4, 9))
    anchors.requires_grad_()
    pool.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, p: pool_logsumexp(a, p, 0.5 * scale**2, 2, 8 * 4 * 2), (anchors, pool))
    # Frozen rows (a memory of past batches) ask for no gradient.
    assert torch.autograd.gradcheck(lambda a: pool_logsumexp(a, pool.detach(), 0.5, 2, 64), (anchors,))


@pytest.mark.parametrize("temperature", [0.1, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logsumexp_accumulates_in_float32(temperature, dtype):
    anchors, pool = (functional.normalize(random_rows(n, 64, seed=n)).to(dtype) for n in (16, 4096))
    weights = random_rows(16, seed=1)
    ours = with_gradients(lambda a, p: pool_logsumexp(a, p, temperature, 8, 16 * 4 * 100), anchors, pool, weights)
    dense = with_gradients(lambda a, p: dense_logsumexp(a, p, temperature, 8), anchors.double(), pool.double(), weights)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), dense[0], rtol=1e-5, atol=0)
    for x, y in zip(ours[1:], dense[1:], strict=True):
        rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-5 * float(y.abs().max()))


def test_anchor_alone_in_the_pool_has_no_sum_and_no_gradient():
    row = random_rows(1, 3).requires_grad_()
    log_sum = pool_logsumexp(row, row, 0.1, 0)
    assert log_sum.tolist() == [-torch.inf]
    assert torch.autograd.grad(log_sum, row, torch.ones(1, dtype=torch.float64))[0].tolist() == [[0, 0, 0]]


def test_positive_similarity_equals_the_masked_sum():
    anchors, pool = random_rows(NUM_ANCHORS, 4), random_rows(NUM_ROWS, 4, seed=1)
    labels = torch.arange(NUM_ROWS) ** 2 % 11
    own = labels[FIRST : FIRST + NUM_ANCHORS]
    mask = own[:, None] == labels[None]
    mask[range(NUM_ANCHORS), range(FIRST, FIRST + NUM_ANCHORS)] = False
    weights = random_rows(NUM_ANCHORS, seed=1)
    ours = with_gradients(lambda a, p: positive_similarity(a, own, p, labels, FIRST)[0], anchors, pool, weights)
    dense = with_gradients(lambda a, p: (a @ p.T * mask).sum(1), anchors, pool, weights)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert positive_similarity(anchors, own, pool, labels, FIRST)[1].tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_hardest_rows_equal_the_dense_ones_for_any_block(block_bytes):
    pool = random_rows(NUM_ROWS, 4)
    labels = torch.arange(NUM_ROWS) ** 2 % 11  # row 5 + 0 has class 3, ..., some classes have one row only
    anchors, own = pool[FIRST : FIRST + NUM_ANCHORS], labels[FIRST : FIRST + NUM_ANCHORS]
    positive, negative = hardest_rows(anchors, own, pool, labels, FIRST, block_bytes)
    for i in range(NUM_ANCHORS):
        distances = [float((anchors[i] - row).square().sum()) for row in pool]
        positives = [j for j in range(NUM_ROWS) if labels[j] == own[i] and j != FIRST + i]
        negatives = [j for j in range(NUM_ROWS) if labels[j] != own[i]]
        assert positive[i] == (max(positives, key=distances.__getitem__) if positives else -1)
        assert negative[i] == min(negatives, key=distances.__getitem__)


def test_hardest_rows_of_collapsed_embeddings_far_from_the_origin():
    # All rows within 0.01 of one point at distance 1,000: |p|^2 - 2ap alone would have lost every digit in float32.
    pool = (1000 + 0.01 * random_rows(200, 4)).float()
    labels = torch.arange(200) % 5
    positive, negative = hardest_rows(pool, labels, pool, labels, 0)
    distances = torch.cdist(pool.double(), pool.double(), compute_mode="donot_use_mm_for_euclid_dist")
    same = labels[:, None] == labels[None]
    found = distances[torch.arange(200), positive]
    assert same[torch.arange(200), positive].all() and not same[torch.arange(200), negative].any()
    torch.testing.assert_close(found, distances.masked_fill(~same, -1).amax(1), rtol=1e-4, atol=0)
    found = distances[torch.arange(200), negative]
    torch.testing.assert_close(found, distances.masked_fill(same, torch.inf).amin(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("loss", "setting"), [(supervised_contrastive, 0.1), (batch_hard_triplet, 0.2)])
def test_memory_is_linear_in_the_pool(loss, setting, monkeypatch):
    monkeypatch.setitem(pairwise_contrastive.CHUNK_BYTES, "cpu", 1 << 20)
    num_anchors, dim = 256, 8

    def step(num_rows):
        rows = functional.normalize(random_rows(num_rows, dim, dtype=torch.float32)).requires_grad_()
        labels = torch.arange(num_rows) % 10
        anchors = rows[:num_anchors].detach().requires_grad_()

        def run():
            loss(anchors, labels[:num_anchors], Pool(rows, labels, 0), setting).total.backward()

        return run

    def dense(num_rows):
        return lambda: torch.randn(num_anchors, num_rows).exp().sum()

    small, large = 2**14, 2**16
    matrix_bytes = {n: 4 * num_anchors * n for n in (small, large)}
    assert allocator_extra_bytes(dense(small)) >= 2 * matrix_bytes[small]  # the meter sees what it has to see
    peaks = {n: allocator_extra_bytes(step(n)) for n in (small, large)}
    assert peaks[large] < matrix_bytes[large] / 5
    # Growth a row: the gradient of the pool and few arrays of its size, not num_anchors numbers.
    assert (peaks[large] - peaks[small]) / (large - small) < 4 * 4 * dim
