"""The paper's three settings: what they say, and that they train, with images, network and length made small."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import load_config
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from trainer.heads import Head
from trainer.losses.frequency import effective_number_weights
from trainer.stage_checkpoint import load_classifier
from trainer.stage_two import train_heads
from tuning.config import Config
from tuning.space import draw_specs

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = ("triplet", "center", "supcon")
SKIN7_COUNTS = np.array([6705, 1113, 1099, 514, 327, 142, 115])
SMALL = (
    "source.labels=labels.csv", "source.image_column=image", "source.label_column=label", "source.group_column=group",
    "data.pack_px=43", "data.image_px=32", "data.decode_threads=1", "model.backbone=test_resnet", "model.weights=null",
    "stage_one.epochs=1", "stage_one.log_every_steps=1",
)  # fmt: skip


def paper(name, *overrides):
    return load_config(Config, CONFIGS / f"paper_{name}.yaml", list(overrides))


def small(name, folder):
    return paper(name, *SMALL, f"source.path={folder / 'images'}", f"run={name}")


def test_what_all_three_have_in_common():
    for config in map(paper, NAMES):
        stage, augment = config.stage_one, config.data.augment
        assert (config.model.backbone, config.model.weights) == ("resnet50.tv_in1k", "timm")
        assert (stage.epochs, stage.batch_size, stage.classification.name) == (100, 32, "cross_entropy")
        assert stage.sampling.power == 1 and stage.sampling.samples_per_class is None
        optimiser = stage.optimiser
        assert (optimiser.name, optimiser.momentum, optimiser.lr) == ("sgd", 0.9, 1e-3)  # ours is Nesterov's
        assert (optimiser.weight_decay, optimiser.warmup_epochs, optimiser.schedule) == (5e-4, 5, "cosine")
        assert (config.data.pack_px, config.data.image_px) == (300, 224)
        assert round(config.data.image_px * config.data.resize_ratio) == 300
        assert (augment.rotate_deg, augment.flip_horizontal) == (30, True)
        assert augment.scale_min == pytest.approx((224 / 300) ** 2, rel=1e-3)
        assert config.stage_two.families == ("reweighted",) and config.stage_two.space.epochs == (10, 10)
        weights = effective_number_weights(torch.from_numpy(SKIN7_COUNTS), config.stage_two.space.beta[0])
        torch.testing.assert_close(
            weights, effective_number_weights(torch.from_numpy(SKIN7_COUNTS), 1.0), rtol=1e-3, atol=0
        )


def test_the_papers_losses():
    triplet, center, supcon = (paper(name).stage_one for name in NAMES)
    for stage in (triplet, center):
        assert (stage.loss.compare, stage.loss.normalise, stage.views) == ("feature", False, 1)
    assert (triplet.loss.name, triplet.loss.margin, triplet.loss.weight) == ("batch_hard_triplet", 50, 0.03)
    assert (center.loss.name, center.loss.weight) == ("centre", 0.07)
    assert center.loss.lr_ratio * center.loss.weight * center.optimiser.lr == pytest.approx(5e-3, rel=1e-3)
    assert (supcon.loss.name, supcon.loss.temperature, supcon.loss.weight) == ("supervised_contrastive", 0.05, 1)
    assert (supcon.views, supcon.loss.compare) == (2, "embedding")
    model = paper("supcon").model
    assert (model.hidden_dim, model.embedding_dim) == (512, 128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = small("supcon", folder)
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    return folder


@pytest.fixture(scope="module")
def lines(folder):
    """What each of the three tells while it trains on two ranks."""
    return run_gloo(train_each, 2, folder)[0]


def train_each(rank, world, folder):
    return {name: loop(rank, world, small(name, folder), folder) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_leaves_a_model(name, folder, lines):
    config = small(name, folder)
    steps = [line for line in lines[name] if line["kind"] == "step"]
    assert len(steps) > 3
    for line in steps:
        assert (
            math.isfinite(line["loss"])
            and line["metric_loss"] > 0
            and line["metric_weight"] == config.stage_one.loss.weight
        )
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["metric_weight"] * line["metric_loss"])
        assert line["pool_rows"] == 32 * config.stage_one.views
    (epoch,) = (line for line in lines[name] if line["kind"] == "epoch")
    assert 0 < epoch["balanced_accuracy"] <= 1
    model = load_classifier(folder / name / "epoch-0000", config, 16)
    output = model(torch.randn(2, 3, 32, 32))
    unit = (output.embeddings.norm(dim=1) - 1).abs().max() < 1e-5
    assert bool(unit) is config.stage_one.loss.normalise


def test_raw_features_are_compared_with_a_margin_of_50(lines):
    """The tiny network's features lie close together: 50 + farthest positive - nearest negative is about 50."""
    first = next(line for line in lines["triplet"] if line["kind"] == "step")
    assert 45 < first["metric_loss"] < 60


def test_their_stage_two_trains_heads():
    config = paper("supcon").stage_two
    specs = draw_specs(config, 0)[:2]
    assert {(spec.family, spec.epochs) for spec in specs} == {("reweighted", 10)}
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [60, 20, 10])
    features = (3 * np.eye(8)[labels] + rng.normal(size=(90, 8))).astype(np.float16)
    own = Head(torch.zeros(3, 8), torch.zeros(3))
    for head in train_heads(specs, features, labels, np.array([60, 20, 10]), own):
        predicted = head.logits(torch.from_numpy(features)).argmax(1).numpy()
        assert (predicted == labels).mean() > 0.8
