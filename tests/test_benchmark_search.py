"""The arithmetic of the search's benchmark, from parts that take no time; its large case at a tiny size."""

import pytest
import ray
import torch

import benchmarks.search as benchmark
import trainer.stage_two
from tuning.config import ALL_FAMILIES


def test_the_figures_follow_from_what_was_measured(monkeypatch):
    clock, searched = iter([100.0]), {}
    times = {"began_s": 102.0, "first_s": 105.0, "last_s": 165.0, "seconds": 75.0, "busy_s": 135.0}

    def run_search(folder, name, wanted):
        searched[name] = wanted
        return times if name == "blocks" else {"seconds": 30.0}

    monkeypatch.setattr(ray, "init", lambda **given: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(benchmark, "write_features", lambda folder: None)
    monkeypatch.setattr(benchmark, "run_search", run_search)
    monkeypatch.setattr(benchmark, "one_head_a_trial", lambda folder, heads: 200.0)
    monkeypatch.setattr(benchmark, "backbone_images_per_s", lambda: 70.0)
    heads = benchmark.HEADS_A_TRIAL + 3000
    figures = benchmark.search(heads, 8, 512)
    minutes_of_a_backbone = benchmark.EPOCHS * benchmark.SAMPLES / 70 / 60
    assert figures["heads_per_minute"] == pytest.approx(heads / 1.25)
    assert figures["ratio_one_head_a_trial"] == pytest.approx(3000 / 200)  # neither with its start
    assert figures["ratio_backbone_each_epoch"] == pytest.approx(heads / 1.25 * minutes_of_a_backbone)
    assert (figures["start_to_first_result_s"], figures["cold_start_to_first_result_s"]) == (3.0, 5.0)
    assert figures["tune_overhead_share"] == pytest.approx(1 - 135 / 150)
    assert figures["default_heads_per_minute"] == 1024 and len(searched["default"]) == 512
    assert {spec.family for spec in searched["default"]} == set(ALL_FAMILIES)
    assert {spec.family for spec in searched["blocks"]} == {"crt", "balanced_softmax"}
    assert {spec.epochs for spec in searched["blocks"]} == {10} and len(searched["blocks"]) == heads


def test_the_large_case_is_measured_with_what_its_heads_say(monkeypatch):
    asked, real = [], trainer.stage_two.predict

    def predict(heads, x):
        asked.append((len(heads), len(x)))
        return real(heads, x)

    monkeypatch.setattr(trainer.stage_two, "predict", predict)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of the tests that follow
    figures = benchmark.large(60, dim=8, classes=3, heads=5, asked=7)
    assert set(figures) == {
        "half_seconds",
        "half_extra_bytes",
        "whole_seconds",
        "whole_extra_bytes",
        "seconds_ratio",
        "heads",
    }
    assert figures["seconds_ratio"] == figures["whole_seconds"] / figures["half_seconds"] and figures["heads"] == 5
    assert asked == [(5, 7)] * 2
