"""W real gloo processes give the gradient of one process that holds the global batch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.gloo import run_gloo
from trainer.config import LossConfig
from trainer.losses import METRIC_LOSSES
from trainer.losses.base import LossSum
from trainer.losses.classification import cross_entropy
from trainer.pool import Pool, gather_pool, global_mean

IN_DIM, NUM_CLASSES = 5, 4
EVEN = {2: (6, 6), 3: (4, 4, 4)}
UNEVEN = {2: (3, 9), 3: (5, 0, 7)}  # a rank without any sample takes part too
LOSSES = ["supervised_contrastive", "batch_hard_triplet", "cross_entropy"]


class TinyModel(nn.Module):
    """Linear-ReLU-Linear, embeddings on the unit sphere, and a classifier."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(IN_DIM, 8), nn.ReLU(), nn.Linear(8, 3))
        self.classifier = nn.Linear(3, NUM_CLASSES)

    def forward(self, images):
        raw = self.head(images)
        return nn.functional.normalize(raw, dim=1), self.classifier(raw)


def global_batch(dtype):
    """12 samples; class 3 occurs once, so that one anchor has no positive on any rank."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, IN_DIM, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 2, 3])


def loss_of(name, model, images, labels, gather=gather_pool, mean=global_mean):
    embeddings, logits = model(images)
    if name == "cross_entropy":
        return mean(cross_entropy(logits, labels))
    # A large margin keeps most triplets active.
    return mean(METRIC_LOSSES[name](embeddings, labels, gather(embeddings, labels), LossConfig(name=name, margin=0.7)))


def local_pool(embeddings, labels):
    return Pool(embeddings, labels, 0)


def detached_pool(embeddings, labels):
    """The gather that libraries get wrong: other ranks' rows are there, but without their gradient."""
    pool = gather_pool(embeddings.detach(), labels)
    rows = torch.cat([pool.embeddings[: pool.first], embeddings, pool.embeddings[pool.first + len(embeddings) :]])
    return Pool(rows, pool.labels, pool.first)


def rank_mean(loss):
    return loss.total / max(loss.count, 1)


GATHERS = {"ours": gather_pool, "local": local_pool, "detached": detached_pool}
MEANS = {"ours": global_mean, "rank": rank_mean}


def step(rank, world, name, sizes, dtype, gather="ours", mean="ours"):
    """One rank's step -> (average over ranks of the scalar, gradients averaged over ranks as an engine does)."""
    torch.manual_seed(0)
    model = TinyModel().to(dtype)
    images, labels = (x.split(sizes)[rank] for x in global_batch(dtype))
    loss = loss_of(name, model, images, labels, GATHERS[gather], MEANS[mean])
    loss.backward()
    flat = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    result = torch.cat([loss.detach().reshape(1), *(g.flatten() for g in flat)])
    dist.all_reduce(result)
    return result / world


def one_process(name, dtype):
    """The same without a process group, on the whole batch."""
    torch.manual_seed(0)
    model = TinyModel().to(dtype)
    loss = loss_of(name, model, *global_batch(dtype))
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([loss.detach().reshape(1), *(g.flatten() for g in grads)])


def all_steps(rank, world, cases):
    return [step(rank, world, *case) for case in cases]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_gradient_of_one_process(world):
    cases = [
        (name, sizes, dtype)
        for name in LOSSES
        for sizes in (EVEN[world], UNEVEN[world])
        for dtype in (torch.float64, torch.float32)
    ]
    for rank_results in run_gloo(all_steps, world, cases):
        for (name, sizes, dtype), result in zip(cases, rank_results, strict=True):
            expected = one_process(name, dtype)
            assert expected[1:].abs().max() > 1e-3
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            error = (result - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name} {sizes} {dtype}: {error}"


def test_wrong_ways_to_gather_or_to_average_differ():
    # The proof above can fail: each of these must, or it would not be able to tell.
    wrong = [
        (name, UNEVEN[2], torch.float64, gather, mean)
        for name in LOSSES[:2]
        for gather, mean in (("local", "ours"), ("detached", "ours"), ("ours", "rank"))
    ] + [("cross_entropy", UNEVEN[2], torch.float64, "ours", "rank")]
    for case, result in zip(wrong, run_gloo(all_steps, 2, wrong)[0], strict=True):
        expected = one_process(case[0], torch.float64)
        assert (result - expected)[1:].abs().max() > 1e-3 * expected[1:].abs().max(), case


def gather_rows(rank, world, sizes, dtype):
    begin = sum(sizes[:rank])
    rows = torch.arange(begin, begin + sizes[rank], dtype=dtype)[:, None].repeat(1, 2).requires_grad_()
    pool = gather_pool(rows, torch.arange(begin, begin + sizes[rank]) * 10)
    # Rank r's loss gives pool row j the gradient (r + 1) * j: own rows must receive the sum over ranks.
    (pool.embeddings * torch.arange(sum(sizes))[:, None] * (rank + 1)).sum().backward()
    return pool.embeddings.detach(), pool.labels, pool.first, rows.grad


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_is_in_rank_order_and_its_gradient_is_summed_over_ranks(sizes, dtype):
    results = run_gloo(gather_rows, len(sizes), sizes, dtype)
    begin = 0
    for (rows, labels, first, grad), size in zip(results, sizes, strict=True):
        assert rows.dtype == dtype
        assert rows[:, 0].tolist() == list(range(sum(sizes)))
        assert labels.tolist() == [10 * i for i in range(sum(sizes))]
        assert first == begin
        ranks_sum = sum(range(1, len(sizes) + 1))
        assert grad[:, 1].tolist() == [ranks_sum * j for j in range(begin, begin + size)]
        begin += size


def bf16_sum(rank, world):
    rows = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    pool = gather_pool(rows, torch.zeros(1, dtype=torch.int64))
    # 256 + 1 + 1: bf16 has 8 bits, so 256 + 1 rounds back to 256 when the sum is made in bf16.
    (pool.embeddings * (256.0 if rank == 0 else 1.0)).sum().backward()
    return float(rows.grad)


def test_bf16_gradients_are_summed_over_ranks_in_float32():
    assert run_gloo(bf16_sum, 3) == [258.0] * 3


def nothing_valid(rank, world, name):
    """All labels differ: no anchor has a positive."""
    rows = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([2 * rank, 2 * rank + 1])
    loss = loss_of(name, lambda x: (x, None), rows, labels)
    loss.backward()
    return float(loss.detach()), rows.grad


@pytest.mark.parametrize("name", LOSSES[:2])
def test_loss_without_any_valid_anchor_is_zero_with_a_graph(name):
    for loss, grad in run_gloo(nothing_valid, 2, name):
        assert loss == 0
        assert torch.equal(grad, torch.zeros(2, 3, dtype=torch.float64))


def test_one_process_needs_no_process_group():
    rows, labels = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 0])
    pool = gather_pool(rows, labels)
    assert pool.embeddings is rows and pool.labels is labels and pool.first == 0
    total = rows.sum()
    assert float(global_mean(LossSum(total, 4, labels[:0])).detach()) == pytest.approx(float(total.detach()) / 4)


def failing(rank, world, dies):
    if rank == 1:
        if dies:
            os._exit(1)
        raise KeyError("the reason")
    dist.barrier()


def test_a_failing_rank_fails_the_call_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*KeyError: 'the reason'"):
        run_gloo(failing, 2, False)
    with pytest.raises(AssertionError, match=r"rank 1 failed:\nit died without a word"):
        run_gloo(failing, 2, True)
