"""Semi-hard rows, multi-similarity and all-triplet sums against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.test_pairwise import random_rows, with_gradients
from trainer import pairwise_blocks, pairwise_contrastive
from trainer.pairwise import (
    all_triplet_sums,
    contrastive_total,
    hardest_rows,
    multi_similarity_sums,
    pool_logsumexp,
    semi_hard_rows,
)

NUM_ROWS, DIM = 23, 4
# Number and first row of the anchors; the pool's other rows are another rank's or a memory's.
PLACES = [(7, 0), (7, 5), (7, 16), (23, 0), (1, 22)]
LABELS = torch.arange(NUM_ROWS) ** 2 % 11  # some classes have one row


@pytest.fixture(params=[1, 5, 22, 100], ids=lambda rows: f"{rows}-rows")
def block(request, monkeypatch):
    """Blocks of one row, of sizes that do not divide 23, and the whole pool in one."""
    monkeypatch.setattr(pairwise_blocks, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 8 * 7 * request.param)


def pool_of(dtype=torch.float64, seed=3):
    return functional.normalize(random_rows(NUM_ROWS, DIM, seed=seed)).to(dtype)


def pairs(i, labels, first):
    others = [j for j in range(len(labels)) if j != first + i]
    positives = [j for j in others if labels[j] == labels[first + i]]
    return positives, [j for j in others if labels[j] != labels[first + i]]


# --- semi-hard


def loop_semi_hard(anchors, pool, labels, positive_rows, first):
    found = []
    for i, anchor in enumerate(anchors.double()):
        away = [float((anchor - row).square().sum()) for row in pool.double()]
        farther = [j for j in pairs(i, labels, first)[1] if away[j] > away[positive_rows[i]] + 1e-9]
        found.append(min(farther, key=away.__getitem__) if farther and positive_rows[i] >= 0 else -1)
    return found


@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_semi_hard_rows_equal_a_loop(num_anchors, first, block):
    pool = pool_of()
    anchors, own = pool[first : first + num_anchors], LABELS[first : first + num_anchors]
    positive_rows, _ = hardest_rows(anchors, own, pool, LABELS, first)
    nearest = torch.tensor([min(pairs(i, LABELS, first)[0], default=-1) for i in range(num_anchors)])
    for rows in (positive_rows, nearest):
        expected = loop_semi_hard(anchors, pool, LABELS, rows, first)
        assert semi_hard_rows(anchors, own, pool, LABELS, rows, first).tolist() == expected


def test_a_negative_as_far_as_the_positive_is_not_farther():
    # Random directions: the equal distances are rounded sums. Rows 3.. are negatives: at the positive's place, at its
    # mirror image (equally far), nearer, and one that is farther by 1 %.
    for seed in range(20):
        for dtype in (torch.float32, torch.float64):
            anchor, step = random_rows(2, 64, seed=seed)
            pool = torch.stack(
                [anchor, anchor + step, anchor, anchor + step, anchor - step, anchor + step / 2, anchor + 1.01 * step]
            ).to(dtype)
            labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
            found = semi_hard_rows(pool[:1], labels[:1], pool, labels, torch.tensor([1]), 0)
            assert found.tolist() == [6]
            assert semi_hard_rows(pool[:1], labels[:1], pool[:6], labels[:6], torch.tensor([1]), 0).tolist() == [-1]


def test_semi_hard_rows_let_nan_through_and_take_no_anchor():
    pool = pool_of()
    pool[20] = torch.nan
    positive_rows, _ = hardest_rows(pool[:7], LABELS[:7], pool, LABELS, 0)
    rows = semi_hard_rows(pool[:7], LABELS[:7], pool, LABELS, positive_rows, 0)
    assert all(row == 20 for row, label in zip(rows, LABELS[:7], strict=True) if label != LABELS[20])
    assert semi_hard_rows(pool[:0], LABELS[:0], pool, LABELS, positive_rows[:0], 0).tolist() == []


# --- multi-similarity


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


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_multi_similarity_equals_a_loop(num_anchors, first, settings, block):
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


# --- all triplets


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


@pytest.mark.parametrize("margin", [0.2, 0.0, 5.0])
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_all_triplets_equal_a_loop(num_anchors, first, margin, block):
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


# --- of all


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


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_row_bias_equals_the_dense_sum(temperature, block):
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
        lambda: hardest_rows(anchors, labels, pool_of(), LABELS, first),
        lambda: semi_hard_rows(anchors, labels, pool_of(), LABELS, labels, first),
        lambda: multi_similarity_sums(anchors, labels, pool_of(), LABELS, first, (2.0, 50.0), 0.5, 0.1),
        lambda: all_triplet_sums(anchors, labels, pool_of(), LABELS, first, 0.2),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_a_bias_for_each_row():
    with pytest.raises(ValueError, match=r"row_bias has shape \(22,\): the pool's 23 rows need one number each"):
        pool_logsumexp(pool_of()[:2], pool_of(), 0.1, 0, row_bias=torch.zeros(22))


# --- supervised contrastive


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
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.02, 2e-5])
@pytest.mark.parametrize(("num_anchors", "first"), PLACES)
def test_contrastive_total_equals_the_dense_one(num_anchors, first, temperature, chunk, block, monkeypatch):
    monkeypatch.setitem(pairwise_contrastive.CHUNK_BYTES, "cpu", 8 * NUM_ROWS * chunk)
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
