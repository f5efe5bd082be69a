"""Metric losses at their edges: one class, one sample, no sample, equal and broken embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from tests.losses import METRIC_CASES, build, embeddings, of_anchors


@pytest.mark.parametrize("case", METRIC_CASES)
def test_one_class_in_the_batch_is_defined(case):
    config, progress = METRIC_CASES[case]
    rows, labels = embeddings(normalised=config.normalise).detach()[:4].requires_grad_(), torch.tensor([1, 1, 1, 1])
    module = build(config)
    loss = of_anchors(module, rows, progress, 0, 4, labels)
    loss.total.backward()
    needs_negatives = "triplet" in config.name or config.name == "multi_similarity"
    assert loss.masked.tolist() == ([1, 1, 1, 1] if needs_negatives else [])
    assert loss.total.isfinite() and rows.grad.isfinite().all()
    assert (rows.grad.abs().max() > 0) != needs_negatives
    assert (loss.count == 0) == needs_negatives


@pytest.mark.parametrize("case", METRIC_CASES)
def test_classes_of_one_sample_each_are_masked_or_defined(case):
    config, progress = METRIC_CASES[case]
    rows, labels = embeddings(normalised=config.normalise).detach()[:4].requires_grad_(), torch.tensor([3, 1, 0, 2])
    module = build(config)
    loss = of_anchors(module, rows, progress, 0, 4, labels)
    loss.total.backward()
    # Centres, proxies and prototypes stand for the missing positives.
    defined = config.name in ("centre", "proxy_anchor") or getattr(module, "prototypes", None) is not None
    assert loss.masked.tolist() == ([] if defined else [3, 1, 0, 2])
    assert loss.total.isfinite() and rows.grad.isfinite().all()
    assert bool(rows.grad.abs().max() > 0) == bool(loss.total > 0) == (loss.count > 0) == defined


@pytest.mark.parametrize("case", METRIC_CASES)
def test_a_rank_without_samples_has_a_zero_with_a_graph_or_the_pools_loss(case):
    config, progress = METRIC_CASES[case]
    rows, module = embeddings(normalised=config.normalise), build(config)
    loss = of_anchors(module, rows, progress, 5, 5)
    assert loss.total.requires_grad
    loss.total.backward()
    if config.name == "proxy_anchor":  # of the whole pool, the same on every rank
        assert loss.total.equal(of_anchors(module, rows, progress).total)
    else:
        assert loss.total == 0 and loss.count == 0
    assert loss.masked.tolist() == []


@pytest.mark.parametrize("case", METRIC_CASES)
def test_the_anchor_alone_in_the_pool(case):
    config, progress = METRIC_CASES[case]
    rows, labels = embeddings(normalised=config.normalise).detach()[:1].requires_grad_(), torch.tensor([2])
    loss = of_anchors(build(config), rows, progress, 0, 1, labels)
    loss.total.backward()
    assert loss.total.isfinite() and rows.grad.isfinite().all()


@pytest.mark.parametrize("case", METRIC_CASES)
def test_a_nan_embedding_shows_in_the_loss(case):
    config, progress = METRIC_CASES[case]
    rows = embeddings(normalised=config.normalise).detach()
    rows[0, 0] = math.nan
    loss = of_anchors(build(config), rows.requires_grad_(), progress, 0, len(rows))
    assert loss.total.isnan()


@pytest.mark.parametrize("case", METRIC_CASES)
def test_equal_embeddings_have_a_finite_gradient(case):
    config, progress = METRIC_CASES[case]
    rows = functional.normalize(torch.ones(6, 5, dtype=torch.float64), dim=1).requires_grad_()
    loss = of_anchors(build(config), rows, progress, 0, 6, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.total.backward()
    assert loss.total.isfinite() and rows.grad.isfinite().all()
