"""Gradient caching: half precision, outputs outside the loss, ranks with little or nothing to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.gloo import run_gloo
from tests.losses import mean_over_ranks
from trainer.gradient_cache import cached_forward
from trainer.losses.base import LossSum
from trainer.pool import gather_pool

DIM = 5


def test_gradients_do_not_vanish_in_half_precision_outputs():
    # 1e-6 / 12 is below float16's least number, 6e-8 / 2: a gradient of that type would be zero.
    weight = torch.ones(DIM, dtype=torch.float16, requires_grad=True)
    images = torch.ones(12, DIM, dtype=torch.float16)
    cached = cached_forward(lambda part: (part * weight,), images, 5, nn.Identity())
    assert cached.output[0].dtype == torch.float32
    scale = 2.0**16  # a loss scaler works on the scalar that it is given
    cached.backward(cached.output[0].mean() * 1e-6, lambda scalar, last: (scalar * scale).backward())
    torch.testing.assert_close(weight.grad.double() / scale, torch.full([DIM], 2e-7).double(), rtol=1e-2, atol=0)


def test_outputs_without_part_in_the_loss_and_plain_tuples_are_taken():
    weight = torch.ones(DIM, requires_grad=True)
    images = torch.arange(12.0)[:, None].repeat(1, DIM)
    cached = cached_forward(lambda part: (part * weight, part), images, 4, nn.Identity())
    assert type(cached.output) is tuple and cached.output[1].equal(images)
    cached.backward(cached.output[0].sum(), lambda scalar, last: scalar.backward(), [nn.Parameter(torch.ones(2))])
    assert weight.grad.tolist() == [66.0] * DIM


def too_uneven(rank, world):
    with pytest.raises(ValueError) as error:
        cached_forward(lambda part: (part,), torch.ones(2 + 3 * rank, 1), 1, nn.Identity())
    return str(error.value)


def test_a_rank_with_fewer_images_than_micro_batches_is_told_on_every_rank():
    told = (
        "stage_one.micro_batch_size = 1 cuts 5 images of one worker into 5 micro-batches and another worker has 2 "
        "images; raise stage_one.micro_batch_size"
    )
    assert run_gloo(too_uneven, 2) == [told] * 2


def no_anchor(rank, world):
    """Rank 1's anchors have no term; its backward takes part all the same."""
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    cached = cached_forward(lambda part: (part * weight,), torch.ones(4, 1, dtype=torch.float64), 2, nn.Identity())
    rows = cached.output[0]
    pool = gather_pool(rows, torch.zeros(4, dtype=torch.int64))
    loss = LossSum(pool.embeddings.sum() * (rank == 0), 4 * (rank == 0), pool.labels[:0])
    cached.backward(mean_over_ranks(loss), lambda scalar, last: scalar.backward())
    return weight.grad.tolist()


def test_a_rank_without_any_valid_anchor_takes_part():
    assert run_gloo(no_anchor, 2) == [[2.0], [2.0]]  # W / n = 2 / 4 of rank 0's sum reaches 4 rows of each rank
