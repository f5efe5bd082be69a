"""How long a run takes to go on after SIGKILL of a worker: to the first optimiser step of the restarted group.

    tests/sealed.sh python benchmarks/recovery.py --json recovery.json

A run of stage one on this machine (`rarelens stage-one`: a drawn dataset, the smallest network, gloo) loses one of its
workers again and again, at random moments. The clock runs from the kill until the driver has logged a step of the group
that Ray Train has started anew: noticing the death, two new processes with their imports, reading the checkpoint,
DeepSpeed's engine, DALI's graph.

    recovery_p50_s, recovery_p95_s, recovery_max_s    over all kills
    recovery_s                                        each, in order
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil
import yaml

from benchmarks.common import record
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parent.parent
STAGE = {"epochs": 100_000, "checkpoint_every_steps": 10}  # it never ends by itself
GIVE_UP_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), args.kills, args.workers, random.Random(args.seed))
    for name, value in figures.items():
        print(f"{name:16} {value}")
    record(args.json, figures)


def measure(folder: Path, kills: int, workers: int, draw: random.Random) -> dict[str, Any]:
    """Start the run, kill, and make the figures.

    Args:
        folder: For the run.
        kills: How many.
        workers: Of the run.
        draw: Decides which worker is killed, and when.
    """
    draw_synthetic(folder / "images", seed=2, scale=0.06)
    cluster = {"workers": workers, "device": "cpu", "cpus_per_worker": 0.5, "max_failures": -1}
    stage = {"batch_size": 16, "log_every_steps": 1, **STAGE}
    config = tiny_config(folder / "images", folder / "run", stage_one=stage, cluster=cluster)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    log = folder / "run" / "log.jsonl"
    command = [sys.executable, str(ROOT / "rarelens.py"), "stage-one", str(folder / "config.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        _wait_for_a_step(log, process)
        seconds = []
        for number in range(kills):
            time.sleep(draw.uniform(1, 5))
            at = time.time()
            draw.choice(workers_of(process)).kill()
            seconds.append(_sure(seconds_to_the_next_step(log, at, process)))
            print(f"kill {number + 1} of {kills}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:
            if child.is_running():
                child.kill()
    p50, p95 = np.percentile(seconds, [50, 95])
    return {
        "recovery_p50_s": round(float(p50), 1),
        "recovery_p95_s": round(float(p95), 1),
        "recovery_max_s": max(seconds),
        "recovery_s": seconds,
        "workers": workers,
    }


def workers_of(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """Ray Train's workers below a driver that has started Ray itself."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def seconds_to_the_next_step(log: Path, at: float, process: subprocess.Popen[Any]) -> float | None:
    """Wait for the first step of the group that was started after `at`; None where the run ended before.

    Steps that were done before the kill may be logged after it: the line that each group begins with tells them apart.

    Args:
        log: The run's `log.jsonl`.
        at: When the worker was killed, seconds since the epoch.
        process: The driver.
    """
    while process.poll() is None:
        lines = _lines(log)
        starts = [i for i, line in enumerate(lines) if line["kind"] == "start" and line["at"] > at]
        steps = [line for line in lines[starts[0] :] if line["kind"] == "step"] if starts else []
        if steps:
            return round(steps[0]["at"] - at, 1)
        time.sleep(0.1)
    return None


def _wait_for_a_step(log: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + GIVE_UP_S
    while not any(line["kind"] == "step" for line in _lines(log)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the run did not begin; try the command without this script")
        time.sleep(0.2)


def _lines(log: Path) -> list[dict[str, Any]]:
    texts = log.read_text().splitlines() if log.exists() else []
    return [json.loads(text) for text in texts if text.endswith("}")]


def _sure(seconds: float | None) -> float:
    if seconds is None:
        raise SystemExit("the run ended before it had gone on")
    return seconds


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.pop("RAY_ADDRESS", None)
    main()
