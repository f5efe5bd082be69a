"""Each loss against a plain loop over its definition in float64: value, gradient, and which anchors are masked."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from trainer.config import LossConfig
from trainer.losses import METRIC_LOSSES
from trainer.losses.base import Pool
from trainer.losses.batch_hard_triplet import batch_hard_triplet
from trainer.losses.classification import cross_entropy
from trainer.losses.supervised_contrastive import supervised_contrastive

# Class 3 has a single row, class 7 is skipped, the anchors are rows 2 to 10 of the pool.
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 4, 0, 8, 8])
FIRST, LAST = 2, 10


def embeddings(seed=0, normalised=True, dtype=torch.float64):
    rows = torch.randn(len(LABELS), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (functional.normalize(rows, dim=1) if normalised else 3 * rows).to(dtype).requires_grad_()


def supervised_contrastive_loop(rows, labels, anchors, temperature):
    """Khosla et al. 2020, eq. 2, one exponential at a time."""
    total, count = rows.new_zeros(()), 0
    for i in anchors:
        positives = [p for p in range(len(rows)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        denominator = sum(torch.exp(rows[i] @ rows[a] / temperature) for a in range(len(rows)) if a != i)
        terms = [torch.log(torch.exp(rows[i] @ rows[p] / temperature) / denominator) for p in positives]
        total, count = total - sum(terms) / len(positives), count + 1
    return total, count


def batch_hard_triplet_loop(rows, labels, anchors, margin):
    """Hermans et al. 2017, eq. 5, one distance at a time."""
    total, count = rows.new_zeros(()), 0
    for i in anchors:
        others = [a for a in range(len(rows)) if a != i]
        positives = [torch.linalg.vector_norm(rows[i] - rows[p]) for p in others if labels[p] == labels[i]]
        negatives = [torch.linalg.vector_norm(rows[i] - rows[n]) for n in others if labels[n] != labels[i]]
        if not positives or not negatives:
            continue
        total, count = total + torch.relu(margin + max(positives) - min(negatives)), count + 1
    return total, count


CASES = [
    (supervised_contrastive, supervised_contrastive_loop, 0.1, True),
    (supervised_contrastive, supervised_contrastive_loop, 1.0, True),
    (supervised_contrastive, supervised_contrastive_loop, 0.02, True),  # the shifted path of the kernel
    (supervised_contrastive, supervised_contrastive_loop, 0.5, False),
    (batch_hard_triplet, batch_hard_triplet_loop, 0.2, True),
    (batch_hard_triplet, batch_hard_triplet_loop, 5.0, False),
    (batch_hard_triplet, batch_hard_triplet_loop, -0.5, True),
]


@pytest.mark.parametrize(("loss", "loop", "setting", "normalised"), CASES)
def test_loss_equals_the_plain_loop(loss, loop, setting, normalised):
    ours, plain = embeddings(normalised=normalised), embeddings(normalised=normalised)
    result = loss(ours[FIRST:LAST], LABELS[FIRST:LAST], Pool(ours, LABELS, FIRST), setting)
    total, count = loop(plain, LABELS, range(FIRST, LAST), setting)
    result.total.backward()
    total.backward()

    assert result.count == count == 7
    assert result.masked.tolist() == [3]
    assert result.total.shape == ()
    torch.testing.assert_close(result.total, total, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-10)
    assert plain.grad.abs().max() > 0.01


@pytest.mark.parametrize(("loss", "setting"), [(supervised_contrastive, 0.1), (batch_hard_triplet, 1.0)])
def test_gradient_passes_gradcheck(loss, setting):
    def of(rows):
        return loss(rows[FIRST:LAST], LABELS[FIRST:LAST], Pool(rows, LABELS, FIRST), setting).total

    assert torch.autograd.gradcheck(of, (embeddings(),))


@pytest.mark.parametrize(
    ("loss", "loop", "setting"),
    [(supervised_contrastive, supervised_contrastive_loop, 0.1), (batch_hard_triplet, batch_hard_triplet_loop, 0.5)],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_embeddings_are_computed_in_float32(loss, loop, setting, autocast):
    # The loop gets the same rounded embeddings in float64: what is left is the error of the computation alone.
    ours = embeddings(dtype=torch.bfloat16)
    plain = ours.detach().double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = loss(ours[FIRST:LAST], LABELS[FIRST:LAST], Pool(ours, LABELS, FIRST), setting).total
    result.backward()
    total, _ = loop(plain, LABELS, range(FIRST, LAST), setting)
    total.backward()

    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), total, rtol=1e-6, atol=0)
    assert ours.grad.dtype == torch.bfloat16
    # The gradient is rounded to bf16 (2^-9) where it leaves each of the two inputs.
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=2**-7, atol=2**-8 * float(plain.grad.abs().max()))


@pytest.mark.parametrize("name", list(METRIC_LOSSES))
def test_float32_under_autocast_stays_float32(name):
    rows, config = embeddings(dtype=torch.float32), LossConfig(name=name)
    pool = Pool(rows, LABELS, FIRST)
    expected = METRIC_LOSSES[name](rows[FIRST:LAST], LABELS[FIRST:LAST], pool, config).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = METRIC_LOSSES[name](rows[FIRST:LAST], LABELS[FIRST:LAST], pool, config).total
        gradient = torch.autograd.grad(total, rows)[0]
    assert torch.equal(total, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, rows)[0])


def test_configured_settings_reach_the_losses():
    rows = embeddings()
    pool = Pool(rows, LABELS, 0)
    config = LossConfig(name="supervised_contrastive", temperature=0.3)
    expected = supervised_contrastive(rows, LABELS, pool, 0.3)
    assert METRIC_LOSSES[config.name](rows, LABELS, pool, config).total.equal(expected.total)
    config = LossConfig(name="batch_hard_triplet", margin=0.7)
    expected = batch_hard_triplet(rows, LABELS, pool, 0.7)
    assert METRIC_LOSSES[config.name](rows, LABELS, pool, config).total.equal(expected.total)


@pytest.mark.parametrize(
    ("name", "labels", "masked"),
    [
        ("supervised_contrastive", [0, 1, 2, 3], [1, 1, 1, 1, 0]),
        ("batch_hard_triplet", [0, 1, 2, 3], [1, 1, 1, 1, 0]),
        ("batch_hard_triplet", [1, 1, 1, 1], [0, 4, 0, 0, 0]),  # positives, but no negative
        ("supervised_contrastive", [2], [0, 0, 1, 0, 0]),  # the anchor is alone in the pool
        ("batch_hard_triplet", [2], [0, 0, 1, 0, 0]),
    ],
)
def test_batch_without_valid_anchor_gives_zero_with_a_graph(name, labels, masked):
    rows, labels = embeddings()[: len(labels)].detach().requires_grad_(), torch.tensor(labels)
    loss = METRIC_LOSSES[name](rows, labels, Pool(rows, labels, 0), LossConfig(name=name))
    loss.total.backward()
    assert loss.count == 0
    assert loss.total.item() == 0
    assert torch.equal(rows.grad, torch.zeros_like(rows))
    assert loss.masked_per_class(5).tolist() == masked


def test_equal_embeddings_have_zero_not_nan_triplet_gradient():
    rows, labels = torch.ones(6, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 0, 1, 1, 1])
    loss = batch_hard_triplet(rows, labels, Pool(rows, labels, 0), 0.2)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(6 * 0.2)
    assert torch.equal(rows.grad, torch.zeros_like(rows))


@pytest.mark.parametrize("name", list(METRIC_LOSSES))
def test_a_nan_embedding_shows_in_the_loss(name):
    rows = embeddings().detach()
    rows[0, 0] = math.nan
    rows.requires_grad_()
    loss = METRIC_LOSSES[name](rows, LABELS, Pool(rows, LABELS, 0), LossConfig(name=name))
    assert loss.total.isnan()


def test_cross_entropy_is_the_sum_over_samples():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    loss = cross_entropy(logits, labels)
    expected = sum(torch.log(torch.exp(z).sum()) - z[y] for z, y in zip(logits, labels, strict=True))
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    gradient = torch.autograd.grad(loss.total, logits)[0]
    torch.testing.assert_close(gradient, logits.softmax(1) - functional.one_hot(labels, 4), rtol=1e-10, atol=1e-12)
    assert loss.count == 6
    assert loss.masked.tolist() == []
    assert cross_entropy(logits.bfloat16(), labels).total.dtype == torch.float32
    assert cross_entropy(logits[:0], labels[:0]).total.item() == 0
