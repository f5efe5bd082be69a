"""Stage two's search: what it tries, with Ray Tune for real; trials that die, drivers that are killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch
from ray import tune
from rich.console import Console

import cluster.launch
import cluster.progress
import trainer.extraction
import trainer.stage_checkpoint
import tuning.stage_two
from cluster.config import parse_config
from cluster.errors import UserError
from cluster.run import RunFolder
from cluster.storage import open_storage
from tests.tiny import tiny_config
from trainer.features import Features, write_manifest, write_part
from trainer.heads import Head, HeadSpec, load_heads
from trainer.metrics import METRICS
from trainer.stage_two import train_heads
from tuning.block import BlockTrial, Job
from tuning.config import StageTwoConfig
from tuning.results import KNOB_TYPES, SCORES, read_results, write_results
from tuning.rounds import _tuner
from tuning.space import draw_specs
from tuning.stage_two import search_heads, search_stage_two

COUNTS = np.array([120, 40, 15, 6, 3])
NUM_CLASSES, DIM = len(COUNTS), 16
TRAINED = ("crt", "balanced_softmax")
CLOSED = ("logit_adjustment", "tau_norm", "nearest_class_mean")


def clusters(seed, counts):
    """Gaussian class clusters."""
    centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, DIM)) * 0.6
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(NUM_CLASSES), counts))
    return (centres[labels] + rng.normal(size=(len(labels), DIM))).astype(np.float16), labels


def write_clusters(folder: Path) -> Path:
    for seed, (split, counts) in enumerate({"train": COUNTS, "val": np.full(NUM_CLASSES, 20)}.items()):
        x, labels = clusters(seed, counts)
        rows = np.arange(len(x))
        names = np.array([f"{split}{row}" for row in rows], dtype=object)
        write_part(folder, split, 0, Features(names, labels, names, rows, x))
    rows = {"train": int(COUNTS.sum()), "val": 20 * NUM_CLASSES}
    write_manifest(folder, backbone="none", checkpoint_sha256="none", dim=DIM, rows=rows, parts=1)
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_clusters(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def own():
    """As stage one leaves it: plain cross-entropy under natural sampling."""
    x, labels = clusters(0, COUNTS)
    spec = HeadSpec("crt", power=1.0, lr=10.0, epochs=20)
    return train_heads([spec], x, labels, COUNTS, Head(torch.zeros(NUM_CLASSES, DIM), torch.zeros(NUM_CLASSES)))[0]


class TestSearch:
    config = StageTwoConfig(heads=60, heads_per_trial=16, families=("crt", "ldam_drw", *CLOSED), folds=1)

    @pytest.fixture(scope="class")
    def result(self, ray_session, features, own, tmp_path_factory):
        return search_heads(features, own, NUM_CLASSES, self.config, 0, str(tmp_path_factory.mktemp("search")))

    def test_every_head_has_a_row_with_its_knobs(self, result):
        specs = draw_specs(self.config, 0)
        assert [row["head"] for row in result.rows] == list(range(61))
        assert result.rows[0]["family"] == "own" and result.rows[0]["trial"] is None
        for row, spec in zip(result.rows[1:], specs, strict=True):
            assert row["family"] == spec.family and row["status"] == "done" and row["trial"] == (row["head"] - 1) // 16
            for knob in KNOB_TYPES:
                assert row[knob] == spec.knobs().get(knob)

    def test_scores_are_those_of_the_heads_made_one_by_one(self, result, own):
        x, labels = clusters(0, COUNTS)
        val, val_labels = clusters(1, np.full(NUM_CLASSES, 20))
        for number in (1, 14, 25, 30, 40, 50, 60):
            row, spec = result.rows[number], draw_specs(self.config, 0)[number - 1]
            head = train_heads([spec], x, labels, COUNTS, own)[0]
            predicted = head.logits(torch.from_numpy(val)).argmax(dim=1).numpy()
            for name in SCORES:
                assert row[name] == pytest.approx(METRICS[name](val_labels, predicted, NUM_CLASSES), abs=0.011)
            assert row["score"] == row["balanced_accuracy"]

    def test_the_best_heads_are_kept_and_score_what_their_rows_say(self, result):
        val, labels = clusters(1, np.full(NUM_CLASSES, 20))
        assert set(result.heads) == {"own", *self.config.families}
        for family, head in result.heads.items():
            predicted = head.logits(torch.from_numpy(val)).argmax(dim=1).numpy()
            score = METRICS["balanced_accuracy"](labels, predicted, NUM_CLASSES)
            assert score == pytest.approx(result.best_row(family)["score"], abs=1e-12)
            assert result.best_row(family)["temperature"] > 0

    def test_the_winner_has_the_highest_lower_bound_of_the_finalists(self, result):
        best = result.best_row(result.winner)
        bounds = {row["head"]: row["lower_bound"] for row in result.rows if row["lower_bound"] is not None}
        assert len(bounds) == self.config.finalists
        assert bounds[best["head"]] == max(bounds.values()) < best["seeds_score"]
        for row in result.rows:
            if row["lower_bound"] is not None and row["family"] in ("crt", "ldam_drw"):
                assert row["seeds"] == self.config.seeds

    def test_the_winner_beats_stage_one_s_classifier_by_more_than_luck(self, result):
        best = result.best_row(result.winner)
        assert 0 < result.luck < best["score"] - result.best_row("own")["score"]
        assert best["score"] > result.best_row("own")["score"] + 0.03

    def test_logit_adjustment_with_tau_zero_is_stage_one_s_classifier(self, result):
        row = next(row for row in result.rows if row["family"] == "logit_adjustment" and row["tau"] == 0)
        assert row["score"] == result.rows[0]["score"]

    def test_results_survive_the_files(self, result, tmp_path):
        write_results(tmp_path, result)
        back = read_results(tmp_path)
        assert back.rows == result.rows and back.winner == result.winner and back.select_by == result.select_by
        assert torch.equal(back.heads[back.winner].weight, result.heads[result.winner].weight)
        assert set(load_heads(tmp_path / "heads.safetensors")) == set(result.heads)
        summary = json.loads((tmp_path / "winner.json").read_text())
        assert summary["winner"] == result.winner and summary["heads"] == 60 and summary["failed"] == 0

    @pytest.mark.long
    def test_a_finished_search_in_a_bucket_is_not_run_again(self, result, features, own, moto_s3):
        class Never(BlockTrial):
            def step(self):
                raise AssertionError("run again")

        first = search_heads(features, own, NUM_CLASSES, self.config, 0, f"{moto_s3}/search")
        again = search_heads(features, own, NUM_CLASSES, self.config, 0, f"{moto_s3}/search", trial=Never)
        assert again.rows == first.rows == result.rows and again.winner == first.winner

    def test_the_terminal_shows_the_best_of_each_family(self, ray_session, features, own, tmp_path, monkeypatch):
        terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
        monkeypatch.setattr(cluster.progress, "console", terminal)
        config = StageTwoConfig(heads=12, heads_per_trial=6, families=("crt", "tau_norm"), folds=1, seeds=1)
        rows = search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path)).rows[1:]
        told = terminal.file.getvalue().partition("stage two: heads of choice")[0]
        last = told[told.rindex("stage two: search") :]
        assert "12/12" in last and "best balanced accuracy on val" in last
        for family, name in (("crt", "cRT"), ("tau_norm", "tau-norm")):
            best = max(row["score"] for row in rows if row["family"] == family)
            (line,) = [line for line in last.splitlines() if name in line]
            assert f"{best:.3f}" in line and str(sum(row["family"] == family for row in rows)) in line

    def test_missing_features_are_named(self, own, tmp_path):
        with pytest.raises(UserError, match=rf"features {tmp_path} hold no features.json"):
            search_heads(tmp_path, own, NUM_CLASSES, self.config, 0, str(tmp_path / "search"))


@pytest.mark.parametrize(("device", "asked"), [("cuda", {"cpu": 1.0, "gpu": 0.25}), ("cpu", {"cpu": 1.0})])
def test_four_trials_share_a_gpu_where_there_is_one(own, tmp_path, monkeypatch, device, asked):
    """From the run's device to what Tune is asked for, without a search between them."""
    given, real = [], tune.with_resources
    monkeypatch.setattr(tune, "with_resources", lambda trial, wants: given.append(wants) or real(trial, wants))
    monkeypatch.setattr(cluster.launch, "start_ray", lambda settings: None)
    monkeypatch.setattr(cluster.launch, "resolve_workers", lambda settings: (1, device))
    monkeypatch.setattr(trainer.extraction, "fetch_checkpoint", lambda run, path: path)
    monkeypatch.setattr(trainer.stage_checkpoint, "load_classifier", lambda *given: Namespace(own_head=lambda: own))

    def make_tuner(*given, gpus_per_trial):
        job = Job("features", [[HeadSpec("crt")]], own, 3, "balanced_accuracy", 1, str(tmp_path / "search"))
        assert isinstance(_tuner(job, [0], gpus_per_trial, BlockTrial, None), tune.Tuner)
        raise InterruptedError

    monkeypatch.setattr(tuning.stage_two, "search_heads", make_tuner)
    run = RunFolder(str(tmp_path))
    run.write_json("stage_one/result.json", {"checkpoint": "stage_one/epoch-0000"})
    with pytest.raises(InterruptedError):
        search_stage_two(tiny_config(tmp_path, tmp_path), Namespace(classes=["a", "b", "c"]), run)
    assert given == [asked]


