"""The loader's benchmark runs and writes what it promises; its figures are for quiet machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packed import write_packed

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_the_benchmark_writes_its_figures(tmp_path):
    write_packed(tmp_path / "packed", {"train": [200, 60, 20], "val": [1, 1, 1]}, [2], samples_per_shard=40, distinct=9)
    command = [sys.executable, "benchmarks/loader.py", "--data", str(tmp_path / "packed"), "--s3"]
    command += ["--rounds", "2", "--seconds", "0.3", "--step-images-per-s", "200", "--json", str(tmp_path / "figures")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures").read_text())
    rates = [figures[f"{name}images_per_s"] for name in ("", "webdataset_", "dali_")]
    assert min(rates) > 0
    assert figures["ratio_webdataset"] == pytest.approx(rates[0] / rates[1])
    assert figures["ratio_dali"] == pytest.approx(rates[0] / rates[2])
    assert figures["s3_second_epoch_ratio"] > 0 and 0 < figures["s3_first_epoch_wait_share"] < 1
