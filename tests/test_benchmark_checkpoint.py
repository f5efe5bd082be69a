"""The benchmarks of checkpoints and of scaling: what they make of their measurements, and that they run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checkpoint import shares

ROOT = Path(__file__).parent.parent


def part(step_s, wall_s, blocked_s, others_cpu_s):
    return {"step_s": step_s, "wall_s": wall_s, "blocked_s": blocked_s, "others_cpu_s": others_cpu_s}


def test_shares_of_an_upload_by_hand():
    idle = part(0.05, 10.0, 0.1, 0.2)
    found = shares(
        {
            "before": idle,
            "after": idle,
            "during": part(0.052, 20.0, 0.6, 0.8),
            "snapshot_s": 0.2,
            "synchronous_s": 18.18,
        }
    )
    assert found["snapshot_share"] == pytest.approx(0.01)
    assert found["blocked_share"] == pytest.approx(0.6 / 20 - 0.01)
    assert found["upload_cpu_share"] == pytest.approx(0.8 / 20 - 0.02)
    assert found["stall_share"] == pytest.approx(0.01 + 0.02 + 0.02)
    assert found["slowdown_share"] == pytest.approx(1 - 0.05 / 0.052) and found["noise_share"] == 0
    assert found["synchronous_stall_share"] == pytest.approx(0.9)


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "options", "names"),
    [
        (
            "checkpoint.py",
            ["--mib", "2", "--upload-s", "2", "--idle-s", "0.5", "--rounds", "1"],
            {"stall_share", "synchronous_stall_share", "slowdown_share", "noise_share", "snapshot_s"},
        ),
        (
            "scaling.py",
            ["--backbone", "test_resnet", "--image-px", "32", "--workers", "1", "2"],
            {"predicted_images_per_s_1", "measured_images_per_s_2", "ratio_2", "load_1"},
        ),
    ],
)
def test_the_benchmark_writes_its_figures(script, options, names, tmp_path):
    command = [sys.executable, f"benchmarks/{script}", "--json", str(tmp_path / "figures"), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_ADDRESS"))}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert names <= figures.keys() and "load_average_1_min" in figures