class TestTrialsThatDie:
    config = StageTwoConfig(heads=24, heads_per_trial=8, families=TRAINED, seeds=1)

    def test_a_killed_trial_is_tried_again(self, ray_session, features, own, tmp_path, monkeypatch):
        class KilledOnce(BlockTrial):
            def step(self):
                mark = tmp_path / f"killed-{self.config['block']}"
                if self.config["block"] == 1 and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().step()

        monkeypatch.chdir(tmp_path)  # trials work in a folder of their own: a relative path must not be theirs
        result = search_heads(features, own, NUM_CLASSES, self.config, 0, "runs/search", trial=KilledOnce)
        assert len(list(tmp_path.glob("runs/search/heads-*/blocks/*.safetensors"))) == 3
        assert (tmp_path / "killed-1").exists()
        assert all(row["status"] == "done" for row in result.rows)

    def test_one_that_dies_again_is_recorded_and_the_others_go_on(self, ray_session, features, own, tmp_path):
        class AlwaysFails(BlockTrial):
            def step(self):
                if self.config["block"] == 1:
                    with open(tmp_path / "tries", "a") as file:
                        file.write("x")
                    raise RuntimeError("no such luck")
                return super().step()

        result = search_heads(features, own, NUM_CLASSES, self.config, 0, str(tmp_path), trial=AlwaysFails)
        assert (tmp_path / "tries").read_text() == "xx"
        failed = [row for row in result.rows if row["status"] == "failed"]
        assert [row["trial"] for row in failed] == [1] * 8
        assert all("no such luck" in row["error"] and row["score"] is None for row in failed)
        assert sum(row["status"] == "done" for row in result.rows) == 17
        write_results(tmp_path / "out", result)
        assert read_results(tmp_path / "out").rows == result.rows
        assert json.loads((tmp_path / "out" / "winner.json").read_text())["failed"] == 8

        mended = search_heads(features, own, NUM_CLASSES, self.config, 0, str(tmp_path))
        assert all(row["status"] == "done" for row in mended.rows)

    def test_when_all_die_the_first_reason_is_said(self, ray_session, features, own, tmp_path):
        class AllFail(BlockTrial):
            def step(self):
                raise RuntimeError("the disk is full")

        config = StageTwoConfig(heads=2, families=TRAINED)
        with pytest.raises(UserError, match="all 1 trials of the search failed, the first with: RuntimeError: the"):
            search_heads(features, own, NUM_CLASSES, config, 0, str(tmp_path), trial=AllFail)


