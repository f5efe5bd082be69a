"""Stage two's search where val is small or far away: folds by groups, the metric that chooses, features in a bucket."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.storage import open_storage
from tests.test_search import CLOSED, COUNTS, DIM, NUM_CLASSES, clusters, write_clusters
from trainer.heads import Head, HeadSpec
from trainer.metrics import METRICS
from trainer.stage_two import train_heads
from tuning.block import BlockTrial
from tuning.config import StageTwoConfig
from tuning.folds import assign_folds
from tuning.space import draw_specs
from tuning.stage_two import search_heads

FOLDS = 3
FAMILIES = ("crt", "lws", *CLOSED)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_clusters(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def own():
    x, labels = clusters(0, COUNTS)
    nothing = Head(torch.zeros(NUM_CLASSES, DIM), torch.zeros(NUM_CLASSES))
    return train_heads([HeadSpec("crt", power=1.0, lr=10.0, epochs=20)], x, labels, COUNTS, nothing)[0]


def held_out_logits(spec, own):
    """Of each sample of val by a head that was trained on train and the other folds, one fold after the other."""
    (x, labels), (val, val_labels) = clusters(0, COUNTS), clusters(1, np.full(NUM_CLASSES, 20))
    fold = assign_folds(val_labels, np.array([f"val{row}" for row in range(len(val))]), FOLDS)
    logits = torch.zeros(len(val), NUM_CLASSES)
    for k in range(FOLDS):
        seen = fold != k
        seen_labels = np.concatenate([labels, val_labels[seen]])
        counts = np.bincount(seen_labels, minlength=NUM_CLASSES)
        head = train_heads([spec], np.concatenate([x, val[seen]]), seen_labels, counts, own)[0]
        logits[torch.from_numpy(~seen)] = head.logits(torch.from_numpy(val[~seen]))
    return logits, val_labels


class TestFolds:
    config = StageTwoConfig(heads=20, heads_per_trial=8, families=FAMILIES, folds=FOLDS, seeds=1)

    @pytest.fixture(scope="class")
    def result(self, ray_session, features, own, tmp_path_factory):
        return search_heads(features, own, NUM_CLASSES, self.config, 0, str(tmp_path_factory.mktemp("search")))

    def test_every_head_is_scored_on_folds_that_it_did_not_see(self, result, own):
        assert result.folds == FOLDS
        for row, spec in zip(result.rows[1:], draw_specs(self.config, 0), strict=True):
            logits, labels = held_out_logits(spec, own)
            expected = METRICS["balanced_accuracy"](labels, logits.argmax(dim=1).numpy(), NUM_CLASSES)
            assert row["score"] == pytest.approx(expected, abs=0.011), spec  # one sample of 100 may be a tie

    def test_the_temperature_is_fitted_on_what_was_held_out(self, result, own):
        spec = draw_specs(self.config, 0)[result.best_row("crt")["head"] - 1]
        logits, labels = held_out_logits(spec, own)
        fitted, target = result.best_row("crt")["temperature"], torch.from_numpy(labels)
        grid = np.geomspace(fitted / 3, fitted * 3, 501)  # its middle is the fitted one
        loss = [float(torch.nn.functional.cross_entropy(logits / t, target)) for t in grid]
        assert grid[int(np.argmin(loss))] == pytest.approx(fitted, rel=0.02)

    def test_the_kept_head_has_learnt_from_all_of_val(self, result, own):
        (x, labels), (val, val_labels) = clusters(0, COUNTS), clusters(1, np.full(NUM_CLASSES, 20))
        everything, counts = np.concatenate([labels, val_labels]), COUNTS + 20
        spec = draw_specs(self.config, 0)[result.best_row("crt")["head"] - 1]
        expected = train_heads([spec], np.concatenate([x, val]), everything, counts, own)[0]
        assert torch.allclose(result.heads["crt"].weight, expected.weight, atol=1e-4)

    def test_kept_heads_of_many_classes_come_in_trials_of_few(self, ray_session, features, own, tmp_path, monkeypatch):
        monkeypatch.setattr("tuning.stage_two.LOGITS_BYTES", 2 * 4 * 20 * NUM_CLASSES**2)  # of two heads
        few = search_heads(features, own, NUM_CLASSES, self.config, 0, str(tmp_path))
        assert len(list(tmp_path.glob("chosen-*/blocks/*.safetensors"))) == 3  # five families
        assert len(list(tmp_path.glob("heads-*/blocks/*.safetensors"))) == 3  # of eight heads
        assert set(few.heads) == {"own", *FAMILIES}


@pytest.mark.parametrize("metric", ["macro_f1", "worst_recall"])
def test_the_winner_is_the_best_by_the_metric_that_was_asked_for(ray_session, features, own, tmp_path, metric):
    config = StageTwoConfig(heads=60, families=("crt", "tau_norm"), folds=1, seeds=1, select_by=metric)
    result = search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path))
    assert all(row["score"] == row[metric] for row in result.rows)
    assert result.best_row(result.winner)["score"] == max(row[metric] for row in result.rows)
    assert len({tuple(row[name] for name in METRICS if name in row) for row in result.rows}) > 10


class Elsewhere(BlockTrial):
    """A trial on a machine with a disk of its own: its cache folder is another one than the driver's."""

    def setup(self, config, job=None):
        os.environ["XDG_CACHE_HOME"] = f"{os.getcwd()}/other-machine"
        super().setup(config, job)
        copies = list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.arrow"))
        assert len(copies) == 2, copies


@pytest.mark.long
def test_trials_on_other_machines_fetch_the_features_of_a_bucket(
    ray_session, moto_s3, features, own, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"{moto_s3}/elsewhere/features/stage_one"
    for file in features.iterdir():
        open_storage(uri).upload(file, file.name)
    config = StageTwoConfig(heads=12, heads_per_trial=6, families=("crt",), folds=1, seeds=1)
    there = search_heads(uri, own, NUM_CLASSES, config, 0, f"{moto_s3}/elsewhere/stage_two", trial=Elsewhere)
    here = search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path / "here"))
    assert [row["status"] for row in there.rows] == ["done"] * 13
    assert there.rows == here.rows
