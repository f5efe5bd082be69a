"""What a checkpoint's upload costs the step loop: behind the steps, and beside it waiting for it.

    tests/sealed.sh python benchmarks/checkpoint.py --json checkpoint.json

A worker of Ray Train does steps of known work: matrix products on one thread, and Python that holds the interpreter's
lock, as a step does. It makes checkpoints as stage one does (`worker.snapshot()`, manifest, `worker.report()`) on an S3
server (moto) on loopback, whose link is throttled so that an upload takes a while. Each round is: steps without an
upload, a snapshot, steps while it is uploaded, steps without; then a snapshot that is waited for.

Other processes' load would drown a share of a few per cent in the steps' times (`noise_share` tells how much). What the
upload itself takes from the loop is therefore counted from the kernel's books of the loop's thread, which tell the time
that it ran, waited for a core, or was blocked, as it is when another thread has the interpreter's lock.

    stall_share               what the loop lost, as a share of the upload's time: the snapshot, the time that its
                              thread was blocked, and all CPU seconds of the process's other threads, as if each had
                              taken a core from the loop; the median of the rounds, like all figures
    snapshot_share            of it the snapshot: local copy and hashes, until the loop has its thread back
    blocked_share             of it the loop's thread blocked, beyond what it is without an upload
    upload_cpu_share          of it the CPU seconds of the other threads
    slowdown_share            by the clock: 1 - (step without an upload / step with one), middle steps
    noise_share               the same of the steps before the upload against those after it, where nothing is to lose
    synchronous_stall_share   by the clock: what the loop loses where it waits for the upload
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import record
from benchmarks.loader_s3 import BUCKET, ENVIRONMENT, s3_server, throttled
from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.launch import run_workers
from cluster.worker import Worker

ROOT = Path(__file__).resolve().parent.parent
MATRIX = 512
PRODUCTS = 8
PYTHON_ROUNDS = 60_000  # some milliseconds with the interpreter's lock in hand


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--mib", type=int, default=64, help="of a checkpoint")
    parser.add_argument("--upload-s", type=float, default=20.0, help="how long the throttled link takes for it")
    parser.add_argument("--idle-s", type=float, default=8.0, help="steps without an upload, before and after")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    figures = measure(args.mib, args.upload_s, args.idle_s, args.rounds)
    for name, value in figures.items():
        print(f"{name:26} {value:8.4f}")
    record(args.json, figures)


def measure(mib: int, upload_s: float, idle_s: float, rounds: int) -> dict[str, float]:
    """Run it and make the figures.

    Args:
        mib: Size of a checkpoint.
        upload_s: What its upload is to take.
        idle_s: Seconds of steps before and after each upload.
        rounds: Of each way.
    """
    import boto3
    import ray

    told: list[dict[str, Any]] = []

    def on_message(message: dict[str, Any]) -> None:
        told.append(message)
        if message.get("kind") == "round":
            print(f"round of {rounds}: upload {message['during']['wall_s']:.1f} s", file=sys.stderr, flush=True)

    with s3_server() as address:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{address}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        with throttled(address, mib * 2**20 / upload_s, "up") as slow:
            os.environ["AWS_ENDPOINT_URL"] = f"http://{slow}"
            os.environ["PYTHONPATH"] = str(ROOT)  # Ray's workers import this file
            os.environ["OMP_NUM_THREADS"] = "1"
            from benchmarks.checkpoint import steady_loop

            run_workers(
                steady_loop,
                {"mib": mib, "idle_s": idle_s, "rounds": rounds},
                name="checkpoints",
                run_uri=f"s3://{BUCKET}/run",
                cluster=ClusterConfig(workers=1, device="cpu", max_failures=0),
                keep=(2, "score"),
                on_message=on_message,
            )
            ray.shutdown()
    return figures_of([message for message in told if message.get("kind") == "round"])


def steady_loop(worker: Worker, mib: int, idle_s: float, rounds: int) -> None:
    """On the worker: the rounds, each told to the driver."""
    import torch

    torch.set_num_threads(1)
    step, data = make_step(), os.urandom(mib * 2**20)
    steps_for(step, 2.0)
    for number in range(rounds):
        before = steps_for(step, idle_s)
        snapshot_s = save(worker, data, 2 * number)
        during = steps_while(step, lambda: worker.uploading)
        after = steps_for(step, idle_s)
        begin = time.perf_counter()
        save(worker, data, 2 * number + 1)
        worker.settle()
        synchronous_s = time.perf_counter() - begin
        message = {"snapshot_s": snapshot_s, "synchronous_s": synchronous_s}
        worker.tell({"kind": "round", "before": before, "during": during, "after": after, **message})


def make_step() -> Callable[[], None]:
    """Work that takes the same time each time it is alone."""
    import torch

    left, right = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)

    def step() -> None:
        for _ in range(PRODUCTS):
            left @ right
        total = 0
        for number in range(PYTHON_ROUNDS):
            total += number

    return step


def steps_for(step: Callable[[], None], seconds: float) -> dict[str, Any]:
    """As many steps as there is time for; see `steps_while`."""
    end = time.perf_counter() + seconds
    return steps_while(step, lambda: time.perf_counter() < end)


def steps_while(step: Callable[[], None], goes_on: Callable[[], bool]) -> dict[str, Any]:
    """Steps as long as it goes on.

    Returns:
        Seconds of the middle step (`step_s`), of all (`wall_s`), of them blocked (`blocked_s`), and the CPU seconds of
        the process's other threads (`others_cpu_s`).
    """
    taken, begin = [], time.perf_counter()
    ran_s, queued_s, process_s = *thread_times_s(), time.process_time()
    last = begin
    while goes_on():
        step()
        now = time.perf_counter()
        taken.append(now - last)
        last = now
    ran_s, queued_s = (after - before for after, before in zip(thread_times_s(), (ran_s, queued_s), strict=True))
    wall_s = time.perf_counter() - begin
    return {
        "step_s": statistics.median(taken),
        "wall_s": wall_s,
        "blocked_s": wall_s - ran_s - queued_s,
        "others_cpu_s": time.process_time() - process_s - ran_s,
    }


def thread_times_s() -> tuple[float, float]:
    """How long this thread has run and how long it has waited for a core (Linux, Documentation/scheduler)."""
    _, queued_ns, _ = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()
    return time.thread_time(), int(queued_ns) / 1e9


def save(worker: Worker, data: bytes, number: int) -> float:
    """A checkpoint as stage one makes it; returns the seconds until the loop goes on, without waiting for a core."""
    begin, queued_s = time.perf_counter(), thread_times_s()[1]
    with worker.snapshot() as folder:
        (folder / "weights").write_bytes(data)
        write_manifest(folder, worker.rank, worker.world, {"step": number})
        worker.report({"step": number, "score": float(number)}, folder, f"step-{number:04d}")
    return time.perf_counter() - begin - (thread_times_s()[1] - queued_s)


def figures_of(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """The medians over the rounds; see the top of the file."""
    return {name: statistics.median(shares(item)[name] for item in rounds) for name in shares(rounds[0])}


def shares(item: dict[str, Any]) -> dict[str, float]:
    """The figures of one round."""
    before, during, after = item["before"], item["during"], item["after"]
    upload_s = during["wall_s"]

    def of_upload(name: str) -> float:
        """What there is more of it than without an upload, as a share of the upload's time."""
        usual = (before[name] + after[name]) / (before["wall_s"] + after["wall_s"])
        return max(0.0, during[name] / upload_s - usual)

    parts = {
        "snapshot_share": item["snapshot_s"] / upload_s,
        "blocked_share": of_upload("blocked_s"),
        "upload_cpu_share": of_upload("others_cpu_s"),
    }
    idle_step_s = (before["step_s"] + after["step_s"]) / 2
    return {
        "stall_share": sum(parts.values()),
        **parts,
        "slowdown_share": 1 - idle_step_s / during["step_s"],
        "noise_share": abs(1 - before["step_s"] / after["step_s"]),
        "synchronous_stall_share": item["synchronous_s"] / (upload_s + item["snapshot_s"]),
        "snapshot_s": item["snapshot_s"],
        "upload_s": upload_s,
        "step_s": idle_step_s,
        "step_during_upload_s": during["step_s"],
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_CACHE_HOME", folder)
        main()
