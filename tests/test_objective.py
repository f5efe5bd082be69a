"""Stage one's objective: W ranks of unequal size equal one, each part against its formula, and bad batches."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from data_pipeline.mix import Mix
from tests.gloo import run_gloo
from tests.losses import CLASSIFICATION_LOSS_NAMES, METRIC_LOSS_NAMES
from trainer.config import MemoryConfig, StageOneConfig
from trainer.losses import build_classification_loss, build_metric_loss
from trainer.memory import CrossBatchMemory
from trainer.model import Output
from trainer.objective import Objective

IMAGES, NUM_CLASSES, DIM, FEATURES = 12, 4, 8, 10
SIZES = {1: [12], 2: [5, 7], 3: [6, 5, 1]}
COUNTS = torch.tensor([40, 20, 8, 2])
SHARES = torch.tensor([1, 1, 0.3, 1, 0.6, 1, 1, 0.9, 1, 0.5, 1, 0.2])  # the last of three ranks has no unmixed image


def outputs(views=1, dtype=torch.float64):
    """Of the whole batch, view-major, and its labels; the last class has one image."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(views * IMAGES, FEATURES, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(views * IMAGES, DIM, generator=generator, dtype=torch.float64)
    logits = torch.randn(views * IMAGES, NUM_CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 1, 3])
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    return Output(*(t.to(dtype).requires_grad_() for t in (features, embeddings, logits))), labels


def share(output, labels, rank, world, views):
    """This rank's images, in each view, as leaves of its own graph."""
    first = sum(SIZES[world][:rank])
    rows = torch.arange(first, first + SIZES[world][rank])
    every = torch.cat([view * IMAGES + rows for view in range(views)])
    return Output(*(t.detach()[every].requires_grad_() for t in output)), labels[rows], every


def objective_of(config, memory=None):
    torch.manual_seed(0)
    dim = FEATURES if config.loss.compare == "feature" else DIM
    metric = build_metric_loss(config.loss, NUM_CLASSES, dim, COUNTS)
    classification = build_classification_loss(config.classification, COUNTS, cosine_scale=8.0)
    return Objective(config, classification, metric.double() if metric is not None else None, memory)


def one_step(rank, world, case):
    """-> objective, terms, masked labels, this rank's rows of the whole output, gradients of these and of the loss."""
    changes, views, mixed = case
    output, labels = outputs(views)
    own, own_labels, rows = share(output, labels, rank, world, views)
    objective = objective_of(StageOneConfig(views=views, **changes))
    images = rows[: len(own_labels)]
    mix = Mix(labels.flip(0)[images], SHARES[images]) if mixed else None
    result = objective(own, own_labels, 0.5, mix)
    result.loss.backward()
    gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in own]
    learnt = [parameter.grad for parameter in objective.parameters()]
    for grad in learnt:
        dist.all_reduce(grad)
    return result.total, result.terms, sorted(result.masked.tolist()), rows, gradients, learnt


def steps_of_cases(rank, world):
    return [one_step(rank, world, case) for case in CASES]


# Every loss beside cross-entropy, in the middle of lambda's warm-up; every classification loss alone.
CASES = [
    *(
        ({"loss": {"name": name, "weight": 0.7, "warmup_epochs": 1.0}}, views, mixed)
        for name in METRIC_LOSS_NAMES
        for views, mixed in ((1, False), (2, False), (2, True))
    ),
    *(({"loss": {"name": "none"}, "classification": {"name": name}}, 1, False) for name in CLASSIFICATION_LOSS_NAMES),
]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_of_unequal_size_are_one_rank_for_every_loss(world):
    ranks_of_cases = zip(*run_gloo(steps_of_cases, world), strict=True)
    for case, one, ranks in zip(CASES, run_gloo(steps_of_cases, 1)[0], ranks_of_cases, strict=True):
        total, terms, masked, _, expected, learnt = one
        if case[0]["loss"]["name"] == "supervised_contrastive":
            assert masked == ([3] if case[1:] == (1, False) else [])  # the only image of its class
        if "metric_loss" in terms:  # half of the warm-up
            assert total == pytest.approx(terms["cross_entropy"] + 0.35 * terms["metric_loss"])
            assert terms["metric_loss"] > 0, case
        for rank in ranks:
            assert rank[0] == pytest.approx(total, rel=1e-6) and rank[1] == pytest.approx(terms, rel=1e-6), case
        assert sorted(label for rank in ranks for label in rank[2]) == masked, case
        for number, whole in enumerate(expected):
            for _, _, _, rows, gradients, _ in ranks:
                # The engine averages over ranks: each row's gradient comes from one rank, W times what it is to be.
                torch.testing.assert_close(gradients[number] / world, whole[rows], rtol=1e-6, atol=1e-12)
        for rank in ranks:
            for grad, whole in zip(rank[5], learnt, strict=True):
                torch.testing.assert_close(grad / world, whole, rtol=1e-6, atol=1e-12)


def test_a_weight_of_zero_leaves_the_metric_loss_out():
    output, labels = outputs()
    result = objective_of(StageOneConfig(views=1, loss={"weight": 0.0}))(output, labels, 1.0)
    assert result.terms.keys() == {"cross_entropy"} and result.total == pytest.approx(result.loss.item(), rel=1e-6)
    assert result.gathered is None and result.metric_weight == 0


