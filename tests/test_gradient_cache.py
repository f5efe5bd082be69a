"""Gradient caching: micro-batches with one loss over all of them give the gradient of the one big batch."""

from __future__ import annotations

import itertools
import weakref
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.gloo import run_gloo
from tests.losses import DIM, LABELS, METRIC_CASES, NUM_CLASSES, build, mean_over_ranks
from trainer.batch_norm import statistics_held, synchronise_batch_norm
from trainer.gradient_cache import cached_forward
from trainer.losses.classification import cross_entropy
from trainer.pool import gather_pool

IN_DIM = 5
UNEVEN = {2: (4, 8), 3: (3, 2, 7)}


class TwoOutputs(NamedTuple):
    embeddings: Tensor
    logits: Tensor


class TinyModel(nn.Module):
    """Embeddings on the unit sphere or raw, logits, and the metric loss's own parameters."""

    def __init__(self, name="supervised_contrastive", norm=nn.Identity, drop_rate=0.0):
        super().__init__()
        config, self.progress = METRIC_CASES[name]
        self.normalise = config.normalise
        self.head = nn.Sequential(
            nn.Linear(IN_DIM, 8), norm(), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(8, DIM)
        ).double()
        self.classifier = nn.Linear(DIM, NUM_CLASSES).double()
        self.metric_loss = build(config)

    def forward(self, images):
        raw = self.head(images)
        embeddings = nn.functional.normalize(raw, dim=1) if self.normalise else 3 * raw
        return TwoOutputs(embeddings, self.classifier(raw))

    def loss(self, output, labels):
        pool = gather_pool(output.embeddings, labels)
        metric = mean_over_ranks(self.metric_loss(output.embeddings, labels, pool, self.progress))
        return mean_over_ranks(cross_entropy(output.logits, labels)) + 0.5 * metric


