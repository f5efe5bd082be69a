"""`rarelens plan`: each part of the model against an oracle: by hand, timm, gloo's real messages, a real checkpoint."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch.distributed as dist
from typer.testing import CliRunner

import rarelens
from cluster.errors import UserError
from data_pipeline.dataset import open_dataset
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.engines import BATCH, images_and_labels, prepare, stage, tiny_model
from tests.gloo import run_gloo
from tests.loop import loop
from tests.packed import write_packed
from tests.tiny import tiny_config
from trainer.engine import Engine
from trainer.machine import A100, CPU, L4, MACHINES, machine
from trainer.messages import Ring, step_messages
from trainer.network_size import network_size
from trainer.plan import (
    DataSize,
    checkpoint_sizes,
    device_memory,
    images_of_largest_worker,
    predict,
    ring_of,
    s3_epoch_bytes,
)
from trainer.plan_report import data_size
from tuning.config import Config

DATA = DataSize(4189, 900, 7, body_bytes=0.0, tail_bytes=55_565_824.0, val_bytes=11_881_984.0)
LOSSES = {"loss": {"name": "supervised_contrastive"}, "views": 2, "log_every_steps": 1000}


def config_of(px=32, backbone="test_resnet", **stage_one):
    return Config.model_validate({"data": {"image_px": px}, "model": {"backbone": backbone}, "stage_one": stage_one})


# ---- messages


def test_rings_by_hand():
    ring = Ring(world=4, bytes_per_s=1e9, latency_s=1e-5)
    assert ring.gather_bytes(4e6) == 3e6
    assert ring.gather_s(4e6) == pytest.approx(3 * 1e-5 + 3e-3)
    assert ring.all_reduce_bytes(4e6) == 6e6 and ring.all_reduce_s(4e6) == pytest.approx(2 * (3 * 1e-5 + 3e-3))
    alone = Ring(1, 1e9, 1e-5)
    assert alone.all_reduce_s(4e6) == 0 == alone.all_reduce_bytes(4e6)


def test_messages_of_a_step_by_hand():
    # 2 workers of 32 images, 1 view, D = 128, 1,000,000 weights; each worker sends half of what is gathered.
    found = step_messages(config_of(views=1).stage_one, Ring(2, 1e9, 0.0), longest=32, dim=128, parameters=1_000_000)
    assert found.pool_backward_bytes == 64 * 128 * 4 / 2
    assert found.pool_forward_bytes == (64 * 128 * 4 + 64 * 8 + 2 * 4 * 8) / 2
    assert found.gradient_bytes == 4_000_000
    assert found.gradient_s == pytest.approx(4e-3)
    sharded = step_messages(config_of(views=1, zero_stage=3).stage_one, Ring(2, 1e9, 0.0), 32, 128, 1_000_000)
    assert sharded.gradient_bytes == 6_000_000


def count_messages(rank, world, folder):
    """Bytes that a ring would send from each worker for what the loop hands to gloo, a step, by kind of message."""
    sent = {}
    prepare(rank, world)

    def counted(name, array, times):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            tensor = kwargs.get(array[0], args[array[1]] if len(args) > array[1] else None)
            key = (name, str(tensor.dtype), tensor.numel())
            sent[key] = sent.get(key, 0) + times * (world - 1) / world * tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return original, call

    patched = {
        "all_gather_into_tensor": counted("all_gather_into_tensor", ("output_tensor", 0), 1),
        "reduce_scatter_tensor": counted("reduce_scatter_tensor", ("input", 1), 1),
        "all_reduce": counted("all_reduce", ("tensor", 0), 2),
    }
    for name, (_, call) in patched.items():
        setattr(dist, name, call)
    try:
        loop(rank, world, loop_config(folder, "counted"), Path(folder))
    finally:
        for name, (original, _) in patched.items():
            setattr(dist, name, original)
    of_loop = dict(sent)  # DeepSpeed has kept the counting functions for its later engines
    memory = {}
    for zero in (0, 1, 2):
        engine = Engine(tiny_model(), stage(zero_stage=zero), world, "cpu")
        images, _ = images_and_labels(0, rank, world)
        engine.backward(engine(images).logits.square().sum())
        engine.step(1e-3)
        inner = getattr(engine._optimiser, "optimizer", engine._optimiser)
        tensors = [t for state in inner.state.values() for t in state.values() if hasattr(t, "nbytes") and t.ndim]
        masters = getattr(engine._optimiser, "single_partition_of_fp32_groups", [])
        memory[zero] = sum(t.nbytes for t in [*tensors, *masters])
    return of_loop, memory


def loop_config(folder, run, **stage_one):
    settings = {"batch_size": 32, "epochs": 1, **LOSSES, **stage_one}
    return tiny_config(Path(folder) / "images", run, stage_one=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = loop_config(folder, "packed")
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    return folder


@pytest.fixture(scope="module")
def counted(folder):
    return run_gloo(count_messages, 2, str(folder))


def test_a_steps_messages_are_those_that_gloo_is_given(folder, counted):
    config = loop_config(folder, "counted")
    dataset = open_dataset(str(folder / "dataset"))
    steps = len(dataset.index("train")) // 32
    network = network_size(config, len(dataset.classes))
    expected = step_messages(config.stage_one, Ring(2, 1e9, 0.0), 16, network.dim, network.parameters)
    for sent, _ in counted:
        of_pool = sum(n for (name, kind, _), n in sent.items() if name == "reduce_scatter_tensor" and "float" in kind)
        assert of_pool == expected.pool_backward_bytes * steps
        forward = sum(n for (name, _, _), n in sent.items() if name == "all_gather_into_tensor")
        assert forward == expected.pool_forward_bytes * steps
        gradient = sum(n for (name, _, size), n in sent.items() if name == "all_reduce" and size == network.parameters)
        assert gradient == expected.gradient_bytes * steps
        sums = sum(n for (name, kind, _), n in sent.items() if name == "all_reduce" and kind == "torch.float64")
        assert sums >= expected.sums_bytes * steps


# ---- the network


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_parameters_are_timms_and_the_heads(name):
    config = config_of(64, name, loss={"name": "none"})
    backbone = timm.create_model(name, num_classes=0)
    features = backbone.num_features
    heads = features * 512 + 512 + 512 * 128 + 128 + features * 7 + 7
    assert network_size(config, 7).parameters == sum(p.numel() for p in backbone.parameters()) + heads


def test_proxies_are_trained_too():
    with_proxies = network_size(config_of(loss={"name": "proxy_anchor"}), 7)
    assert with_proxies.of_loss == 7 * 128
    assert with_proxies.parameters == network_size(config_of(), 7).parameters + 7 * 128


def test_resnet50_has_its_published_arithmetic_and_speed():
    # He et al. 2016: 3.8e9 multiply-adds; v1.5, whose stride is in the 3x3 convolution: 4.1e9.
    network = network_size(config_of(224, "resnet50"), 1000)
    assert network.forward_flop / 2 == pytest.approx(4.1e9, rel=0.02)
    # NVIDIA's figure for the A100 80GB, from which the constants come; TF32 is published at 938, a third lower.
    a100_80 = replace(A100, memory_bytes_per_s=2.039e12)
    assert 1 / a100_80.image_s(network.forward_flop, network.kept_bytes / 2, "bf16") == pytest.approx(2470, rel=0.05)
    assert 1 / a100_80.image_s(network.forward_flop, network.kept_bytes, "fp32") == pytest.approx(938, rel=0.35)


# ---- memory and checkpoints


def test_optimiser_states_are_those_of_the_real_tensors(counted):
    network = network_size(config_of(backbone="test_resnet"), 4)
    parameters = sum(p.numel() for p in tiny_model().parameters())
    network = replace(network, parameters=parameters)
    for zero in (0, 1, 2):
        config = config_of(zero_stage=zero, batch_size=BATCH)
        expected = device_memory(config, network, CPU, workers=2, images=4).optimiser
        real = np.mean([memory[zero] for _, memory in counted])  # ranks' parts are padded to one size
        assert real == pytest.approx(expected, rel=0.001), zero


def test_memory_by_hand():
    network = replace(network_size(config_of(), 7), parameters=1_000_000, buffer_bytes=0, kept_bytes=1000.0, dim=100)
    config = config_of(batch_size=64, views=2, ema_decay=0.99, precision="bf16", memory={"rows": 1000})
    found = device_memory(config, network, L4, workers=2, images=32)
    assert (found.weights, found.gradients, found.optimiser, found.moving_average) == (4e6, 4e6, 8e6, 4e6)
    assert found.activations == 64 * 500 and found.pool == 3 * (128 + 1000) * 100 * 4
    assert found.message_buffers == 4e6 and found.runtime == L4.runtime_bytes
    assert found.total == 4e6 + 4e6 + 8e6 + 4e6 + 32000 + 1353600 + 4e6 + L4.runtime_bytes
    third = device_memory(config_of(zero_stage=3), network, L4, workers=4, images=8)
    assert (third.weights, third.gradients, third.optimiser) == (1e6, 1e6, 3e6)


@pytest.mark.parametrize("zero", [0, 1])
def test_checkpoint_size_is_that_of_a_real_one(folder, zero):
    run = f"saved-{zero}"
    run_gloo(save_once, 2, str(folder), run, zero)
    real = sum(path.stat().st_size for path in (folder / run / "epoch-0000").rglob("*") if path.is_file())
    config = loop_config(folder, run, zero_stage=zero)
    network = network_size(config, len(open_dataset(str(folder / "dataset")).classes))
    total, of_rank_0, of_machine = checkpoint_sizes(config.stage_one, network, 2, 2)
    assert real == pytest.approx(total, rel=0.1)
    assert of_rank_0 <= of_machine <= total


def save_once(rank, world, folder, run, zero):
    loop(rank, world, loop_config(folder, run, zero_stage=zero), Path(folder))


# ---- the whole


def test_a_prediction_by_hand():
    config = config_of(128, "tf_efficientnet_lite0", batch_size=64, views=1, epochs=8)
    network = network_size(config, 7)
    plain = replace(L4, images_per_s=640.0, step_overhead_s=0.0, network_latency_s=0.0, link_latency_s=0.0)
    one, two = (predict(config, DATA, network, plain, workers) for workers in (1, 2))
    assert one.step_s == pytest.approx(0.1) and one.images_per_s == pytest.approx(640)
    assert one.steps_per_epoch == 65 and one.epoch_s == pytest.approx(6.5)
    assert two.step_s == pytest.approx(0.05 + two.messages.step_s)
    assert two.messages.gradient_s == pytest.approx(4 * network.parameters / plain.network_bytes_per_s)
    assert one.s3_first_epoch_bytes == DATA.tail_bytes + DATA.val_bytes
    assert two.s3_first_epoch_bytes == 2 * DATA.tail_bytes + DATA.val_bytes
    assert one.cost_usd == pytest.approx(one.wall_h * plain.price_per_h)
    assert two.cost_usd == pytest.approx(two.wall_h * plain.price_per_h * 2)
    seconds = 20 + 8 * (6.5 + one.validation_s + one.snapshot_s) + one.upload_s
    assert one.wall_h == pytest.approx(seconds / 3600) and one.validation_s == pytest.approx(900 / 640 / 3)


def test_decoding_bounds_a_step_where_cores_are_few():
    config = config_of(224, batch_size=64, views=2)
    slow = replace(L4, images_per_s=1e6, cores=1, decode_images_per_s_core=100.0)
    assert predict(config, DATA, network_size(config, 7), slow, 1).step_s == pytest.approx(1.28)


def test_workers_that_share_devices_get_their_share():
    machine_ = replace(CPU, crowded_rate=0.75)
    assert [machine_.rate_share(busy) for busy in (1, 2, 4)] == [1.0, 0.75, 0.375]


def test_rings_are_as_fast_as_their_slowest_link():
    assert ring_of(A100, 8, 1).bytes_per_s == A100.link_bytes_per_s
    assert ring_of(A100, 16, 2).bytes_per_s == A100.network_bytes_per_s


@pytest.mark.parametrize(
    ("workers", "images", "note"),
    [
        (8, 8, ""),
        (3, 24, "data.streams = 8 is no multiple of 3"),
        (16, 4, "set data.streams=16"),
        (256, 1, "192 of the workers have no image: raise stage_one.batch_size to 256"),
    ],
)
def test_what_is_wrong_with_a_number_of_workers_is_said(workers, images, note):
    config = config_of(batch_size=64)
    assert images_of_largest_worker(64, 8, workers) == images
    found = predict(config, DATA, network_size(config, 7), L4, workers)
    assert found.images_per_worker == images
    assert note in "; ".join(found.notes) and bool(note) == bool(found.notes)


def test_what_does_not_fit_is_said():
    config = config_of(512, "resnet50", batch_size=512)
    found = predict(config, DATA, network_size(config, 7), L4, 1)
    assert "does not fit: set stage_one.micro_batch_size" in found.notes[0]


def test_bytes_of_the_bucket_by_hand():
    config = config_of(epochs=3)
    body = replace(DATA, body_bytes=64 * 2**30)
    first, later = s3_epoch_bytes(config, body, 1)
    assert first == body.body_bytes + body.tail_bytes + body.val_bytes
    assert later == pytest.approx(14 * 2**30)  # a cache of 50 GiB
    first, later = s3_epoch_bytes(config, replace(body, body_bytes=40 * 2**30), 2)
    window = 4 * 64 * 2**20
    assert first == 40 * 2**30 + 2 * window + 2 * body.tail_bytes + body.val_bytes
    assert later == pytest.approx((40 * 2**30 + 2 * window) * (1 / 2 + 1 / 4) / 2)


def test_more_workers_never_take_more_memory_or_longer_without_messages():
    config = config_of(batch_size=64)
    free = {"network_bytes_per_s": math.inf, "link_bytes_per_s": math.inf, "network_latency_s": 0, "link_latency_s": 0}
    for kind in MACHINES.values():
        network = network_size(config, 7)
        found = [predict(config, DATA, network, replace(kind, crowded_rate=1.0, **free), n) for n in (1, 2, 4, 8)]
        assert all(a.step_s >= b.step_s for a, b in pairwise(found))
        assert all(a.memory.activations > b.memory.activations for a, b in pairwise(found))


# ---- the command


def test_the_command_writes_table_and_json(tmp_path):
    write_packed(tmp_path / "packed", {"train": [200, 60, 20], "val": [4, 4, 4]}, [2], distinct=4)
    options = [f"data.packed={tmp_path / 'packed'}", "--gpus", "24", "--json", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(rarelens.app, ["plan", "configs/quickstart.yaml", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [item["workers"] for item in found["predictions"]] == [1, 2, 4, 8, 16, 24, 64, 256, 1024]
    assert found["data"]["train_images"] == 280 and found["data"]["num_classes"] == 3
    assert "not measured" in found["machine"]["source"]
    assert "not measured" in result.output and "1024" in result.output


def test_rates_of_this_machine_can_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.plan_measure.MEASURED_S", 0.05)
    options = ["--images", "1000", "--machine", "cpu", "--measure", "--json", str(tmp_path / "plan.json")]
    overrides = ["model.backbone=test_resnet", "data.image_px=64"]
    result = CliRunner().invoke(rarelens.app, ["plan", "configs/quickstart.yaml", *overrides, *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "plan.json").read_text())["machine"]
    assert found["images_per_s"] > 0 and found["decode_images_per_s_core"] > 0 and "measured here" in found["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--machine", "h10"], "--machine = 'h10' is not known; did you mean 'h100'?"),
        ([], "nowhere/dataset holds no packed dataset to plan for; give its training images by --images"),
        (["--images", "10", "--measure"], "PyTorch sees none here; measure on such a machine, or plan for this one"),
    ],
)
def test_mistakes_are_told(options, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = CliRunner().invoke(rarelens.app, ["plan", "configs/quickstart.yaml", "run=nowhere", *options])
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_sizes_without_a_dataset_follow_from_the_configuration():
    config = Config.model_validate({"data": {"pack_px": 160, "tail_budget_mib": 1.0}})
    found = data_size(config, 7000, None)
    assert found.val_images == 1500 and found.num_classes == 10
    assert found.tail_bytes == 2**20 and found.body_bytes + found.tail_bytes == 7000 * 160 * 160 * 4 / 3 / 2
    assert machine("l4") is L4