def test_the_terms_are_their_formulas():
    output, labels = outputs(views=2)
    config = StageOneConfig(views=2, loss={"name": "batch_hard_triplet", "weight": 0.3})
    result = objective_of(config)(output, labels, 1.0)
    both = labels.repeat(2)
    assert result.terms["cross_entropy"] == pytest.approx(cross_entropy(output.logits, both).item(), rel=1e-6)
    distance = torch.cdist(output.embeddings, output.embeddings)
    same = both[:, None] == both[None, :]
    hardest = [
        max(0.0, 0.2 + (distance[i][same[i] & (torch.arange(24) != i)].max() - distance[i][~same[i]].min()).item())
        for i in range(24)
    ]
    assert result.terms["metric_loss"] == pytest.approx(np.mean(hardest), rel=1e-6)
    assert result.loss.item() == pytest.approx(result.total)


def test_features_are_compared_on_request():
    output, labels = outputs()
    metric = {"name": "supervised_contrastive", "compare": "feature"}
    result = objective_of(StageOneConfig(views=1, loss=metric))(output, labels, 1.0)
    result.loss.backward()
    assert result.pool.embeddings.shape == (IMAGES, FEATURES)
    assert output.embeddings.grad is None and output.features.grad.abs().sum() > 0


def test_mixed_images_share_the_loss_of_both_labels():
    output, labels = outputs(views=2)
    mix = Mix(labels.flip(0), torch.linspace(0, 1, IMAGES))
    config = StageOneConfig(views=2, loss={"name": "none"}, classification={"label_smoothing": 0.1})
    result = objective_of(config)(output, labels, 1.0, mix)
    own, partner = (
        cross_entropy(output.logits, which.repeat(2), reduction="none", label_smoothing=0.1)
        for which in (labels, mix.labels)
    )
    lam = mix.share.double().repeat(2)
    assert result.total == pytest.approx((lam * own + (1 - lam) * partner).mean().item(), rel=1e-6)
    assert result.gathered is None and result.metric_weight == 0


def test_images_of_two_classes_are_not_compared():
    output, labels = outputs(views=2)
    unmixed = (SHARES == 1).repeat(2)
    config = StageOneConfig(views=2, loss={"name": "supervised_contrastive"})
    mixed = objective_of(config)(output, labels, 1.0, Mix(labels.flip(0), SHARES))
    left = Output(*(t[unmixed] for t in output))
    alone = objective_of(config)(left, labels[SHARES == 1], 1.0)
    assert mixed.terms["metric_loss"] == pytest.approx(alone.terms["metric_loss"], rel=1e-9)
    assert len(mixed.gathered.labels) == unmixed.sum() and mixed.terms["cross_entropy"] != alone.terms["cross_entropy"]


@pytest.mark.parametrize("name", METRIC_LOSS_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_one_class_has_a_finite_loss_and_gradient(name, dtype):
    output, labels = outputs(dtype=torch.float32)
    rows = torch.nn.functional.normalize(output.embeddings.detach().to(dtype), dim=1).requires_grad_()
    output = Output(output.features, rows, output.logits)
    config = StageOneConfig(views=1, loss={"name": name})
    result = objective_of(config)(output, torch.zeros_like(labels), 1.0)
    assert result.is_finite and math.isfinite(result.total)
    result.loss.backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in output)
    if "triplet" in name:  # no negative: no anchor has a term
        assert result.terms["metric_loss"] == 0 and (name != "batch_hard_triplet" or len(result.masked) == IMAGES)


def not_finite(rank, world):
    output, labels = outputs()
    own, own_labels, _ = share(output, labels, rank, world, 1)
    with torch.no_grad():
        own.logits[0, 0] = math.nan if rank == 1 else own.logits[0, 0]
    result = objective_of(StageOneConfig(views=1))(own, own_labels, 1.0)
    return result.is_finite, bool(result.own_sums.isfinite().all())


def test_every_rank_knows_that_the_loss_of_one_is_not_finite():
    assert run_gloo(not_finite, 3) == [(False, True), (False, False), (False, True)]


def test_the_memory_gives_further_rows_and_takes_in_the_batch_by_position():
    memory = CrossBatchMemory(MemoryConfig(rows=100, start_epoch=0), DIM)
    output, labels = outputs(views=2, dtype=torch.float32)
    objective = objective_of(StageOneConfig(views=2), memory)
    first = objective(output, labels, 0.5)
    positions = np.arange(IMAGES)[::-1].copy()
    objective.remember(first, SimpleNamespace(positions=positions, mix=None), 0.5)
    second = objective(output, labels, 1.0)
    assert (len(first.pool.labels), len(second.pool.labels), len(second.gathered.labels)) == (24, 48, 24)
    # By position, and of one position view by view.
    assert second.pool.labels[24:].equal(labels.flip(0).repeat_interleave(2))
    rows = output.embeddings.detach().view(2, IMAGES, DIM).flip(1).transpose(0, 1).reshape(-1, DIM)
    assert second.pool.embeddings[24:].equal(rows)
    second.loss.backward()
    assert output.embeddings.grad is not None


def test_the_losss_own_parameters_are_named():
    assert [tuple(p.shape) for p in objective_of(StageOneConfig(loss={"name": "proxy_anchor"})).parameters()] == [
        (4, 8)
    ]
    assert objective_of(StageOneConfig(loss={"name": "none"})).parameters() == []
