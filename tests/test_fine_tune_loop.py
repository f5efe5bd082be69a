"""Fine-tuning on two real ranks: what moves and what does not, batch norm's statistics, going on after a stop."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import open_dataset
from data_pipeline.loader import TrainLoader
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from tests.tiny import tiny_config
from trainer.finetune import fine_tuning
from trainer.heads import Head, save_heads
from trainer.stage_checkpoint import load_classifier
from trainer.starting_point import HEAD, StartingPoint
from trainer.validation import reestimate_batch_norm

CLASSES = 16
STATISTICS = ("running_mean", "running_var")


def config_of(folder, run, **sections):
    stage = {"batch_size": 32, "epochs": 1, "views": 1, "log_every_steps": 1, "optimiser": {"warmup_epochs": 0.5}}
    sections["stage_one"] = {**stage, **sections.get("stage_one", {})}
    return tiny_config(Path(folder) / "images", run, **sections)


def start_head(normalise=False):
    weight = torch.randn(CLASSES, 96, generator=torch.Generator().manual_seed(5)) * 0.05
    return Head(weight, torch.linspace(-1, 1, CLASSES), normalise)


def tuned(rank, world, folder, name, winner=None, stop_after=None, stage_one=None, head=None, **fine_tune):
    """Fine-tune in a folder of its own; what rank 0 was told."""
    settings = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0.1, **fine_tune}
    config = config_of(folder, name, fine_tune=settings, stage_one=stage_one or {})
    head = head or start_head()
    tuning = fine_tuning(config, winner or {"winner": "crt", "power": 0.0}, head, "balanced_accuracy")
    if rank == 0:
        Path(folder, f"{name}.heads").write_bytes(save_heads({HEAD: head}))
    torch.distributed.barrier()
    reestimate = config.fine_tune.batch_norm == "reestimated"
    start = StartingPoint(str(folder), "first/epoch-0000", f"{name}.heads", config.fine_tune.blocks, reestimate)
    return loop(rank, world, tuning.config, Path(folder), stop_after, start=start)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = config_of(folder, "packed")
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return run_gloo(on_two_ranks, 2, str(folder))


@pytest.fixture(scope="module")
def told(ranks):
    return ranks[0]


def small_network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, momentum=0.3), torch.nn.ReLU()).eval()


def small_batches(rank):
    """Two of rank 0's, of different size, and two of rank 1's."""
    generator = torch.Generator().manual_seed(rank)
    sizes = (6, 5 - rank)
    return [SimpleNamespace(images=3 + rank * torch.randn(size, 3, 8, 8, generator=generator)) for size in sizes]


def statistics(rank):
    """What a rank holds after re-estimation, and the momentum that it goes on with."""
    network = small_network()
    reestimate_batch_norm(network, network, small_batches(rank))
    return network[1].running_mean, network[1].running_var, network[1].momentum


def on_two_ranks(rank, world, folder):
    """All that is looked at with two ranks: DeepSpeed takes seconds to import."""
    loop(rank, world, config_of(folder, "first"), Path(folder))

    def run(name, **options):
        return tuned(rank, world, folder, name, **options)

    prior = {"winner": "logit_adjusted", "tau": 1.0}
    return {
        "statistics": statistics(rank),
        "last": run("last", epochs=2),
        "stopped": run("stopped", epochs=2, stop_after=0) + run("stopped", epochs=2),
        "head": run("head", blocks=0, winner=prior),
        "all": run("all", blocks="all", batch_norm="reestimated"),
        "average": run("average", batch_norm="reestimated", stage_one={"ema_decay": 0.5}),
        "zero": run("zero", epochs=2, stage_one={"zero_stage": 2}),
        "unit": run("unit", winner={"winner": "lws", "power": 0.0}, head=start_head(normalise=True)),
    }


def weights(folder, run, epoch=0):
    return load_file(folder / run / f"epoch-{epoch:04d}" / "weights.safetensors")


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name]) and "num_batches" not in name}


def steps(lines):
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "step"}


def test_only_the_last_block_and_the_head_move_and_frozen_statistics_stay(folder, told):
    before, after = weights(folder, "first"), weights(folder, "last", 1)
    changed = moved(before, after)
    assert {name.split(".")[1] for name in changed if name.startswith("backbone.")} == {"layer4"}
    assert not any(name.endswith(STATISTICS) or name.startswith("embedding.") for name in changed)
    # every parameter of the block learns, batch norm's scale and bias too
    block = {name for name in before if name.startswith("backbone.layer4.") and "num_batches" not in name}
    assert changed >= {name for name in block if not name.endswith(STATISTICS)}
    assert {line["kind"] for line in told["last"]} == {"engine", "step", "epoch"}
    assert all("metric_loss" not in line for line in told["last"])


def test_it_starts_from_the_head_it_was_given(folder, told):
    after = weights(folder, "last")
    start = start_head()
    distance = (after["classifier.weight"] - start.weight).abs().max()
    assert (
        0 < distance < 0.05 < (after["classifier.weight"] - weights(folder, "first")["classifier.weight"]).abs().max()
    )


def test_with_no_block_the_head_alone_moves(folder, told):
    changed = moved(weights(folder, "first"), weights(folder, "head"))
    assert changed == {"classifier.weight", "classifier.bias"}


def test_the_first_loss_is_the_one_that_was_asked_for(folder, told):
    """Logit-adjusted loss of the start head on the first batch of natural sampling, by hand."""
    config = config_of(folder, "head")
    dataset = open_dataset(str(folder / "dataset"))
    model = load_classifier(folder / "first/epoch-0000", config, CLASSES)
    prior = torch.from_numpy(np.log(dataset.class_counts("train") / dataset.class_counts("train").sum()))
    with torch.no_grad():
        terms = [
            torch.nn.functional.cross_entropy(
                start_head().logits(model.features(batch.images)).double() + prior, batch.labels, reduction="none"
            )
            for batch in (next(batches(folder, config, rank, power=1.0)) for rank in range(2))
        ]
    assert steps(told["head"])[1] == pytest.approx(float(torch.cat(terms).mean()), rel=1e-4)


def test_a_stopped_fine_tuning_goes_on_as_if_nothing_had_happened(folder, told):
    assert len(steps(told["last"])) == 10
    assert steps(told["stopped"]) == steps(told["last"])
    assert not moved(weights(folder, "last", 1), weights(folder, "stopped", 1))


def test_zero_2_follows_the_losses_of_zero_0(told):
    for step, loss in steps(told["last"]).items():
        assert steps(told["zero"])[step] == pytest.approx(loss, rel=1e-4)


def test_a_head_on_features_of_unit_length_learns_as_one(folder, told):
    start, after = start_head(normalise=True), weights(folder, "unit")
    assert 0 < (after["classifier.bias"] - start.bias).abs().max() < 0.05
    assert {line["kind"] for line in told["unit"]} == {"engine", "step", "epoch"}


def batches(folder, config, rank, power=0.0):
    loader = TrainLoader(
        open_dataset(str(folder / "dataset")),
        config.data,
        batch_size=32,
        views=1,
        sampling=SamplingConfig(power=power),
        seed=config.seed,
        rank=rank,
        world=2,
        device=torch.device("cpu"),
    )
    try:
        yield from loader.epoch(0)
    finally:
        loader.close()


def test_reestimated_statistics_are_plain_means_over_batches_and_ranks_and_equal_on_all(ranks):
    network = small_network()
    with torch.no_grad():
        outputs = [[network[0](batch.images).double() for batch in small_batches(rank)] for rank in range(2)]
    mean = torch.stack([x.mean((0, 2, 3)) for rank in outputs for x in rank]).mean(0)
    variance = torch.stack([x.var((0, 2, 3), correction=1) for rank in outputs for x in rank]).mean(0)
    for rank in ranks:
        running_mean, running_var, momentum = rank["statistics"]
        assert torch.allclose(running_mean.double(), mean, atol=1e-5) and momentum == 0.3
        assert torch.allclose(running_var.double(), variance, atol=1e-5)
        assert running_mean.equal(ranks[0]["statistics"][0]) and running_var.equal(ranks[0]["statistics"][1])


@pytest.mark.parametrize("run", ["all", "average"])
def test_reestimated_statistics_are_those_of_a_plain_pass_over_the_sampled_images(folder, told, run):
    """Torch's own `update_bn` on each rank's batches with the weights as they were saved, then the mean over ranks."""
    config = config_of(folder, run)
    saved = weights(folder, run)
    parts = []
    for rank in range(2):
        model = load_classifier(folder / run / "epoch-0000", config, CLASSES)
        update_bn((batch.images for batch in batches(folder, config, rank)), model)
        parts.append(model.state_dict())
    names = [name for name in saved if name.endswith(STATISTICS)]
    assert len(names) == 30
    before = weights(folder, "first")
    for name in names:
        expected = (parts[0][name] + parts[1][name]) / 2
        assert torch.allclose(saved[name], expected, rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(saved[name], before[name], rtol=1e-3), name
    learnt = {name.split(".")[1] for name in moved(before, saved) if name.startswith("backbone.") and name not in names}
    assert learnt == ({"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"} if run == "all" else {"layer4"})