SLOW = {
    "heads": 48,
    "heads_per_trial": 3,
    "families": list(TRAINED),
    "space": {"epochs": [300, 300]},
    "folds": 1,
    "seeds": 1,
}

DRIVER = """
import sys, ray
from tests.test_search import search_slowly
address, features, storage = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
search_slowly(features, storage)
"""


def search_slowly(features, storage):
    own = Head(torch.ones(NUM_CLASSES, DIM), torch.zeros(NUM_CLASSES))
    return search_heads(features, own, NUM_CLASSES, parse_config(StageTwoConfig, SLOW, "slow"), 0, storage)


def blocks_at(uri):
    """The finished blocks; a block that was made again tells other seconds."""
    storage = open_storage(uri)
    return {stored.path: storage.read(stored.path) for stored in storage.list("heads-") if "/blocks/" in stored.path}


@pytest.mark.parametrize(
    ("how", "where"),
    [
        pytest.param(signal.SIGKILL, "folder", id="kill -9"),
        pytest.param(signal.SIGINT, "folder", id="Ctrl-C", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, "bucket", id="kill -9, bucket", marks=pytest.mark.long),
    ],
)
def test_a_stopped_search_goes_on_without_its_finished_trials(ray_session, moto_s3, features, tmp_path, how, where):
    import ray

    address = ray.get_runtime_context().gcs_address
    uri = str(tmp_path) if where == "folder" else f"{moto_s3}/{tmp_path.name}"
    command = [sys.executable, "-c", DRIVER, address, str(features), uri]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(blocks_at(uri)) < 3:
        assert driver.poll() is None and time.monotonic() < deadline, driver.stderr.read()
        time.sleep(0.01)
    driver.send_signal(how)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == -signal.SIGKILL or (how == signal.SIGINT and b"KeyboardInterrupt" in errors)

    time.sleep(1)  # Ray's workers notice that their driver is gone
    before = blocks_at(uri)
    assert 3 <= len(before) < 16
    result = search_slowly(str(features), uri)
    after = blocks_at(uri)
    assert len(after) == 16 and before.items() <= after.items()
    assert [row["status"] for row in result.rows] == ["done"] * 49
