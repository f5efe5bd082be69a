"""DeepSpeed's engine in real gloo processes, held to plain torch loops of the same network."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cluster.errors import UserError
from tests.engines import Proxies, images_and_labels, prepare, stage, tiny_model
from tests.gloo import run_gloo
from trainer.engine import Engine

STEPS = 4
LR = [3e-3, 2e-3, 1e-3, 4e-3]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_gloo(on_one_rank, 1, str(tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_gloo(on_two_ranks, 2, str(tmp_path_factory.mktemp("two")))


def on_one_rank(rank, world, folder):
    """All that is looked at with one rank: DeepSpeed takes seconds to import."""
    prepare(rank, world)
    return {
        "zero_stages": all_zero_stages(rank, world, folder),
        "optimisers": all_optimisers(rank, world),
        "low_precision": low_precision(rank, world, folder),
        "recompute": recompute(rank, world),
        "refused": refused(world),
        "compiled": [compiled(choice) for choice in (False, True)],
    }


def on_two_ranks(rank, world, folder):
    prepare(rank, world)
    return {
        "zero_stages": all_zero_stages(rank, world, folder),
        "poisoned": poisoned(rank, world),
        "clipped": clipped(rank, world),
    }


def loss_of(output, labels, proxies):
    """Classification and a term with parameters of its own; equal shares on all ranks, so that means are enough."""
    loss = cross_entropy(output.logits, labels)
    return loss + 0.1 * proxies(output.embeddings, labels, None, 0.0).total / len(labels) if proxies else loss


def steps_of(engine, proxies, rank, world, steps):
    norms = []
    for step in steps:
        images, labels = images_and_labels(step, rank, world)
        engine.backward(loss_of(engine(images), labels, proxies))
        assert engine.step(LR[step])
        norms.append(engine.grad_norm)
    return norms


def new_engine(config, world, **model):
    network, proxies = tiny_model(**model), Proxies()
    return Engine(network, config, world, "cpu", proxies), proxies


def plain_loop(config, steps=STEPS, optimiser=None, clip=0.0, autocast=None, scale=1.0):
    """The whole batch in one process, without DeepSpeed: the model's and the proxies' weights, and gradient norms."""
    network, proxies = tiny_model(), Proxies()
    own = list(network.parameters())
    groups = [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": config.optimiser.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(proxies.parameters()), "weight_decay": 0.0},
    ]
    made = optimiser(groups) if optimiser else torch.optim.AdamW(groups)
    norms = []
    for step in range(steps):
        for number, group in enumerate(made.param_groups):
            group["lr"] = LR[step] * (config.loss.lr_ratio if number == 2 else 1)
        images, labels = images_and_labels(step)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = network(images)
        made.zero_grad()
        (loss_of(output, labels, proxies) * scale).backward()
        everything = [p for group in groups for p in group["params"] if p.grad is not None]
        for parameter in everything:
            parameter.grad /= scale
        norms.append(float(nn.utils.clip_grad_norm_(everything, clip or math.inf)))
        made.step()
    return network.state_dict(), proxies.proxies.detach(), norms


def all_zero_stages(rank, world, folder):
    """Each stage: unbroken, and saved, loaded into a new engine and gone on."""
    results = {}
    for zero_stage in (0, 1, 2, 3):
        config = stage(zero_stage=zero_stage, loss={"lr_ratio": 5.0})
        engine, proxies = new_engine(config, world)
        norms = steps_of(engine, proxies, rank, world, range(2))
        engine.save(Path(folder) / str(zero_stage))
        norms += steps_of(engine, proxies, rank, world, range(2, STEPS))
        whole = engine.weights()
        again, more_proxies = new_engine(config, world)
        again.load(Path(folder) / str(zero_stage))
        steps_of(again, more_proxies, rank, world, range(2, STEPS))
        resumed = again.weights()
        results[zero_stage] = (whole, proxies.proxies.detach().clone(), norms, resumed)
    return results


@pytest.mark.parametrize("ranks_of", ["one_rank", "two_ranks"])
def test_every_zero_stage_gives_the_weights_of_a_plain_loop_and_goes_on_from_its_checkpoint(request, ranks_of):
    expected, expected_proxies, expected_norms = plain_loop(stage(loss={"lr_ratio": 5.0}))
    ranks = [results["zero_stages"] for results in request.getfixturevalue(ranks_of)]
    for zero_stage, (weights, proxies, norms, resumed) in ranks[0].items():
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=2e-5, msg=f"{zero_stage} {name}")
            assert resumed[name].equal(weights[name]), (zero_stage, name)
            assert weights[name].equal(ranks[0][0][0][name]), (zero_stage, name)  # bit for bit that of stage 0
        torch.testing.assert_close(proxies, expected_proxies, rtol=1e-4, atol=2e-5)
        assert norms == pytest.approx(expected_norms, rel=1e-3)
    for rank, results in enumerate(ranks):
        assert (results[3][0] == {}) is (rank > 0)  # the others are not burdened with weights that they do not save
        assert results[2][0].keys() == expected.keys()


# Adam and RMSprop divide a gradient by its own size: eps keeps rounding in one that is all but 0 from becoming a step.
EPS = 1e-3
OPTIMISERS = {
    "adamw": (
        {"options": {"betas": [0.8, 0.9], "eps": EPS}},
        lambda g: torch.optim.AdamW(g, betas=(0.8, 0.9), eps=EPS),
    ),
    "sgd": ({"momentum": 0.5}, lambda g: torch.optim.SGD(g, momentum=0.5, nesterov=True)),
    "lamb": ({}, lambda g: __import__("timm.optim").optim.Lamb(g, max_grad_norm=None)),
    "adam": (
        {"type": "Adam", "params": {"torch_adam": True, "adam_w_mode": False, "eps": EPS}},
        lambda g: torch.optim.Adam(g, eps=EPS),
    ),
    "rmsprop": (
        {"type": "RMSprop", "params": {"alpha": 0.9, "eps": EPS}},
        lambda g: torch.optim.RMSprop(g, alpha=0.9, eps=EPS),
    ),
}


def optimiser_config(name, **changes):
    given = OPTIMISERS[name][0]
    if "type" in given:
        return stage(optimiser={"name": "deepspeed"}, deepspeed={"optimizer": given}, **changes)
    return stage(optimiser={"name": name, "clip_norm": 0.5, **given}, **changes)


def all_optimisers(rank, world):
    results = {}
    for name in OPTIMISERS:
        engine, proxies = new_engine(optimiser_config(name), world)
        norms = steps_of(engine, proxies, rank, world, range(STEPS))
        results[name] = engine.weights(), norms
    return results


def test_every_optimiser_is_torchs_own_with_clipping_and_without(one_rank):
    results = one_rank[0]["optimisers"]
    for name, (weights, norms) in results.items():
        config = optimiser_config(name)
        expected, _, expected_norms = plain_loop(config, optimiser=OPTIMISERS[name][1], clip=config.optimiser.clip_norm)
        assert norms == pytest.approx(expected_norms, rel=1e-4), name
        assert max(norms) > 0.5  # so that clipping has something to do
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


def clipped(rank, world):
    """Under SGD, since Adam forgives a gradient that is too large."""
    results = {}
    for zero_stage in (0, 1, 2, 3):
        engine, proxies = new_engine(stage(zero_stage=zero_stage, optimiser=CLIPPED), world)
        norms = steps_of(engine, proxies, rank, world, range(2))
        results[zero_stage] = engine.weights(), norms
    return results


CLIPPED = {"name": "sgd", "clip_norm": 0.5}


def nesterov(groups):
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def test_every_zero_stage_clips_the_norm_over_all_ranks(two_ranks):
    config = stage(optimiser=CLIPPED)
    expected, _, expected_norms = plain_loop(config, 2, nesterov, clip=0.5)
    unclipped, _, _ = plain_loop(config, 2, nesterov)
    for zero_stage, (weights, norms) in two_ranks[0]["clipped"].items():
        assert norms == pytest.approx(expected_norms, rel=1e-3), zero_stage  # before clipping
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{zero_stage} {name}")
    assert any((unclipped[name] - tensor).abs().max() > 1e-3 for name, tensor in expected.items())


def low_precision(rank, world, folder):
    results = {}
    for precision, zero_stage in [("bf16", 0), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 1), ("fp16", 3)]:
        config = stage(precision=precision, zero_stage=zero_stage)
        engine, proxies = new_engine(config, world)
        images, _ = images_and_labels(0, rank, world)
        dtypes = {tensor.dtype for tensor in engine(images)}
        scales = [engine.loss_scale]
        norms = steps_of(engine, proxies, rank, world, range(2))
        # One overflow: half the loss scale, no update, and the next step as if nothing had been.
        before = engine.weights()
        if precision == "fp16":
            images, labels = images_and_labels(2, rank, world)
            engine.backward(loss_of(engine(images), labels, proxies) * 1e38)
            assert not engine.step(LR[2])
            assert engine.overflowed
            assert all(engine.weights()[name].equal(tensor) for name, tensor in before.items())
            scales.append(engine.loss_scale)
        where = Path(folder) / f"{precision}{zero_stage}"
        engine.save(where)
        steps_of(engine, proxies, rank, world, range(2, STEPS))
        again, more_proxies = new_engine(config, world)
        again.load(where)
        scales.append(again.loss_scale)
        steps_of(again, more_proxies, rank, world, range(2, STEPS))
        resumed = again.weights()
        results[precision, zero_stage] = engine.weights(), resumed, dtypes, scales, norms
    return results


def test_low_precision_is_autocast_with_weights_in_float32_and_a_loss_scale_for_fp16(one_rank):
    results = one_rank[0]["low_precision"]
    for (precision, zero_stage), (weights, resumed, dtypes, scales, norms) in results.items():
        autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        expected, _, expected_norms = plain_loop(stage(), autocast=autocast, scale=scales[-1] or 1.0)
        assert norms == pytest.approx(expected_norms[:2], rel=0.02), (precision, zero_stage)  # without the loss scale
        assert autocast in dtypes and torch.float32 in dtypes
        for name, tensor in expected.items():
            assert weights[name].dtype == tensor.dtype
            # Adam divides by the gradient's size: where that is rounding only, steps of up to lr go either way.
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=sum(LR) / 2, msg=f"{precision} {name}")
            assert (weights[name].float() - tensor.float()).abs().mean() < 2e-4, (precision, zero_stage, name)
            assert resumed[name].equal(weights[name]), (precision, zero_stage, name)
        assert scales == ([65536.0, 32768.0, 32768.0] if precision == "fp16" else [None, None])


def poisoned(rank, world):
    """A gradient that is not finite on rank 1 only."""
    results = {}
    for zero_stage in (0, 1, 2, 3):
        engine, proxies = new_engine(stage(zero_stage=zero_stage), world)
        steps_of(engine, proxies, rank, world, range(1))
        before = engine.weights()
        images, labels = images_and_labels(1, rank, world)
        loss = loss_of(engine(images), labels, proxies)
        engine.backward(loss * (math.nan if rank == 1 else 1.0))
        updated = engine.step(LR[1])
        after = engine.weights()
        steps_of(engine, proxies, rank, world, range(2, STEPS))
        results[zero_stage] = updated, before, after, engine.weights()
    return results


def test_a_gradient_that_is_not_finite_on_one_rank_changes_no_weight_on_any(two_ranks):
    ranks = [results["poisoned"] for results in two_ranks]
    for results in ranks:
        for zero_stage, (updated, before, after, final) in results.items():
            assert updated is False, zero_stage
            assert all(after[name].equal(tensor) for name, tensor in before.items()), zero_stage
            assert all(tensor.isfinite().all() for tensor in final.values()), zero_stage
    for name, tensor in ranks[0][0][3].items():  # the steps after it are alike at every stage
        assert all(ranks[0][zero_stage][3][name].equal(tensor) for zero_stage in (1, 2, 3)), name


def recompute(rank, world):
    results = []
    for checkpoint_activations in (False, True):
        changes = {"freeze_batch_norm": False, "checkpoint_activations": checkpoint_activations}
        engine, proxies = new_engine(stage(), world, **changes)
        steps_of(engine, proxies, rank, world, range(STEPS))
        results.append(engine.weights())
    return results


def test_recomputed_activations_change_nothing_batch_norm_statistics_included(one_rank):
    plain, recomputed = one_rank[0]["recompute"]
    assert any("running_mean" in name for name in plain)
    for name, tensor in plain.items():
        torch.testing.assert_close(recomputed[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def compiled(choice):
    """Whether torch would compile the backbone at its first call; `test_stage_one_loop.py` lets it, in a long test."""
    engine = Engine(tiny_model(), stage(compile=choice), 1, "cpu")
    return engine.model.backbone._compiled_call_impl is not None


def test_the_backbone_is_compiled_on_request(one_rank):
    assert one_rank[0]["compiled"] == [False, True]


def refused(world):
    config = stage(optimiser={"name": "deepspeed"}, deepspeed={"optimizer": {"type": "Lion"}})
    with pytest.raises(UserError) as error:
        Engine(tiny_model(), config, world, "cpu")
    return str(error.value)


def test_what_deepspeed_refuses_is_told_with_its_reason(one_rank):
    message = (
        r"^DeepSpeed refuses stage_one.deepspeed = \{'optimizer': \{'type': 'Lion'\}\} on cpu \(.*not .*implemented on "
        r"CPU.*\); change or leave out what it names$"
    )
    assert re.match(message, one_rank[0]["refused"])
