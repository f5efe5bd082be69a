"""Learning rates, held to torch's own schedulers."""

import pytest
import torch
from torch.optim import lr_scheduler

from trainer.config import OptimiserConfig
from trainer.schedule import learning_rate

EPOCHS, STEPS_PER_EPOCH, LR = 6, 5, 0.4
TOTAL = EPOCHS * STEPS_PER_EPOCH


def ours(config):
    return [learning_rate(config, (step + 1) / STEPS_PER_EPOCH, EPOCHS) for step in range(TOTAL)]


def torchs(make, steps=TOTAL):
    """The rate after each of torch's steps."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimiser)
    rates = []
    for _ in range(steps):
        optimiser.step()
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return [*rates, scheduler.get_last_lr()[0]]


def config(**changes):
    return OptimiserConfig(**{"lr": LR, "warmup_epochs": 0, **changes})


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine(floor):
    expected = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=floor * LR))
    assert ours(config(final_lr_share=floor)) == pytest.approx(expected[1:], abs=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.25])
def test_linear(floor):
    expected = torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, floor, TOTAL))
    assert ours(config(schedule="linear", final_lr_share=floor)) == pytest.approx(expected[1:], abs=1e-12)


def test_step():
    expected = torchs(lambda o: lr_scheduler.StepLR(o, 2 * STEPS_PER_EPOCH, 0.3))
    assert ours(config(schedule="step", step_epochs=2, step_factor=0.3)) == pytest.approx(expected[:-1])


def test_multi_step():
    milestones = [STEPS_PER_EPOCH, 4 * STEPS_PER_EPOCH]
    expected = torchs(lambda o: lr_scheduler.MultiStepLR(o, milestones, 0.5))
    ours_ = ours(config(schedule="multi_step", milestones_epochs=(1, 4), step_factor=0.5))
    assert ours_ == pytest.approx(expected[:-1])


def test_warm_up_comes_before_each_schedule():
    warm = 2 * STEPS_PER_EPOCH
    rising = torchs(lambda o: lr_scheduler.LinearLR(o, 1e-9, 1.0, warm), warm)[1:]
    assert ours(config(warmup_epochs=2, schedule="constant")) == pytest.approx(rising + [LR] * (TOTAL - warm), rel=1e-6)
    falling = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL - warm), TOTAL - warm)[1:]
    assert ours(config(warmup_epochs=2)) == pytest.approx(rising + falling, rel=1e-6, abs=1e-12)
    stepped = ours(config(warmup_epochs=2, schedule="step", step_epochs=3))
    assert stepped[:warm] == pytest.approx(rising, rel=1e-6)
    assert stepped[warm:] == pytest.approx([LR] * STEPS_PER_EPOCH + [0.1 * LR] * 3 * STEPS_PER_EPOCH)
