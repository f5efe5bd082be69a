"""W real gloo processes give the gradient of one process that holds the global batch, for every loss."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.gloo import run_gloo
from tests.losses import (
    CLASSIFICATION_CASES,
    CLASSIFICATION_LOSS_NAMES,
    COSINE_SCALE,
    COUNTS,
    DIM,
    LABELS,
    METRIC_CASES,
    METRIC_LOSS_NAMES,
    NUM_CLASSES,
    build,
    mean_over_ranks,
)
from trainer.config import MemoryConfig
from trainer.losses import build_classification_loss
from trainer.memory import CrossBatchMemory
from trainer.model import CosineLinear
from trainer.pool import Pool, gather_pool

IN_DIM = 5
CASES = [*METRIC_CASES, *CLASSIFICATION_CASES]
EVEN = {2: (6, 6), 3: (4, 4, 4)}
UNEVEN = {2: (3, 9), 3: (5, 0, 7)}  # a rank without any sample takes part too
MEMORY_ROWS = 20  # of batches of 12: the third step finds it full, part of a batch evicted
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


class TinyModel(nn.Module):
    """Linear-ReLU-Linear, embeddings on the unit sphere or raw, a classifier, and the loss's own parameters."""

    def __init__(self, name):
        super().__init__()
        config, self.progress = (METRIC_CASES | CLASSIFICATION_CASES)[name]
        self.normalise = getattr(config, "normalise", True)
        self.head = nn.Sequential(nn.Linear(IN_DIM, 8), nn.ReLU(), nn.Linear(8, DIM))
        self.classifier = CosineLinear(DIM, NUM_CLASSES, COSINE_SCALE)
        if name in METRIC_CASES:
            self.metric_loss = build(config)
        else:
            self.classification = build_classification_loss(config, COUNTS, COSINE_SCALE)

    def forward(self, images):
        raw = self.head(images)
        return nn.functional.normalize(raw, dim=1) if self.normalise else 3 * raw


