"""Batch norm over ranks: precision, the model around it, few values; statistics that are held."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from tests.gloo import run_gloo
from tests.norms import CHANNELS, build, train
from trainer.batch_norm import statistics_held, synchronise_batch_norm


def small_tests(rank, world):
    """The functions of the tests below, in one start of the processes."""
    functions = (
        in_bf16,
        under_autocast,
        in_bf16_weights,
        far_from_zero,
        channels_last,
        evaluate,
        too_few,
        compiled,
        hold,
    )
    return {function.__name__: function(rank, world) for function in functions}


@cache
def results_of_two():
    return run_gloo(small_tests, 2)


def of_two(function):
    """What `function(rank, 2)` returns on each rank."""
    return [results[function.__name__] for results in results_of_two()]


# --- precision


def in_bf16(rank, world, autocast=False):
    images = (100 + torch.randn(8, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    model = synchronise_batch_norm(nn.BatchNorm2d(CHANNELS, momentum=1.0))
    x = images.chunk(world)[rank].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, model.running_mean, model.running_var


def under_autocast(rank, world):
    return in_bf16(rank, world, autocast=True)


@pytest.mark.parametrize("function", [in_bf16, under_autocast])
def test_statistics_are_float32_under_bf16(function):
    images = (100 + torch.randn(8, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    for y, grad, mean, variance in of_two(function):
        assert (y.dtype, grad.dtype, mean.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        # bf16 has steps of 0.5 at 100: a mean or a variance taken in it would be far off.
        torch.testing.assert_close(mean, images.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=0)
        exact = images.double().transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(variance, exact.float(), rtol=1e-4, atol=0)


def in_bf16_weights(rank, world):
    model = synchronise_batch_norm(nn.BatchNorm2d(CHANNELS)).bfloat16()
    y = model(torch.randn(2, CHANNELS, 3, 3, dtype=torch.bfloat16))
    y.sum().backward()
    return y.dtype, model.weight.grad.dtype, model.running_mean.dtype


def test_a_model_whose_weights_are_bf16_is_taken():
    assert of_two(in_bf16_weights) == [(torch.bfloat16,) * 3] * 2


def far_from_zero(rank, world):
    x = 1e4 + torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(rank))
    model = synchronise_batch_norm(nn.BatchNorm1d(CHANNELS, momentum=1.0))
    model(x)
    return x, model.running_var


def test_variance_does_not_cancel_where_the_mean_is_large():
    (x, variance), (y, _) = of_two(far_from_zero)
    torch.testing.assert_close(variance.double(), torch.cat([x, y]).double().var(0), rtol=1e-3, atol=0)


def channels_last(rank, world):
    x = torch.randn(2, CHANNELS, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = synchronise_batch_norm(nn.BatchNorm2d(CHANNELS))(x)
    y.square().sum().backward()
    return [t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad)]


def test_channels_last_stays():
    assert of_two(channels_last) == [[True, True]] * 2


# --- the model around it


def one_rank(rank, world):
    model, shape = build("test_efficientnet", torch.float32)
    plain = copy.deepcopy(model)
    results = [train(m, shape, (7,), torch.float32) for m in (plain, synchronise_batch_norm(model))]
    return all(value.equal(results[1][key]) for key, value in results[0].items())


def test_one_rank_with_or_without_a_process_group_changes_nothing():
    assert one_rank(0, 1)
    assert run_gloo(one_rank, 1) == [True]


def evaluate(rank, world):
    model, shape = build("test_resnet", torch.float32)
    images = torch.randn(rank + 1, *shape)  # no message is sent: ranks may do as many passes as they like
    plain = copy.deepcopy(model).eval()(images)
    model = synchronise_batch_norm(model).eval()
    return all(model(images).equal(plain) for _ in range(rank + 1))


def test_evaluation_is_each_ranks_own():
    assert of_two(evaluate) == [True, True]


def test_a_model_keeps_its_names_classes_and_copies():
    model, _ = build("test_efficientnet", torch.float32)
    before = {name: type(module) for name, module in model.named_modules()}
    names, weights = list(model.state_dict()), list(model.parameters())
    assert synchronise_batch_norm(model) is model
    assert list(model.state_dict()) == names
    assert all(p is w for p, w in zip(model.parameters(), weights, strict=True))
    assert all(isinstance(module, before[name]) for name, module in model.named_modules())
    changed = {type(module).__name__ for name, module in model.named_modules() if type(module) is not before[name]}
    assert changed == {"SynchronisedBatchNormAct2d"}
    classes = [type(module) for module in copy.deepcopy(model).modules()]
    assert classes == [type(module) for module in synchronise_batch_norm(model).modules()]  # a second time: as it is


def test_torchs_own_is_left_as_it_is():
    assert type(synchronise_batch_norm(nn.SyncBatchNorm(3))) is nn.SyncBatchNorm


def test_a_batch_norm_that_does_more_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(SplitBatchNorm2d(4, num_splits=2)))
    with pytest.raises(ValueError) as error:
        synchronise_batch_norm(model)
    assert str(error.value) == (
        "model.sync_batch_norm = true: layer 1.0 is a SplitBatchNorm2d, which is not known here; set it to false or "
        "choose another backbone"
    )


def too_few(rank, world):
    model = synchronise_batch_norm(nn.BatchNorm1d(CHANNELS))
    with pytest.raises(ValueError) as error:
        model(torch.zeros(rank, CHANNELS))
    two = model(torch.eye(CHANNELS)[:1] * rank)  # one value a rank is enough for a variance
    return str(error.value), two.isfinite().all().item()


def test_one_value_a_channel_over_all_ranks_is_refused_on_every_rank():
    told = "batch norm over 2 ranks has 1 value(s) a channel, and a variance needs two; raise stage_one.batch_size"
    assert of_two(too_few) == [(told, True)] * 2


def compiled(rank, world):
    torch.manual_seed(0)
    model = synchronise_batch_norm(nn.Sequential(nn.Linear(3, CHANNELS), nn.BatchNorm1d(CHANNELS)))
    images = torch.randn(5, 3)
    expected = copy.deepcopy(model)(images)
    model.compile(backend="aot_eager")
    return (model(images) - expected).abs().max().item()


def test_a_compiled_model_is_taken():
    assert max(of_two(compiled)) < 1e-6


# --- held statistics


def hold(rank, world):
    """Training passes with held statistics normalise as ever and leave buffers alone, checkpointed ones too."""
    same = []
    for momentum in (0.1, None):
        model = synchronise_batch_norm(nn.Sequential(nn.BatchNorm2d(CHANNELS, momentum=momentum), nn.Conv2d(4, 4, 1)))
        x = torch.randn(3, CHANNELS, 2, 2)
        expected = model(x)
        before = [b.clone() for b in model.buffers()]
        with statistics_held(model):
            again = model(x)
        same += [again.equal(expected), *(b.equal(c) for b, c in zip(model.buffers(), before, strict=True))]
        model(x)
        same.append(int(model[0].num_batches_tracked) == 2)
    return same


def test_held_statistics_stay_and_the_batchs_own_normalise():
    for same in (hold(0, 1), *of_two(hold)):
        assert same == [True] * 10


def test_statistics_are_let_go_after_an_error():
    norm = nn.BatchNorm1d(2)
    mean = norm.running_mean
    with pytest.raises(KeyError), statistics_held(norm):
        norm(torch.full((3, 2), torch.nan))
        raise KeyError
    assert norm.running_mean is mean and mean.tolist() == [0, 0]


def test_held_statistics_still_serve_in_evaluation():
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 1
    x = torch.randn(3, 2)
    expected = norm.eval()(x)
    with statistics_held(norm):
        assert norm(x).equal(expected)
