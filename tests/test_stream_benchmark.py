import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_benchmark_writes_its_figures(tmp_path):
    """At a thousandth of its size; the figures themselves are not judged."""
    file = tmp_path / "stream.json"
    command = [sys.executable, "benchmarks/stream.py", "--million", "2000", "--classes", "40", "--json", str(file)]
    table = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    figures = json.loads(file.read_text())
    for name in ("start_s_10m", "peak_bytes_10m", "first_batch_s_1m", "microseconds_per_sample"):
        assert figures[name] > 0
        assert name in table
    assert figures["samples_in_1m"] == 2000
    assert {"machine", "date", "command", "versions"} <= figures.keys()


def test_the_first_batch_of_tensors_is_timed(tmp_path):
    file = tmp_path / "first_batch.json"
    command = [sys.executable, "benchmarks/first_batch.py", "--samples", "2000", "--classes", "40", "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    figures = json.loads(file.read_text())
    assert figures["first_batch_s"] == pytest.approx(sum(figures[name] for name in ("open_s", "loader_s", "batch_s")))
    assert min(figures[name] for name in ("open_s", "loader_s", "batch_s")) > 0 and figures["samples"] == 2000
