"""The blockwise functions: log-sum-exp against the dense computation, and what all of them keep to."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from benchmarks.common import allocator_extra_bytes
from tests.pairs import EACH_BLOCK, LABELS, NUM_ROWS, cut_pool, pool_of, random_rows, with_gradients
from trainer import pairwise_blocks, pairwise_contrastive
from trainer.losses.base import Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.supervised_contrastive import supervised_contrastive
from trainer.pairwise import (
    all_triplet_sums,
    contrastive_total,
    hardest_rows,
    multi_similarity_sums,
    pool_logsumexp,
    positive_similarity,
    semi_hard_rows,
)


def dense_logsumexp(anchors, pool, temperature, first):
    similarity = anchors @ pool.T / temperature
    own = torch.zeros(similarity.shape, dtype=torch.bool)
    own[range(len(anchors)), range(first, first + len(anchors))] = True
    return similarity.masked_fill(own, -torch.inf).logsumexp(1)


# Largest similarity / T about 3 (no shift), 40 (shift) and 40,000 (only right with the running maximum).
@pytest.mark.parametrize("temperature", [1.0, 0.02, 2e-5])
@pytest.mark.parametrize("block_bytes", [8 * 7 * rows for rows in (1, 4, 5, 22, 23, 100)])
def test_logsumexp_equals_the_dense_one_for_any_block(temperature, block_bytes):
    anchors, pool = (functional.normalize(random_rows(n, 4, seed=n)) for n in (7, NUM_ROWS))
    weights = random_rows(7, seed=1)
    ours = with_gradients(lambda a, p: pool_logsumexp(a, p, temperature, 5, block_bytes), anchors, pool, weights)
    dense = with_gradients(lambda a, p: dense_logsumexp(a, p, temperature, 5), anchors, pool, weights)
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
    anchors, pool = random_rows(7, 4), random_rows(NUM_ROWS, 4, seed=1)
    labels = torch.arange(NUM_ROWS) ** 2 % 11
    own = labels[5:12]
    mask = own[:, None] == labels[None]
    mask[range(7), range(5, 12)] = False
    weights = random_rows(7, seed=1)
    ours = with_gradients(lambda a, p: positive_similarity(a, own, p, labels, 5)[0], anchors, pool, weights)
    dense = with_gradients(lambda a, p: (a @ p.T * mask).sum(1), anchors, pool, weights)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    assert positive_similarity(anchors, own, pool, labels, 5)[1].tolist() == mask.sum(1).tolist()


@EACH_BLOCK
@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_row_bias_equals_the_dense_sum(temperature, block, monkeypatch):
    cut_pool(monkeypatch, block)
    pool, bias = pool_of(), random_rows(NUM_ROWS, seed=9)
    bias[[2, 13]] = -torch.inf  # left out
    weights = random_rows(7, seed=1)

    def dense(a, p):
        similarity = a @ p.T / temperature + bias
        similarity[range(7), range(5, 12)] = -torch.inf
        return similarity.logsumexp(1)

    ours = with_gradients(lambda a, p: pool_logsumexp(a, p, temperature, 5, row_bias=bias), pool[5:12], pool, weights)
    for x, y in zip(ours, with_gradients(dense, pool[5:12], pool, weights), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_class_averaged_denominator():
    # log sum_c 1/n_c sum_{a in c, a != i} exp(s_ia / T), the denominator of balanced contrastive learning.
    pool, counts = pool_of(), torch.bincount(LABELS)
    ours = pool_logsumexp(pool[5:12], pool, 0.1, 5, row_bias=-counts[LABELS].double().log())
    for i in range(7):
        means = sum(
            math.exp(float(pool[5 + i] @ pool[j]) / 0.1) / int(counts[LABELS[j]]) for j in range(23) if j != 5 + i
        )
        assert float(ours[i]) == pytest.approx(math.log(means), rel=1e-10)


def test_a_bias_for_each_row():
    with pytest.raises(ValueError, match=r"row_bias has shape \(22,\): the pool's 23 rows need one number each"):
        pool_logsumexp(pool_of()[:2], pool_of(), 0.1, 0, row_bias=torch.zeros(22))


def test_sums_pass_gradcheck():
    pool, labels = random_rows(9, 3), torch.tensor([0, 1, 2, 0, 1, 0, 2, 1, 0])
    anchors, own = pool[2:6].clone().requires_grad_(), labels[2:6]
    bias = random_rows(9, seed=5).requires_grad_()
    pool.requires_grad_()
    functions = [
        lambda a, p: all_triplet_sums(a, own, p, labels, 2, 0.3)[0],
        lambda a, p: multi_similarity_sums(a, own, p, labels, 2, (2.0, 5.0), 0.5, 0.4)[:2],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, (anchors, pool))
        assert torch.autograd.gradcheck(lambda p, f=function: f(anchors.detach(), p), (pool,))
        assert torch.autograd.gradcheck(lambda a, f=function: f(a, pool.detach()), (anchors,))
    for temperature in (0.5, 0.01):  # without and with a running maximum
        assert torch.autograd.gradcheck(
            lambda a, p, b, t=temperature: t * pool_logsumexp(a, p, t, 2, 64, b), (anchors, pool, bias)
        )


def test_nan_reaches_every_sum():
    pool = pool_of()
    pool[20] = torch.nan
    clean = LABELS[20] != LABELS  # anchors for which row 20 is a negative
    assert pool_logsumexp(pool, pool, 0.1, 0).isnan().all()
    assert all_triplet_sums(pool, LABELS, pool, LABELS, 0, 0.2)[0].isnan().all()
    assert multi_similarity_sums(pool, LABELS, pool, LABELS, 0, (2.0, 50.0), 0.5, 0.1)[1][clean].isnan().all()


@pytest.mark.parametrize("block_rows", [1, 10])
def test_one_anchor_for_no_gradient_to_the_pool(block_rows, monkeypatch):
    """Memory rows carry no gradient; the anchors' part must be the same with and without the pool's."""
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 8 * 7 * block_rows)
    pool = pool_of()
    for function in (
        lambda a, p: all_triplet_sums(a, LABELS[5:12], p, LABELS, 5, 0.2)[0],
        lambda a, p: multi_similarity_sums(a, LABELS[5:12], p, LABELS, 5, (2.0, 50.0), 0.5, 0.1)[1],
        lambda a, p: pool_logsumexp(a, p, 0.1, 5),
    ):
        both = with_gradients(function, pool[5:12], pool, torch.ones(7))
        anchors = pool[5:12].clone().requires_grad_()
        alone = torch.autograd.grad(function(anchors, pool).sum(), anchors)[0]
        torch.testing.assert_close(alone, both[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("anchors", "first", "message"),
    [
        (torch.zeros(2, 4), 0, "anchors are torch.float32 but the pool is torch.float64: both must have one dtype"),
        (torch.zeros(2, 4, dtype=torch.float64, device="meta"), 0, "anchors are on meta but the pool is on cpu"),
        (torch.zeros(2, 3, dtype=torch.float64), 0, "anchors have 3 columns but the pool has 4"),
        (torch.zeros(2, 4, dtype=torch.float64), 22, "first = 22 with 2 anchors reaches out of a pool of 23 rows"),
        (torch.zeros(2, 4, dtype=torch.float64), -1, "first = -1 with 2 anchors reaches out of a pool of 23 rows"),
    ],
)
def test_anchors_must_be_rows_of_the_pool(anchors, first, message):
    labels = torch.zeros(2, dtype=torch.int64)
    for function in (
        lambda: pool_logsumexp(anchors, pool_of(), 0.1, first),
        lambda: positive_similarity(anchors, labels, pool_of(), LABELS, first),
        lambda: contrastive_total(anchors, labels, pool_of(), LABELS, 0.1, first),
        lambda: hardest_rows(anchors, labels, pool_of(), LABELS, first),
        lambda: semi_hard_rows(anchors, labels, pool_of(), LABELS, labels, first),
        lambda: multi_similarity_sums(anchors, labels, pool_of(), LABELS, first, (2.0, 50.0), 0.5, 0.1),
        lambda: all_triplet_sums(anchors, labels, pool_of(), LABELS, first, 0.2),
    ):
        with pytest.raises(ValueError, match=message):
            function()


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
