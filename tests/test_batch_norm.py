"""Batch norm over ranks: W real gloo processes give what torch's own gives one process with all images."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.gloo import run_gloo
from tests.norms import LAYERS, NETWORKS, build, train
from trainer.batch_norm import synchronise_batch_norm

UNEVEN = {2: (2, 5), 3: (4, 0, 3)}  # convolutions take an empty batch, too
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def largest_error(result, expected):
    """Relative to each tensor's largest element, or to a thousandth of the largest of its kind."""
    worst = 0.0
    for key, e in expected.items():
        alike = [float(x.abs().max()) for other, x in expected.items() if other[0] == key[0]]
        scale = max(float(e.abs().max()), 1e-3 * max(alike), 1e-30)
        worst = max(worst, float((result[key] - e).abs().max()) / scale)
    return worst


def train_ranks(rank, world, cases, synchronised):
    results = []
    for name, dtype in cases:
        model, shape = build(name, dtype)
        results.append(
            train(synchronise_batch_norm(model) if synchronised else model, shape, UNEVEN[world], dtype, rank, world)
        )
    return results


CASES = [(name, dtype) for name in (*LAYERS, *NETWORKS) for dtype in TOLERANCE if name in LAYERS or dtype.itemsize == 8]


@cache
def of_ranks(world):
    """All cases in one start of the processes; outputs and input gradients in rank order behind each other."""
    return dict(zip(CASES, zip(*run_gloo(train_ranks, world, CASES, True), strict=True), strict=True))


def of_global_batch(ranks):
    """Each rank's images behind each other; what is the same on every rank once."""
    joined = {}
    for key, value in ranks[0].items():
        if key[0] in ("output", "input gradient"):
            joined[key] = torch.cat([rank[key] for rank in ranks])
        else:
            assert all(value.equal(rank[key]) for rank in ranks), key
            joined[key] = value
    return joined


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_what_one_process_gives(world, case):
    model, shape = build(*case)
    expected = train(model, shape, (7,), case[1])
    assert any(key[0] == "buffer" for key in expected) == (case[0] != "2d, no statistics")
    assert all(value.abs().max() > 1e-3 for key, value in expected.items() if key[0] != "gradient")
    assert largest_error(of_global_batch(of_ranks(world)[case]), expected) < TOLERANCE[case[1]]


def test_plain_batch_norm_on_each_ranks_images_differs():
    cases = [("2d", torch.float64), ("test_resnet", torch.float64)]
    for case, *ranks in zip(cases, *run_gloo(train_ranks, 2, cases, False), strict=True):
        model, shape = build(*case)
        expected = train(model, shape, (7,), case[1])
        output = torch.cat([rank["output", 0] for rank in ranks])
        assert largest_error({("output", 0): output}, {("output", 0): expected["output", 0]}) > 1e-2
