"""What is said of a step that is left out, from which rank it came, and what it leaves behind; two real ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from cluster.errors import UserError
from cluster.worker import Worker
from tests.gloo import run_gloo
from trainer.config import StageOneConfig
from trainer.model import Output
from trainer.nonfinite import NonFiniteGuard


def batch_of(rank, images):
    keys = [f"r{rank}i{number}" for number in range(images)]
    output = Output(torch.zeros(2 * images, 3), torch.zeros(2 * images, 2), torch.zeros(2 * images, 4))
    return SimpleNamespace(keys=keys, epoch=2), output


def evaluation_of(total, own):
    return SimpleNamespace(total=total, is_finite=math.isfinite(total), own_sums=torch.tensor([own, 1.0]))


def said(rank, world, images, bad_rank, where):
    """The message on this rank when something of `bad_rank` is not finite."""
    worker = Worker(rank, world, "cpu")
    guard = NonFiniteGuard(worker, StageOneConfig(optimiser={"lr": 0.01}), last_checkpoint="stage_one/epoch-0001")
    batch, output = batch_of(rank, images)
    if where == "output" and rank == bad_rank:
        output.logits[images + 1, 0] = math.inf  # the second view of image 1
    own = math.nan if where == "loss" and rank == bad_rank else 2.0
    total = 2.0 if where == "gradient" else math.nan
    with pytest.raises(UserError) as error:
        guard.leave_out(7, batch, output, evaluation_of(total, own), SimpleNamespace(overflowed=False))
    return str(error.value)


REST = (
    " at step 7 (epoch 2); the weights were not updated, the last good checkpoint is stage_one/epoch-0001; lower "
    "stage_one.optimiser.lr = 0.01, or raise stage_one.skip_nonfinite_steps = 0, and give another run=..."
)


@pytest.mark.parametrize(
    ("images", "where", "what"),
    [
        (3, "output", "the loss is nan, from outputs that are not finite for worker 1: r1i1"),
        (3, "loss", "the loss is nan, from the batch of worker 1: r1i0, r1i1, r1i2"),
        (
            9,
            "loss",
            "the loss is nan, from the batch of worker 1: r1i0, r1i1, r1i2, r1i3, r1i4, r1i5, r1i6, r1i7 and 1 more",
        ),
        (
            1,
            "gradient",
            "the gradient is not finite (loss 2), in the batch of worker 0: r0i0; worker 1: r1i0",
        ),
    ],
)
def test_every_rank_says_the_same_and_names_the_rank_at_fault(images, where, what):
    assert run_gloo(said, 2, images, 1, where) == [what + REST] * 2


def left_out(rank, world):
    told = []
    worker = Worker(rank, world, "cpu")
    worker.tell = told.append  # type: ignore[method-assign]
    guard = NonFiniteGuard(worker, StageOneConfig(skip_nonfinite_steps=2))
    norm = torch.nn.BatchNorm1d(3)
    engine = SimpleNamespace(model=norm, overflowed=False)
    batch, output = batch_of(rank, 2)
    for step in (1, 2):
        guard.before(norm)
        norm(torch.full((4, 3), math.nan))
        assert norm.running_mean.isnan().all()
        guard.leave_out(step, batch, output, evaluation_of(math.nan, math.nan), engine)
        assert norm.running_mean.equal(torch.zeros(3)) and int(norm.num_batches_tracked) == 0
    # fp16: a gradient too large for its loss scale is part of the method.
    guard.leave_out(3, batch, output, evaluation_of(2.0, 2.0), SimpleNamespace(overflowed=True))
    assert guard.skipped == 2
    with pytest.raises(
        UserError, match=r"at step 4 \(epoch 2\), after 2 steps left out; .* there is no checkpoint yet;"
    ):
        guard.leave_out(4, batch, output, evaluation_of(math.inf, math.inf), engine)
    return [(line["kind"], line["step"], line["epoch"], line["skipped"]) for line in told]


def test_statistics_are_as_before_and_rank_0_tells():
    assert run_gloo(left_out, 2) == [[("skipped", 1, 2, 1), ("skipped", 2, 2, 2)], []]
