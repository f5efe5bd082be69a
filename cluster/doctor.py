"""What this machine or cluster has, what is missing, and the command that mends it.

What a run needs (its storage, files, workers) is passed in: this package knows no other configuration than its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.build_cache import build_folder, default_folder, stale_locks
from cluster.config import ClusterConfig
from cluster.errors import UserError
from cluster.probes import run_probe
from cluster.storage import check_storage, open_storage

PROJECT = "rarelens"
FREE_DISK_GIB = 5.0  # a packed dataset of 100,000 images of 224 px, its features and a few checkpoints
SHARED_MEMORY_MIB = 256.0  # Ray's object store as `cluster.launch` starts it, and what gloo and DALI take
OPEN_FILES = 4096  # Ray warns below it: each worker holds some hundred sockets

_PROBE_REMEDIES = {
    "GPU": "update the driver (nvidia-smi shows its CUDA version) or install a torch for that CUDA version",
    "DALI": "pip install --force-reinstall nvidia-dali-cuda130 (nvidia-dali-cuda120 for older drivers)",
    "DeepSpeed": "pip install --force-reinstall deepspeed",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    what: str
    remedy: str = ""


def examine(
    storage_uri: str | None = None,
    paths: Sequence[str] = (),
    cluster: ClusterConfig | None = None,
    extras: Sequence[str] = (),
) -> list[Finding]:
    """Look at everything that a run needs; nothing is changed and nothing raises.

    Args:
        storage_uri: Run folder; it is written, read, listed and deleted from.
        paths: Files, folders and URIs that must exist, such as images and weights.
        cluster: Workers and device; held against this machine, not against a cluster, which may grow.
        extras: Of the project's optional dependencies, those that the run needs, e.g. `mlflow`.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("Python", _python),
        ("packages", partial(_packages, extras)),
        *((name, partial(_probe, name)) for name in _PROBE_REMEDIES),
        ("C++ compiler", _compiler),
        ("operator builds", _builds),
        ("disk", partial(_disk, storage_uri)),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
    ]
    if "RAY_ADDRESS" in os.environ:
        checks.append(("Ray cluster", partial(_ray_cluster, os.environ["RAY_ADDRESS"])))
    if storage_uri is not None:
        checks.append(("storage", partial(_storage, storage_uri)))
    checks += [(path, partial(_exists, path)) for path in paths]
    with ThreadPoolExecutor(len(checks)) as pool:  # they mostly wait for processes and the network
        findings = [finding for found in pool.map(lambda check: _safely(*check), checks) for finding in found]
    if cluster is not None and "RAY_ADDRESS" not in os.environ:
        findings += _safely("workers", partial(_workers, cluster, _gpus(findings)))
    return findings


