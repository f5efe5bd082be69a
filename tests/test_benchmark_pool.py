"""The benchmark of the pool at a small size, and the meters that the benchmarks share."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import common, pool, pool_gpu

BOUNDED = {f"{name}_ratio_{loss}" for name in ("memory", "time", "products") for loss in ("supcon", "triplet")}


def test_every_figure_is_written(monkeypatch, tmp_path):
    sizes = [
        "--anchors",
        "32",
        "--rows",
        "512",
        "--large-rows",
        "2048",
        "--dim",
        "8",
        "--rounds",
        "2",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/pool.py", "--json", str(tmp_path / "a" / "pool.json"), *sizes])
    # In this process instead of fourteen new ones; a test below starts one.
    monkeypatch.setattr(
        pool,
        "memory_in_new_process",
        lambda args, name, rows: pool.memory_here(*name.split("-"), args.anchors, rows, args.dim),
    )
    monkeypatch.setattr(common, "_reset_high_water_mark", lambda: False)
    pool.main()
    figures = json.loads((tmp_path / "a" / "pool.json").read_text())
    assert {*BOUNDED, "extra_bytes_262144", "time_exponent_supcon", "time_r2_triplet"} <= figures.keys()
    assert {"machine", "cores", "date", "command", "versions"} <= figures.keys()
    assert "--anchors 32" in figures["command"] and figures["versions"]["torch"] == torch.__version__.split("+")[0]
    assert all(figures[name] > 0 for name in BOUNDED if not name.startswith("memory"))


def test_figures_of_a_gpu(monkeypatch):
    # The same code with the CPU in the GPU's place: what is measured there is only seen on one.
    monkeypatch.setattr(pool_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(pool_gpu, "RATE_SIZE", 64)
    for name, result in (("memory_allocated", 5), ("max_memory_allocated", 12), ("get_device_name", "none")):
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        figures = pool_gpu.gpu_figures(16, 256, 8, rounds=2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for loss in pool.LOSSES:
        for kind in ("bfloat16", "tf32"):
            assert figures[f"gpu_extra_bytes_{loss}_{kind}"] == 7
            expected = figures[f"gpu_seconds_{loss}_{kind}"] / figures[f"gpu_seconds_products_at_rate_{kind}"]
            assert figures[f"gpu_time_ratio_{loss}_{kind}"] == pytest.approx(expected)
    operations = 3 * 2 * 16 * 256 * 8
    assert figures["gpu_seconds_products_at_rate_tf32"] == pytest.approx(
        operations / (figures["gpu_matrix_tflops_tf32"] * 1e12)
    )


def test_memory_of_a_new_process():
    command = [sys.executable, pool.__file__, "--measure", "ours-supcon", "--anchors", "64", "--rows", "16384"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    measured = json.loads(done.stdout)
    # At least the pool's gradient and a chunk of similarities; not B x N eight times, as the rival takes.
    least = 16384 * 128 * 4 + 64 * 16384 * 4
    assert least <= measured["allocator"] < 3 * least
    # The matrix library's own buffers, some MB, are seen by one of the two methods only.
    assert 0.9 * measured["allocator"] < measured["resident"] < measured["allocator"] + (16 << 20)


def test_the_same_loss_is_compared(monkeypatch):
    data = pool.inputs(64, 512, 16)
    pool.check_losses(data)
    monkeypatch.setattr(pool, "TEMPERATURE", 0.2)
    values = pool.ours("supcon", data)
    monkeypatch.setattr(pool, "ours", lambda loss, data: values)
    monkeypatch.setattr(pool, "TEMPERATURE", 0.1)
    monkeypatch.setattr(pool, "theirs", lambda loss, data, without_own: lambda: torch.tensor(1.0))
    with pytest.raises(RuntimeError, match=r"supcon: ours is \d\.\d+, pytorch-metric-learning's is 1\.0"):
        pool.check_losses(data)


def allocate():
    held = np.ones(64 << 20, dtype=np.uint8)
    time.sleep(0.01)
    return held


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_what_was_held_in_between(sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr(common, "_reset_high_water_mark", lambda: False)
    assert common.peak_extra_bytes(allocate) == pytest.approx(64 << 20, rel=0.1)
    assert common.peak_extra_bytes(lambda: None) < 4 << 20


def test_rivals_alternate_and_ratios_are_of_them():
    order = []
    seconds = {"one": 0.001, "two": 0.004}

    def rival(name):
        def run():
            order.append(name)
            time.sleep(seconds[name])

        return run

    times = common.quiet_time({name: rival(name) for name in seconds}, rounds=3)
    assert order[2:] == ["one", "two", "two", "one", "one", "two"]
    assert [len(times.seconds[name]) for name in seconds] == [3, 3]
    assert times.best("one") <= times.median("one")
    assert times.ratio("two", "one") == times.best("two") / times.best("one")
    fixed = common.Times({"one": [1.0, 2.0, 4.0], "two": [2.0, 2.0, 2.0]})
    assert [fixed.best("one"), fixed.median("one"), fixed.ratio("one", "two")] == [1.0, 2.0, 0.5]
    assert fixed.median_ratio("one", "two") == 1.0


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.record(None, {"x": 1})
    assert not list(tmp_path.iterdir())
    common.record("x.json", {"x": 1})
    assert json.loads((tmp_path / "x.json").read_text())["x"] == 1