def images_of(sizes=(12,), rank=0):
    images = torch.randn(12, IN_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.split(sizes)[rank], LABELS.split(sizes)[rank]


def new_model(*args, **kwargs):
    torch.manual_seed(0)
    return TinyModel(*args, **kwargs)


def in_micro_batches(model, images, labels, size, forward=None):
    """-> loss, and how often backward was called and with which last flags; gradients are in the parameters."""
    flags = []

    def backward(scalar, last):
        flags.append(last)
        scalar.backward()

    cached = cached_forward(forward or model, images, size, model)
    loss = model.loss(cached.output, labels)
    cached.backward(loss, backward, list(model.metric_loss.parameters()))
    return loss.detach(), flags


def gradient(model):
    """Network, and the loss's own parameters: each is measured against its own size."""
    parts = {"network": [*model.head.parameters(), *model.classifier.parameters()]}
    parts |= {"own": list(model.metric_loss.parameters())} if list(model.metric_loss.parameters()) else {}
    return {
        key: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
        for key, parameters in parts.items()
    }


def largest_error(result, expected):
    assert result.keys() == expected.keys()
    return max(float((result[key] - e).abs().max() / e.abs().max()) for key, e in expected.items())


@cache
def of_one_batch(name):
    model = new_model(name)
    images, labels = images_of()
    loss = model.loss(model(images), labels)
    loss.backward()
    return {"loss": loss.detach()[None], **gradient(model)}


# --- the one big batch


@pytest.mark.parametrize("size", [1, 5, 7, 11])
@pytest.mark.parametrize("name", METRIC_CASES)
def test_micro_batches_give_the_gradient_of_the_big_one(name, size):
    model = new_model(name)
    loss, flags = in_micro_batches(model, *images_of(), size)
    assert largest_error({"loss": loss[None], **gradient(model)}, of_one_batch(name)) < 1e-9
    assert flags == [False] * (-(-12 // size) - 1) + [True]


def test_accumulating_each_micro_batchs_own_loss_differs():
    model = new_model()
    images, labels = images_of()
    for part, part_labels in zip(images.tensor_split(3), labels.tensor_split(3), strict=True):
        (model.loss(model(part), part_labels) / 3).backward()
    expected = of_one_batch("supervised_contrastive")
    assert largest_error(gradient(model), {"network": expected["network"]}) > 1e-2


def train_ranks(rank, world, cases):
    results = []
    for name, size in cases:
        model = new_model(name)
        loss, flags = in_micro_batches(model, *images_of(UNEVEN[world], rank), size)
        result = {"loss": loss[None], **gradient(model)}
        for value in result.values():
            dist.all_reduce(value)
        results.append(({key: value / world for key, value in result.items()}, len(flags)))  # as the engine does
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_micro_batches_on_ranks_give_the_gradient_of_one_big_batch(world):
    cases = list(itertools.product(METRIC_CASES, (4, 7)))
    for (name, size), *ranks in zip(cases, *run_gloo(train_ranks, world, cases), strict=True):
        for result, passes in ranks:
            assert largest_error(result, of_one_batch(name)) < 1e-9, (name, size)
            # All ranks do as many, since each backward may be a collective.
            assert passes == -(-max(UNEVEN[world]) // size)


# --- memory


def test_one_micro_batch_at_a_time_has_a_graph():
    model, seen = new_model(), []

    def forward(part):
        assert not any(graph() for graph, grad_enabled in seen if grad_enabled)  # the one before is gone
        output = model(part)
        seen.append((weakref.ref(output.logits), torch.is_grad_enabled()))
        assert len(part) <= 5 and output.logits.requires_grad == torch.is_grad_enabled()
        return output

    in_micro_batches(model, *images_of(), 5, forward)
    assert [grad_enabled for _, grad_enabled in seen] == [False] * 3 + [True] * 3


def test_a_batch_that_fits_is_computed_once():
    model, calls = new_model(), []
    loss, flags = in_micro_batches(model, *images_of(), 12, lambda part: calls.append(len(part)) or model(part))
    assert (calls, flags) == ([12], [True])
    assert largest_error({"loss": loss[None], **gradient(model)}, of_one_batch("supervised_contrastive")) == 0


# --- dropout


def test_dropout_masks_are_equal_in_both_passes_and_differ_between_micro_batches_and_steps():
    weight, masks = torch.ones(64, requires_grad=True), []

    def forward(part):
        masks.append(nn.functional.dropout(torch.ones(len(part), 64)))
        return (masks[-1] * weight,)

    for _ in range(2):
        cached = cached_forward(forward, torch.ones(12, 1), 5, nn.Identity())
        cached.backward(cached.output[0].sum(), lambda scalar, last: scalar.backward())
    passes = [torch.cat(masks[begin : begin + 3]) for begin in range(0, 12, 3)]
    assert passes[0].equal(passes[1]) and passes[2].equal(passes[3])
    assert len(torch.cat(passes).unique(dim=0)) == 24


def test_gradient_under_dropout_is_that_of_one_batch_with_these_masks():
    model = new_model(drop_rate=0.5)
    images, labels = images_of()
    torch.manual_seed(5)
    in_micro_batches(model, images, labels, 5)
    result = gradient(model)
    model.zero_grad()
    torch.manual_seed(5)
    parts = []
    for part, seed in zip(images.tensor_split(3), torch.randint(2**62, (3,)).tolist(), strict=True):
        torch.manual_seed(seed)
        parts.append(model(part))
    model.loss(TwoOutputs(*map(torch.cat, zip(*parts, strict=True))), labels).backward()
    assert largest_error(result, gradient(model)) < 1e-9


# --- batch norm


def norm():
    return nn.BatchNorm1d(8)


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


def test_batch_norm_is_that_of_the_micro_batches_and_its_statistics_take_each_in_once():
    model, plain = new_model(norm=norm), new_model(norm=norm)
    images, labels = images_of()
    before = statistics(model)
    cached = cached_forward(model, images, 5, model)
    assert all(a.equal(b) for a, b in zip(statistics(model), before, strict=True))  # the first pass leaves them alone
    cached.backward(model.loss(cached.output, labels), lambda scalar, last: scalar.backward())

    output = TwoOutputs(*map(torch.cat, zip(*[plain(part) for part in images.tensor_split(3)], strict=True)))
    plain.loss(output, labels).backward()
    assert largest_error(gradient(model), gradient(plain)) < 1e-9
    assert all(a.equal(b) for a, b in zip(statistics(model), statistics(plain), strict=True))
    assert int(model.head[1].num_batches_tracked) == 3

    whole = new_model(norm=norm)
    whole.loss(whole(images), labels).backward()
    assert largest_error(gradient(model), gradient(whole)) > 1e-2  # as the module says: not the big batch's


def test_frozen_batch_norm_gives_the_gradient_of_the_big_batch():
    model, whole = (new_model(norm=norm) for _ in range(2))
    for each in (model, whole):
        each.head[1].eval()
    images, labels = images_of()
    in_micro_batches(model, images, labels, 5)
    whole.loss(whole(images), labels).backward()
    assert largest_error(gradient(model), gradient(whole)) < 1e-9


def synchronised(rank, world):
    """Micro-batch k of all ranks is one batch of batch norm; ranks have 4 and 8 images, 2 and 4 in each of two."""
    model = synchronise_batch_norm(new_model(norm=norm))
    in_micro_batches(model, *images_of((4, 8), rank), 4)
    flat = gradient(model)["network"]
    dist.all_reduce(flat)
    return {"network": flat / world}, statistics(model)


def test_synchronised_batch_norm_is_over_the_micro_batches_of_all_ranks():
    plain = new_model(norm=norm)
    images, labels = images_of()
    rows = [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]]
    parts = [plain(images[part]) for part in rows]
    back = torch.tensor([*rows[0], *rows[1]]).argsort()
    output = TwoOutputs(*(torch.cat(field)[back] for field in zip(*parts, strict=True)))
    plain.loss(output, labels).backward()
    for result, buffers in run_gloo(synchronised, 2):
        assert largest_error(result, gradient(plain)) < 1e-9
        for buffer, expected in zip(buffers, statistics(plain), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-9, atol=1e-12)


def test_checkpointed_activations_go_with_it():
    model, whole = new_model(norm=norm), new_model(norm=norm)
    images, labels = images_of()

    def forward(part):
        raw = torch.utils.checkpoint.checkpoint(model.head, part, use_reentrant=False)
        return TwoOutputs(nn.functional.normalize(raw, dim=1), model.classifier(raw))

    def backward(scalar, last):
        with statistics_held(model):  # they are computed a third time here
            scalar.backward()

    cached = cached_forward(forward, images, 6, model)
    cached.backward(model.loss(cached.output, labels), backward)
    output = TwoOutputs(*map(torch.cat, zip(*[whole(part) for part in images.tensor_split(2)], strict=True)))
    whole.loss(output, labels).backward()
    assert largest_error(gradient(model), gradient(whole)) < 1e-9
    assert all(a.equal(b) for a, b in zip(statistics(model), statistics(whole), strict=True))