def render(findings: Sequence[Finding]) -> None:
    """Print the findings as a table, what is missing with its remedy."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = Text("ok", style="green") if finding.ok else Text("MISSING", style="bold red")
        remedy = Text(f"\n{finding.remedy}", style="bold") if finding.remedy and not finding.ok else Text()
        table.add_row(mark, Text(finding.name), Text(finding.what).append_text(remedy))
    missing = sum(not finding.ok for finding in findings)
    console = Console()
    console.print(table)
    console.print("everything is there" if not missing else f"{missing} of {len(findings)} need mending", style="bold")


def _safely(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """A check that fails in an unforeseen way is a finding, not the end of the doctor."""
    try:
        return list(check())
    except UserError as error:
        what, _, remedy = str(error).partition("; ")
        return [Finding(name, False, what, remedy)]
    except Exception as error:
        return [Finding(name, False, f"could not be looked at: {type(error).__name__}: {error}", "report this")]


def _python() -> Iterable[Finding]:
    version = ".".join(str(part) for part in sys.version_info[:3])
    yield Finding(
        "Python", sys.version_info >= (3, 10), f"{version} at {sys.executable}", "install Python 3.10 or newer"
    )


def _packages(extras: Sequence[str] = ()) -> Iterable[Finding]:
    """Each required package, and those of some extras, against the bounds in pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        wanted = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(PROJECT, False, "the project is not installed", "pip install -e . in its folder")
        return
    for requirement in map(Requirement, wanted):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in ("", *extras)):
            continue
        requirement.marker = None  # for the remedy
        version = _version(requirement.name)
        if version is None and requirement.name.startswith("nvidia-dali"):
            version = _version("nvidia-dali-cuda120")
        remedy = f"pip install '{requirement}'"
        if version is None:
            yield Finding(requirement.name, False, "not installed", remedy)
        else:
            fits = requirement.specifier.contains(version, prereleases=True)
            rule = "" if fits else f", but {requirement.specifier} is needed"
            yield Finding(requirement.name, fits, version + rule, remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe(name: str) -> Iterable[Finding]:
    ok, what = run_probe(name)
    yield Finding(name, ok, what, _PROBE_REMEDIES[name])


def _compiler() -> Iterable[Finding]:
    """DeepSpeed builds its CPU operator when it is first used."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    yield Finding("C++ compiler", compiler is not None, compiler or "none found", "apt-get install g++")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    yield Finding("ninja", ninja is not None, ninja or "none found", "pip install ninja")
    header = Path(sysconfig.get_path("include"), "Python.h")
    yield Finding("Python headers", header.is_file(), str(header), "apt-get install python3-dev")


def _builds() -> Iterable[Finding]:
    """A lock that nobody holds, for which every program that builds an operator waits."""
    for folder in sorted({build_folder(), default_folder()}):
        left = stale_locks(folder)
        what = f"{left[0]} was left by a build that was killed: the next one waits for it" if left else str(folder)
        yield Finding("operator builds", not left, what, f"rm {' '.join(map(shlex.quote, map(str, left)))}")


def _disk(storage_uri: str | None) -> Iterable[Finding]:
    places = {"temporary files": Path(tempfile.gettempdir())}
    local = open_storage(storage_uri).local_path("") if storage_uri is not None else None
    if local is not None:
        places["run folder"] = local
    for name, place in places.items():
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free_gib = shutil.disk_usage(there).free / 2**30
        what = f"{free_gib:.1f} GiB free in {there}"
        yield Finding(
            f"disk for {name}", free_gib >= FREE_DISK_GIB, what, f"free {FREE_DISK_GIB:.0f} GiB or use another disk"
        )


def _shared_memory() -> Iterable[Finding]:
    folder = Path("/dev/shm")
    if folder.is_dir():
        free_mib = shutil.disk_usage(folder).free / 2**20
        yield Finding(
            "shared memory",
            free_mib >= SHARED_MEMORY_MIB,
            f"{free_mib:.0f} MiB free in {folder}",
            "in a container: docker run --shm-size=2g; else remove what lies there",
        )


def _open_files() -> Iterable[Finding]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises the soft limit to the hard one by itself.
    enough = hard == resource.RLIM_INFINITY or max(soft, hard) >= OPEN_FILES
    yield Finding("open files", enough, f"{soft}, can be raised to {hard}", f"ulimit -Hn {OPEN_FILES} (as root)")


def _ray_cluster(address: str) -> Iterable[Finding]:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    remedy = "start it (`ray up ray_cluster.yaml` or `ray start --head`), or unset RAY_ADDRESS"
    if port.isdigit():
        try:  # Ray itself would try for half a minute
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            yield Finding("Ray cluster", False, f"{address} cannot be reached: {error}", remedy)
            return
    ok, what = run_probe("Ray cluster")
    yield Finding("Ray cluster", ok, f"{address}: {what}", remedy)


def _storage(uri: str) -> Iterable[Finding]:
    storage = open_storage(uri)
    local = storage.local_path("")
    made = [folder for folder in (local, *local.parents) if not folder.exists()] if local is not None else []
    try:
        check_storage(storage)
    finally:
        for folder in made:  # the doctor leaves nothing behind
            with suppress(OSError):
                folder.rmdir()
    yield Finding("storage", True, f"{storage.uri} can be written, read, listed and deleted from")


def _exists(path: str) -> Iterable[Finding]:
    if "://" in path:
        folder, _, name = path.rstrip("/").rpartition("/")
        storage = open_storage(folder)
        there = storage.exists(name) or bool(storage.list(f"{name}/"))
    else:
        there = Path(path).exists()
    yield Finding(path, there, "is there" if there else "does not exist", "correct the path in the configuration")


def _gpus(findings: Iterable[Finding]) -> int:
    """How many the probe of GPUs has named, each with its memory."""
    return sum(finding.what.count(" GiB)") for finding in findings if finding.name == "GPU" and finding.ok)


def _workers(cluster: ClusterConfig, gpus: int) -> Iterable[Finding]:
    """The least number of workers against the GPUs, or the cores, as `cluster.launch.resolve_workers` counts them."""
    least = cluster.worker_range[0] if cluster.worker_range else None
    wanted = "auto" if least is None else least
    if cluster.device == "cuda" and not gpus:
        yield Finding(
            "workers", False, f"{wanted} with cluster.device = cuda, and no GPU is seen", "set cluster.device=cpu"
        )
        return
    if cluster.device == "cuda" or (cluster.device == "auto" and gpus):
        room, unit = gpus, f"{gpus} GPUs"
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        room, unit = max(1, int(cores / cluster.cpus_per_worker)), f"{cores} cores"
        if cluster.cpus_per_worker != 1:
            unit += f", of which each takes {cluster.cpus_per_worker:g}"
    fits = least is None or least <= room
    yield Finding("workers", fits, f"{wanted} on {unit}", f"set cluster.workers to at most {room}, or auto")
