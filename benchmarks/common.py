"""What the benchmarks share: peak memory, times of rivals in alternating rounds, and the report that is written."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "pytorch-metric-learning",
    "triton",
    "deepspeed",
    "ray",
    "nvidia-dali-cuda130",
    "webdataset",
)


@dataclass(frozen=True)
class Times:
    """Seconds of each rival, one number a round, in the order of the rounds."""

    seconds: Mapping[str, list[float]]

    def best(self, name: str) -> float:
        """Shortest: what the code takes when nothing else runs."""
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        """Middle of the rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Of the shortest times. On a shared machine they are the numbers that its load distorts least."""
        return self.best(name) / self.best(other)

    def median_ratio(self, name: str, other: str) -> float:
        """Middle of the ratios within a round: both ran under about the same load."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return statistics.median(one / two for one, two in pairs)


def quiet_time(functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Times:
    """Time rivals in alternating rounds, each of them once a round, so that a change of load meets all of them.

    Args:
        functions: Name -> what to time. A function that works on a GPU waits for it itself.
        rounds: At least 1.
        warm_up: Untimed calls of each before.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()  # a collection would fall into whichever round it likes
    try:
        for number in range(rounds):
            # Forwards, then backwards: no rival always follows the same other one and finds the cache as that left it.
            for name in list(functions)[:: 1 if number % 2 == 0 else -1]:
                begin = time.perf_counter()
                functions[name]()
                seconds[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return Times(seconds)


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """How much this process's resident memory grew at most while `function` ran, in bytes.

    Linux: the kernel's own high-water mark (VmHWM), reset before the call, so that no peak is missed between samples.
    Where it cannot be reset, a thread samples once a millisecond. Memory that earlier calls freed and the C library
    kept would hide growth, so it is given back first; still, the number is sure only in a process that has done little
    else. What `function` loads at its first call counts too: warm it up with a small input.
    """
    gc.collect()
    _return_free_memory()
    if not _reset_high_water_mark():
        return _sampled_extra_bytes(function)
    before = _status_bytes("VmRSS")
    function()
    return max(_status_bytes("VmHWM") - before, 0)


def allocator_extra_bytes(function: Callable[[], object]) -> int:
    """Peak of what PyTorch's CPU allocator handed out and had not got back while `function` ran, in bytes.

    As PyTorch's profiler recorded it: a check of `peak_extra_bytes` that misses what libraries allocate by themselves.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def record(path: str | os.PathLike[str] | None, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON, with where, when and how they were measured; nothing without a path.

    Args:
        path: File to write, its folder is made.
        figures: Name -> number.
    """
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({**figures, **surroundings()}, indent=2) + "\n")


def surroundings() -> dict[str, Any]:
    """Machine, cores, load, date, command and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "versions": versions,
    }


def _processor() -> str:
    """As the kernel names it, with a GPU if PyTorch is loaded and sees one."""
    names = [platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")][:1]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names.append(torch.cuda.get_device_name())
    return ", ".join(names)


def _return_free_memory() -> None:
    """Ask glibc to give what it keeps back to the kernel; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water_mark() -> bool:
    """Linux, proc(5): 5 written to clear_refs sets VmHWM to the present VmRSS."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _sampled_extra_bytes(function: Callable[[], object]) -> int:
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = before

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
        peak = max(peak, process.memory_info().rss)
    finally:
        done.set()
        thread.join()
    return peak - before
