"""The same losses of pytorch-metric-learning, on the same inputs: value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch.nn import functional

from trainer.loss_config import ClassificationConfig, LossConfig
from trainer.losses import build_classification_loss, build_metric_loss
from trainer.losses.base import Pool

NUM_CLASSES, DIM = 5, 16
LABELS = torch.arange(40) % NUM_CLASSES
# A class of one row has no term with us and none with them.
LABELS = torch.cat([LABELS, torch.tensor([5])])
COUNTS = torch.full((NUM_CLASSES + 1,), 8)

EUCLIDEAN = {"distance": distances.LpDistance(normalize_embeddings=False)}
SUM = {"reducer": reducers.SumReducer()}


def rows(normalised=True):
    """A leaf and the embeddings made of it. Theirs normalise once more, so gradients are compared at the leaf."""
    x = torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaf = (x + functional.one_hot(LABELS, DIM)).requires_grad_()  # classes differ: triplets of every kind
    return leaf, functional.normalize(leaf, dim=1) if normalised else leaf


def triplet(miner, reducer, margin):
    loss = losses.TripletMarginLoss(margin=margin, reducer=reducer, **EUCLIDEAN)
    return lambda x: loss(x, LABELS, miner(x, LABELS) if miner is not None else None)


def multi_similarity(x):
    mined = miners.MultiSimilarityMiner(epsilon=0.1)(x, LABELS)
    return losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, **SUM)(x, LABELS, mined)


PEERS = {
    "supervised_contrastive": (
        LossConfig(name="supervised_contrastive", temperature=0.2),
        lambda x: losses.SupConLoss(temperature=0.2, **SUM)(x, LABELS),
    ),
    "batch_hard_triplet": (
        LossConfig(name="batch_hard_triplet", margin=0.5),
        triplet(miners.BatchHardMiner(**EUCLIDEAN), reducers.SumReducer(), 0.5),
    ),
    "batch_hard_triplet, raw": (
        LossConfig(name="batch_hard_triplet", margin=2.0, normalise=False),
        triplet(miners.BatchHardMiner(**EUCLIDEAN), reducers.SumReducer(), 2.0),
    ),
    "semi_hard_triplet": (
        LossConfig(name="semi_hard_triplet", margin=0.5),
        triplet(
            miners.BatchEasyHardMiner(pos_strategy="hard", neg_strategy="semihard", **EUCLIDEAN),
            reducers.SumReducer(),
            0.5,
        ),
    ),
    "all_triplet": (LossConfig(name="all_triplet", margin=0.2), triplet(None, reducers.SumReducer(), 0.2)),
    "multi_similarity": (LossConfig(name="multi_similarity"), multi_similarity),
}


@pytest.mark.parametrize("case", PEERS)
def test_the_sum_is_theirs(case):
    config, peer = PEERS[case]
    (our_leaf, ours), (their_leaf, theirs) = (rows(config.normalise) for _ in range(2))
    module = build_metric_loss(config, NUM_CLASSES + 1, DIM, COUNTS)
    loss = module(ours, LABELS, Pool(ours, LABELS, 0))
    expected = peer(theirs)
    torch.testing.assert_close(loss.total, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total, our_leaf)[0],
        torch.autograd.grad(expected, their_leaf)[0],
        rtol=1e-8,
        atol=1e-9,
    )
    assert 5 in loss.masked.tolist()
    assert loss.total > 1


def test_the_mean_over_active_triplets_is_theirs():
    _, ours = rows()
    module = build_metric_loss(LossConfig(name="all_triplet", margin=0.2), NUM_CLASSES + 1, DIM, COUNTS)
    loss = module(ours, LABELS, Pool(ours, LABELS, 0))
    expected = losses.TripletMarginLoss(margin=0.2, **EUCLIDEAN)(ours, LABELS)  # their default: of those not zero
    torch.testing.assert_close(loss.total / loss.count, expected)


def test_proxy_anchor_is_theirs():
    (our_leaf, ours), (their_leaf, theirs) = rows(), rows()
    config = LossConfig(name="proxy_anchor", proxy_scale=32, proxy_margin=0.1)
    module = build_metric_loss(config, NUM_CLASSES + 2, DIM, COUNTS).double()  # the last class has no row
    peer = losses.ProxyAnchorLoss(NUM_CLASSES + 2, DIM, margin=0.1, alpha=32)
    peer.proxies.data = module.proxies.detach().clone()
    loss, expected = module(ours, LABELS, Pool(ours, LABELS, 0)), peer(theirs, LABELS)
    torch.testing.assert_close(loss.total / loss.count, expected, rtol=1e-9, atol=1e-9)
    own = torch.autograd.grad(loss.total, (our_leaf, module.proxies))
    for ours_grad, theirs_grad in zip(own, torch.autograd.grad(expected, (their_leaf, peer.proxies)), strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "margin", "peer"),
    [
        ("cosface", 0.35, lambda: losses.CosFaceLoss(NUM_CLASSES + 1, DIM, margin=0.35, scale=30)),
        ("arcface", 0.5, lambda: losses.ArcFaceLoss(NUM_CLASSES + 1, DIM, margin=math.degrees(0.5), scale=30)),
        # Beyond pi - m, where the cosine would rise again.
        ("arcface", 2.5, lambda: losses.ArcFaceLoss(NUM_CLASSES + 1, DIM, margin=math.degrees(2.5), scale=30)),
    ],
)
def test_margin_softmax_is_theirs(name, margin, peer):
    peer, (our_leaf, ours), (their_leaf, theirs) = peer(), rows(), rows()
    module = build_classification_loss(ClassificationConfig(name=name, margin=margin), COUNTS, cosine_scale=30.0)
    weight = torch.randn(DIM, NUM_CLASSES + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peer.W.data = weight.clone()
    loss = module(30 * ours @ functional.normalize(weight, dim=0), LABELS)
    expected = peer(theirs, LABELS)
    torch.testing.assert_close(loss.total / loss.count, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(loss.total / loss.count, our_leaf)[0],
        torch.autograd.grad(expected, their_leaf)[0],
        rtol=1e-8,
        atol=1e-9,
    )
