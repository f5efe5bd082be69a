"""Small pools, plain loops over their pairs and gradients, for the tests of the blockwise functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trainer import pairwise_blocks

NUM_ROWS, DIM = 23, 4
# Number and first row of the anchors; the pool's other rows are another rank's or a memory's.
PLACES = [(7, 0), (7, 5), (7, 16), (23, 0), (1, 22)]
LABELS = torch.arange(NUM_ROWS) ** 2 % 11  # some classes have one row


def random_rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradients(function, anchors, pool, weights):
    anchors, pool = anchors.detach().clone().requires_grad_(), pool.detach().clone().requires_grad_()
    out = function(anchors, pool)
    return out.detach(), *torch.autograd.grad(out, (anchors, pool), weights.to(out.dtype))


def pool_of(dtype=torch.float64, seed=3):
    return functional.normalize(random_rows(NUM_ROWS, DIM, seed=seed)).to(dtype)


def pairs(i, labels, first):
    """Positives and negatives of anchor i."""
    others = [j for j in range(len(labels)) if j != first + i]
    positives = [j for j in others if labels[j] == labels[first + i]]
    return positives, [j for j in others if labels[j] != labels[first + i]]


# Blocks of one row, of sizes that do not divide 23, and the whole pool in one.
EACH_BLOCK = pytest.mark.parametrize("block", [1, 5, 22, 100])


def cut_pool(monkeypatch, block):
    """Blocks of `block` rows for 7 anchors in float64."""
    monkeypatch.setattr(pairwise_blocks, "MIN_BLOCK_ROWS", 1)
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 8 * 7 * block)
