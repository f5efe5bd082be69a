"""The benchmark of `predict` runs and writes what it promises; its figures are for quiet machines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packed import write_packed

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_the_benchmark_writes_its_figures(tmp_path):
    write_packed(tmp_path / "packed", {"train": [50, 20], "val": [1, 1]}, distinct=9)
    command = [sys.executable, "benchmarks/predict.py", "--data", str(tmp_path / "packed"), "--px", "32"]
    command += ["--backbone", "test_resnet", "--images", "64", "--rounds", "2", "--json", str(tmp_path / "figures")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["images"] == 64 and figures["loading_s"] > 0
    assert figures["ratio"] == pytest.approx(figures["predict_images_per_s"] / figures["bare_images_per_s"])
