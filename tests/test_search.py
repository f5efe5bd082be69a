"""Stage two's search: what it tries, with Ray Tune for real; trials that die, drivers that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import parse_config
from cluster.errors import UserError
from trainer.features import Features, write_manifest, write_part
from trainer.heads import TRAINED_FAMILIES, Head, HeadSpec, load_heads
from trainer.metrics import METRICS
from trainer.stage_two import shared_by, train_heads
from tuning.block import BlockTrial
from tuning.config import StageTwoConfig
from tuning.results import KNOB_TYPES, SCORES, SearchResult, head_row, rank, read_results, write_results
from tuning.space import blocks_of, draw_specs
from tuning.stage_two import search_heads

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
    write_manifest(folder, backbone="none", checkpoint_sha256="", dim=DIM, rows=rows, parts=1)
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


class TestSpace:
    def test_families_share_the_budget(self):
        specs = draw_specs(StageTwoConfig(heads=256), seed=0)
        count = Counter(spec.family for spec in specs)
        assert count["tau_norm"] == count["logit_adjustment"] == 21 and count["nearest_class_mean"] == 2
        assert sum(count.values()) == 256
        assert {count[family] for family in TRAINED_FAMILIES} == {21, 22}
        for family in ("tau_norm", "logit_adjustment"):
            taus = [spec.tau for spec in specs if spec.family == family]
            assert taus == pytest.approx(np.linspace(0, 2, 21))

    @pytest.mark.parametrize("heads", [1, 7, 24, 40, 1000])
    def test_defaults_are_always_there(self, heads):
        config = StageTwoConfig(heads=heads)
        specs = draw_specs(config, seed=3)
        assert len(specs) == max(heads, len(config.families))
        assert {spec.family for spec in specs} == set(config.families)
        assert any(s.family == "crt" and s.power == 0 and s.lr == 3 and s.epochs == 10 for s in specs)
        assert any(s.family == "balanced_softmax" and s.lr == 3 and s.epochs == 10 for s in specs)
        assert any(s.family == "logit_adjustment" and s.tau == 1 for s in specs)
        assert any(s.family == "logit_adjusted" and s.tau == 1 for s in specs)
        assert any(s.family == "tau_norm" and s.tau == 1 for s in specs)
        assert any(s.family == "ldam_drw" and s.margin == 0.5 and s.scale == 30 for s in specs)
        assert any(s.family == "over_smoothing" and s.smoothing == 0.98 for s in specs)
        assert any(s.family == "label_aware_smoothing" and (s.smoothing, s.smoothing_tail) == (0.4, 0.1) for s in specs)

    def test_heads_share_their_minibatches(self):
        """Of 512 heads most are trained beside seven others or more."""
        specs = [spec for spec in draw_specs(StageTwoConfig(), seed=0) if spec.family in TRAINED_FAMILIES]
        together = Counter(shared_by(spec) for spec in specs)
        assert sum(number for number in together.values() if number >= 8) > 0.8 * len(specs)

    def test_closed_forms_alone_need_no_more_than_their_grid(self):
        assert len(draw_specs(StageTwoConfig(heads=500, families=("tau_norm", "nearest_class_mean")), seed=0)) == 23

    def test_values_stay_in_their_ranges_and_fill_them(self):
        config = parse_config(
            StageTwoConfig,
            {
                "heads": 300,
                "families": ["crt", "logit_adjustment"],
                "space": {
                    "power": [0.2, 0.6],
                    "tau": [0.0, 0.5],
                    "lr": [0.5, 2],
                    "weight_decay": [1e-5, 1e-3],
                    "epochs": [3, 6],
                },
            },
            "test",
        )
        specs = draw_specs(config, seed=0)
        crt = [spec for spec in specs if spec.family == "crt"]
        assert {spec.epochs for spec in crt} == {3, 4, 5, 6}
        assert len({spec.power for spec in crt}) == 11 and {0.2, 0.6} < {spec.power for spec in crt}
        for name in ("power", "lr", "weight_decay"):
            low, high = getattr(config.space, name)
            values = np.array([getattr(spec, name) for spec in crt])
            assert low <= values.min() and values.max() <= high
        logs = np.log([spec.lr for spec in crt])
        quarters = np.histogram(logs, bins=4, range=np.log([0.5, 2]))[0]
        assert quarters == pytest.approx(np.full(4, len(crt) / 4), abs=3)
        assert max(spec.tau for spec in specs if spec.family == "logit_adjustment") == 0.5

    def test_the_seed_decides(self):
        config = StageTwoConfig(heads=64)
        assert draw_specs(config, seed=1) == draw_specs(config, seed=1) != draw_specs(config, seed=2)

    def test_blocks_keep_every_head_in_order(self):
        specs = draw_specs(StageTwoConfig(heads=50), seed=0)
        blocks = blocks_of(specs, 8)
        assert [spec for block in blocks for spec in block] == specs
        assert all(len(block) == 8 for block in blocks[:-1])

    def test_a_range_that_is_turned_round_is_named(self):
        with pytest.raises(UserError, match=r"test: space: .*lr = \[3, 1\] must be \[low, high\] within"):
            parse_config(StageTwoConfig, {"space": {"lr": [3, 1]}}, "test")


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

    def test_a_finished_search_in_a_bucket_is_not_run_again(self, result, features, own, moto_s3):
        class Never(BlockTrial):
            def step(self):
                raise AssertionError("run again")

        first = search_heads(features, own, NUM_CLASSES, self.config, 0, f"{moto_s3}/search")
        again = search_heads(features, own, NUM_CLASSES, self.config, 0, f"{moto_s3}/search", trial=Never)
        assert again.rows == first.rows == result.rows and again.winner == first.winner

    def test_missing_features_are_named(self, own, tmp_path):
        with pytest.raises(UserError, match=rf"features {tmp_path} hold no features.json"):
            search_heads(tmp_path, own, NUM_CLASSES, self.config, 0, str(tmp_path / "search"))


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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_stopped_search_goes_on_without_its_finished_trials(ray_session, features, tmp_path, how):
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address, str(features), str(tmp_path)]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("heads-*/blocks/*.safetensors"))) < 3:
        assert driver.poll() is None and time.monotonic() < deadline, driver.stderr.read()
        time.sleep(0.01)
    driver.send_signal(how)
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == -signal.SIGKILL or (how == signal.SIGINT and b"KeyboardInterrupt" in errors)

    time.sleep(1)  # Ray's workers notice that their driver is gone
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("heads-*/blocks/*.safetensors")}
    assert 3 <= len(before) < 16
    result = search_slowly(str(features), str(tmp_path))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("heads-*/blocks/*.safetensors")}
    assert len(after) == 16 and before.items() <= after.items()
    assert [row["status"] for row in result.rows] == ["done"] * 49


class TestChoice:
    def row(self, number, score, f1=0.5, status="done"):
        row = head_row(number, HeadSpec("tau_norm"), 0)
        return row | {"status": status, "score": score, "balanced_accuracy": score, "macro_f1": f1, "worst_recall": 0.1}

    def test_ties_go_to_the_other_metrics_and_then_to_the_first(self):
        rows = [self.row(1, 0.6), self.row(2, 0.7), self.row(3, 0.7, f1=0.6), self.row(4, 0.7, f1=0.6)]
        assert max(rows, key=rank)["head"] == 3
        assert max(rows[::-1], key=rank)["head"] == 3

    def test_a_failed_head_never_wins(self):
        failed = self.row(1, None, status="failed")
        assert max([failed, self.row(2, 0.0)], key=rank)["head"] == 2

    def test_unfinished_or_damaged_results_are_named(self, tmp_path):
        with pytest.raises(UserError, match=rf"search {tmp_path} holds no winner.json, so it is not finished; run"):
            read_results(tmp_path)
        head = Head(torch.ones(2, 3), torch.zeros(2))
        write_results(tmp_path, SearchResult([self.row(0, 0.5)], {"tau_norm": head}, "tau_norm", "balanced_accuracy"))
        (tmp_path / "results.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match=rf"search {tmp_path} cannot be read \(.+\); delete it and run"):
            read_results(tmp_path)
