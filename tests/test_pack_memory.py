"""Packing in bounded memory, as `benchmarks/pack.py` measures it from outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MIB = 2**20


def figures(tmp_path, *options):
    command = [
        sys.executable,
        "benchmarks/pack.py",
        "--json",
        str(tmp_path / "f.json"),
        "--work",
        str(tmp_path),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json"]  # it clears up
    return json.loads((tmp_path / "f.json").read_text())


def test_the_benchmark_measures_and_clears_up(tmp_path):
    found = figures(tmp_path, "--images", "210", "--px", "48")
    assert {"images_per_s", "peak_rss_bytes", "rss_growth_bytes", "machine", "date", "command"} <= found.keys()
    assert found["images"] == 210 and found["images_per_s"] > 0
    assert found["peak_rss_bytes"] > 20 * MIB and len(found["rss_mib_over_time"]) == 20


@pytest.mark.long
def test_ten_times_the_images_take_hardly_more_memory(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few = figures(tmp_path / "few", "--images", "1200")
    many = figures(tmp_path / "many", "--images", "12000")
    # About a kilobyte an image is its name, place and notes; pixels would be 150 kB each.
    assert many["peak_rss_bytes"] - few["peak_rss_bytes"] < 2048 * (12_000 - 1200)
    assert many["rss_growth_bytes"] < 32 * MIB
