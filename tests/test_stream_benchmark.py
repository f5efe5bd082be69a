import json
import subprocess
import sys
from pathlib import Path

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