def global_batch(step, dtype):
    """12 samples; class 3 occurs once, so that one anchor has no positive on any rank."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, IN_DIM, generator=generator, dtype=torch.float64).to(dtype), LABELS.roll(step)


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
MEANS = {"ours": mean_over_ranks, "rank": rank_mean}


def loss_of(model, images, labels, memory, gather="ours", mean="ours"):
    """-> the scalar for backward, and the gathered pool."""
    embeddings = model(images)
    if not hasattr(model, "metric_loss"):
        return MEANS[mean](model.classification(model.classifier(embeddings), labels, model.progress)), None
    gathered = GATHERS[gather](embeddings, labels)
    pool = memory.extend(gathered) if memory is not None else gathered
    return MEANS[mean](model.metric_loss(embeddings, labels, pool, model.progress)), gathered


def train(case, rank=0, average=lambda x: x):
    """A few steps of one rank; without memory only one. -> loss and gradients of the last step, in three parts or two.

    A part is a vector whose error is measured against its own size: what the loss has learnt must not hide behind the
    network. (The network's tensors are one part: a bias behind which a loss does not look has a gradient of noise.)
    """
    name, sizes, dtype, memory_rows, gather, mean = case
    torch.manual_seed(0)
    model = TinyModel(name).to(dtype)
    memory = CrossBatchMemory(MemoryConfig(rows=memory_rows, start_epoch=0), DIM, dtype) if memory_rows else None
    parameters = dict(model.named_parameters())
    num_own = sum(p.numel() for key, p in parameters.items() if key.startswith("metric_loss"))
    for step in range(3 if memory_rows else 1):
        images, labels = (x.split(sizes)[rank] for x in global_batch(step, dtype))
        loss, gathered = loss_of(model, images, labels, memory, gather, mean)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        flat = average(torch.cat([loss.detach()[None], *(grad.flatten() for grad in grads)]))
        for p, grad in zip(parameters.values(), flat[1:].split([p.numel() for p in parameters.values()]), strict=True):
            p.data -= 0.1 * grad.view_as(p)
        if memory is not None:
            memory.add(gathered, step + 1)
    network = flat[1 : len(flat) - num_own]
    return {"loss": flat[:1], "network": network} | ({"own": flat[len(flat) - num_own :]} if num_own else {})


def train_ranks(rank, world, cases):
    def average(x):  # as the engine does
        dist.all_reduce(x)
        return x / world

    return [train(case, rank, average) for case in cases]


@cache
def one_process(name, dtype, memory_rows):
    return train((name, (12,), dtype, memory_rows, "ours", "ours"))


@cache
def of_ranks(world):
    """All cases in one start of the processes. -> case -> result."""
    cuts = [(sizes, 0) for sizes in (EVEN[world], UNEVEN[world])]
    cases = [
        (name, sizes, dtype, memory_rows, "ours", "ours")
        for name, dtype in itertools.product(CASES, TOLERANCE)
        for sizes, memory_rows in [*cuts, *[(UNEVEN[world], MEMORY_ROWS)] * (name in METRIC_CASES)]
    ]
    results = run_gloo(train_ranks, world, cases)
    for case, *of_case in zip(cases, *results, strict=True):
        for key, value in of_case[0].items():
            assert all(value.equal(other[key]) for other in of_case), (case, key)
    return dict(zip(cases, results[0], strict=True))


def largest_error(result, expected):
    """Of the parts, each relative to its largest element."""
    assert result.keys() == expected.keys()
    return max(float((result[key] - e).abs().max() / e.abs().max()) for key, e in expected.items())


def test_every_loss_has_a_case():
    assert {config.name for config, _ in METRIC_CASES.values()} == set(METRIC_LOSS_NAMES)
    assert {config.name for config, _ in CLASSIFICATION_CASES.values()} == set(CLASSIFICATION_LOSS_NAMES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_gradient_of_one_process(world, name):
    cases = [case for case in of_ranks(world) if case[0] == name]
    assert len(cases) == (6 if name in METRIC_CASES else 4)
    for case in cases:
        _, _, dtype, memory_rows, _, _ = case
        expected = one_process(name, dtype, memory_rows)
        assert all(part.abs().max() > 1e-3 for part in expected.values())
        assert largest_error(of_ranks(world)[case], expected) < TOLERANCE[dtype], case


@pytest.mark.parametrize("name", METRIC_CASES)
def test_the_memory_takes_part(name):
    module = build(METRIC_CASES[name][0])
    torch.manual_seed(0)
    rows = nn.functional.normalize(torch.randn(20, DIM, dtype=torch.float64), dim=1)
    alone = Pool(rows[:12], LABELS, 0)
    memory = CrossBatchMemory(MemoryConfig(rows=8, start_epoch=0), DIM, torch.float64)
    memory.add(Pool(rows[12:], LABELS[:8], 0), 1.0)
    progress = METRIC_CASES[name][1]
    losses = [module(rows[:12], LABELS, pool, progress).total for pool in (alone, memory.extend(alone))]
    assert losses[0].equal(losses[1]) == (module.config.name == "centre")  # which looks at no pool


def test_losses_with_parameters_of_their_own_are_among_the_cases():
    learnt = {name for name in METRIC_CASES if "own" in one_process(name, torch.float64, 0)}
    assert learnt == {"balanced_contrastive", "centre", "centre, raw", "proxy_anchor", "proxy_anchor, paper"}


def wrong_cases():
    """What must not give the same, or the proof above could not tell."""
    first_cases = {config.name: (name, config) for name, (config, _) in reversed(METRIC_CASES.items())}
    for name, config in first_cases.values():
        if config.name != "centre":  # it looks at no pool
            yield name, 0, "local", "ours"
            yield name, 0, "detached", "ours"
            yield name, MEMORY_ROWS, "local", "ours"  # each rank remembers its own rows alone
        if config.name != "proxy_anchor":  # one term on each rank: the mean of means is the mean
            yield name, 0, "ours", "rank"
    for name in CLASSIFICATION_CASES:
        yield name, 0, "ours", "rank"


def test_wrong_ways_to_gather_or_to_average_differ():
    cases = [(name, UNEVEN[2], torch.float64, *rest) for name, *rest in wrong_cases()]
    for case, result in zip(cases, run_gloo(train_ranks, 2, cases)[0], strict=True):
        expected = one_process(case[0], torch.float64, case[3])
        assert largest_error({"network": result["network"]}, {"network": expected["network"]}) > 1e-3, case


def nothing_valid(rank, world):
    """All labels differ: no anchor has a positive, unless the loss brings one along."""
    results = {}
    for name in METRIC_CASES:
        module = build(METRIC_CASES[name][0])
        rows = nn.functional.normalize(torch.randn(2, DIM, dtype=torch.float64), dim=1).requires_grad_()
        labels = torch.tensor([2 * rank, 2 * rank + 1])
        loss = module(rows, labels, gather_pool(rows, labels), METRIC_CASES[name][1])
        mean_over_ranks(loss).backward()
        results[name] = (loss.count, float(loss.total.detach()), rows.grad)
    return results


def test_loss_without_any_valid_anchor_is_zero_with_a_graph():
    for results in run_gloo(nothing_valid, 2):
        nothing = [name for name, (count, _, _) in results.items() if count == 0]
        assert len(nothing) == len(METRIC_CASES) - 5  # those with centres, proxies and prototypes have terms
        for name in nothing:
            _, total, grad = results[name]
            assert total == 0, name
            assert torch.equal(grad, torch.zeros(2, DIM, dtype=torch.float64)), name
