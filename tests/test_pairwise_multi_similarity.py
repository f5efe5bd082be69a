"""Multi-similarity sums against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.pairs import EACH_BLOCK, LABELS, NUM_ROWS, PLACES, cut_pool, pairs, pool_of, random_rows, with_gradients
from trainer.pairwise import multi_similarity_sums


def loop_multi_similarity(anchors, pool, labels, first, scales, base, epsilon):
    """Differentiable, pair by pair; the plain sums of the paper."""
    logs, counts = [[], []], [[], []]
    for i in range(len(anchors)):
        similarity = [anchors[i] @ row for row in pool]
        value = [float(x.detach()) for x in similarity]
        positives, negatives = pairs(i, labels, first)
        least = min((value[j] for j in positives), default=math.inf)
        largest = max((value[j] for j in negatives), default=-math.inf)
        mined = [
            [j for j in positives if value[j] < largest + epsilon and negatives],
            [j for j in negatives if value[j] > least - epsilon and positives],
        ]
        for kind, slope in enumerate((-scales[0], scales[1])):
            terms = [torch.exp(slope * (similarity[j] - base)) for j in mined[kind]]
            logs[kind].append(torch.log(1 + sum(terms, torch.zeros((), dtype=pool.dtype))))
            counts[kind].append(len(mined[kind]))
    return torch.stack([torch.stack(logs[0]), torch.stack(logs[1])]), counts


SETTINGS = [((2.0, 50.0), 0.5, 0.1), ((5.0, 3.0), 0.0, 0.0), ((1.0, 1.0), 1.0, math.inf)]


@EACH_BLOCK
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_multi_similarity_equals_a_loop(num_anchors, first, settings, block, monkeypatch):
    cut_pool(monkeypatch, block)
    pool = pool_of()
    anchors, own = pool[first : first + num_anchors], LABELS[first : first + num_anchors]
    weights = random_rows(2, num_anchors, seed=1)

    def ours(a, p):
        return torch.stack(multi_similarity_sums(a, own, p, LABELS, first, *settings)[:2])

    def loop(a, p):
        return loop_multi_similarity(a, p, LABELS, first, *settings)[0]

    for x, y in zip(
        with_gradients(ours, anchors, pool, weights), with_gradients(loop, anchors, pool, weights), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    counts = multi_similarity_sums(anchors, own, pool, LABELS, first, *settings)[2]
    assert counts.tolist() == loop_multi_similarity(anchors, pool, LABELS, first, *settings)[1]
    assert counts.sum() > 0 or num_anchors == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_similarity_accumulates_in_float32(dtype):
    pool, labels = functional.normalize(random_rows(4096, 64)).to(dtype), torch.arange(4096) % 10
    weights = random_rows(2, 16, seed=1)
    results = []
    for rows in (pool, pool.double()):
        results.append(
            with_gradients(
                lambda a, p: torch.stack(multi_similarity_sums(a, labels[8:24], p, labels, 8, (2, 50), 0.5, 0.1)[:2]),
                rows[8:24],
                rows,
                weights,
            )
        )
    assert [x.dtype for x in results[0]] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=1e-5, atol=0)
    for x, y in zip(results[0][1:], results[1][1:], strict=True):
        rounding = 2**-8 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(x.double(), y, rtol=rounding, atol=1e-5 * float(y.abs().max()))


def test_multi_similarity_of_raw_embeddings_does_not_overflow():
    pool = 100 * pool_of(torch.float32)
    log_positive, log_negative, _ = multi_similarity_sums(pool, LABELS, pool, LABELS, 0, (2.0, 50.0), 0.5, 0.1)
    expected = multi_similarity_sums(pool.double(), LABELS, pool.double(), LABELS, 0, (2.0, 50.0), 0.5, 0.1)
    assert log_negative.max() > 1e5
    torch.testing.assert_close(log_positive.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_negative.double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [torch.zeros(NUM_ROWS, dtype=torch.int64), torch.arange(NUM_ROWS)])
@pytest.mark.parametrize("epsilon", [0.1, math.inf])
def test_multi_similarity_without_one_kind_of_pair_is_zero(labels, epsilon):
    pool = pool_of().requires_grad_()
    *logs, counts = multi_similarity_sums(pool, labels, pool, labels, 0, (2.0, 50.0), 0.5, epsilon)
    assert counts.sum() == 0 and all(log.abs().max() == 0 for log in logs)
    assert torch.autograd.grad(sum(logs).sum(), pool)[0].abs().max() == 0
