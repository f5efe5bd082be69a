"""Batch norm over ranks: W real gloo processes give what torch's own gives one process with all images."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from tests.gloo import run_gloo
from trainer.batch_norm import statistics_held, synchronise_batch_norm

UNEVEN = {2: (2, 5), 3: (4, 0, 3)}  # convolutions take an empty batch, too
CHANNELS = 4

# name -> batch norm, shape of a sample
LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(CHANNELS), (CHANNELS,)),
    "1d, sequence": (lambda: nn.BatchNorm1d(CHANNELS), (CHANNELS, 6)),
    "2d": (lambda: nn.BatchNorm2d(CHANNELS), (CHANNELS, 3, 5)),
    "2d, own settings": (lambda: nn.BatchNorm2d(CHANNELS, eps=0.1, momentum=0.7), (CHANNELS, 3, 5)),
    "2d, plain mean": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (CHANNELS, 3, 5)),
    "2d, not affine": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (CHANNELS, 3, 5)),
    "2d, no statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (CHANNELS, 3, 5)),
    "3d": (lambda: nn.BatchNorm3d(CHANNELS), (CHANNELS, 2, 3, 2)),
    "timm's with activation": (lambda: BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), (CHANNELS, 3, 5)),
}
NETWORKS = ("test_resnet", "test_efficientnet")  # the second has timm's batch norm with activation
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def largest_error(result, expected):
    """Relative to each tensor's largest element, or to a thousandth of the largest of its kind."""
    worst = 0.0
    for key, e in expected.items():
        alike = [float(x.abs().max()) for other, x in expected.items() if other[0] == key[0]]
        scale = max(float(e.abs().max()), 1e-3 * max(alike), 1e-30)
        worst = max(worst, float((result[key] - e).abs().max()) / scale)
    return worst


def train(model, shape, sizes, dtype, rank=0, world=1):
    """Two training steps of one rank -> its outputs and input gradients, weight gradients, running statistics."""
    result = {}
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        images = (3 + 2 * torch.randn(7, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        x = images.split(sizes)[rank].requires_grad_()
        y = model(x)
        # A weight a value, different for each image: batch norm's backward is zero for a plain sum.
        weights = torch.randn(7, *y.shape[1:], generator=generator, dtype=torch.float64).to(dtype).split(sizes)[rank]
        model.zero_grad()
        (y * weights).sum().backward()
        result |= {("output", step): y.detach(), ("input gradient", step): x.grad}
        for name, parameter in model.named_parameters():
            grad = parameter.grad.clone()
            if world > 1:
                dist.all_reduce(grad)  # the sum of all ranks' losses
            result["gradient", name, step] = grad
        result |= {("buffer", name, step): buffer.clone() for name, buffer in model.named_buffers()}
    return result


def build(name, dtype):
    """-> layer or network, shape of a sample. Weights and biases that do not hide in the default 1 and 0."""
    torch.manual_seed(0)
    if name in NETWORKS:
        model, shape = timm.create_model(name, num_classes=3), (3, 32, 32)
    else:
        layer, shape = LAYERS[name]
        model = layer()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.to(dtype), shape


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


# --- precision


def in_bf16(rank, world, autocast):
    images = (100 + torch.randn(8, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    model = synchronise_batch_norm(nn.BatchNorm2d(CHANNELS, momentum=1.0))
    x = images.chunk(world)[rank].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, model.running_mean, model.running_var


@pytest.mark.parametrize("autocast", [False, True])
def test_statistics_are_float32_under_bf16(autocast):
    images = (100 + torch.randn(8, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    for y, grad, mean, variance in run_gloo(in_bf16, 2, autocast):
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
    assert run_gloo(in_bf16_weights, 2) == [(torch.bfloat16,) * 3] * 2


def far_from_zero(rank, world):
    x = 1e4 + torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(rank))
    model = synchronise_batch_norm(nn.BatchNorm1d(CHANNELS, momentum=1.0))
    model(x)
    return x, model.running_var


def test_variance_does_not_cancel_where_the_mean_is_large():
    (x, variance), (y, _) = run_gloo(far_from_zero, 2)
    torch.testing.assert_close(variance.double(), torch.cat([x, y]).double().var(0), rtol=1e-3, atol=0)


def channels_last(rank, world):
    x = torch.randn(2, CHANNELS, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = synchronise_batch_norm(nn.BatchNorm2d(CHANNELS))(x)
    y.square().sum().backward()
    return [t.is_contiguous(memory_format=torch.channels_last) for t in (y, x.grad)]


def test_channels_last_stays():
    assert run_gloo(channels_last, 2) == [[True, True]] * 2


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
    assert run_gloo(evaluate, 2) == [True, True]


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
    assert run_gloo(too_few, 2) == [(told, True)] * 2


def compiled(rank, world):
    torch.manual_seed(0)
    model = synchronise_batch_norm(nn.Sequential(nn.Linear(3, CHANNELS), nn.BatchNorm1d(CHANNELS)))
    images = torch.randn(5, 3)
    expected = copy.deepcopy(model)(images)
    model.compile(backend="aot_eager")
    return (model(images) - expected).abs().max().item()


def test_a_compiled_model_is_taken():
    assert max(run_gloo(compiled, 2)) < 1e-6


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
    for same in (hold(0, 1), *run_gloo(hold, 2)):
        assert same == [True] * 10


def test_statistics_are_let_go_after_an_error_and_stay_off_where_they_were():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(KeyError), statistics_held(model):
        raise KeyError
    assert [norm.track_running_stats for norm in model] == [True, False]


def test_held_statistics_still_serve_in_evaluation():
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 1
    x = torch.randn(3, 2)
    expected = norm.eval()(x)
    with statistics_held(norm):
        assert norm(x).equal(expected)
