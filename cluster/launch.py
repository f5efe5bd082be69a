"""Run a function on N workers with Ray Train, and restart it from its last checkpoint when something dies.

The function is called on every worker as `function(worker, **arguments)`; `cluster.worker.Worker` says what it sees of
the cluster. What it computes is its own business.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig
from cluster.driver import fit, fit_while_it_gets_on, loss_teller, messages_delivered, sigterm_stops
from cluster.errors import UserError
from cluster.mailbox import Mailbox
from cluster.progress import console
from cluster.registry import mend_registry
from cluster.retention import best_first, retention
from cluster.storage import open_storage, to_pyarrow, worker_environment
from cluster.watch import Pulse, Watch
from cluster.worker import RayWorker, RunStopped, listen_for_sigterm

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig

INCIDENTS = ("warning", "hang", "lost")
NODE_ID_LABEL = "ray.io/node-id"  # Ray gives it to every machine
OBJECT_STORE_BYTES = 200 * 2**20  # features and images travel through files; Ray's store only carries messages


@dataclass
class Outcome:
    """What `run_workers` leaves: the reported checkpoints, best first, as (path below the run folder, metrics)."""

    checkpoints: list[tuple[str, dict[str, Any]]]


def start_ray(cluster: ClusterConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine; nothing to do where Ray runs already."""
    import ray

    if ray.is_initialized():
        return
    # The metrics are in the run folder; without this Ray Train looks for finished reports once in 2 s only.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(cluster.health_check_interval_s))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if "RAY_ADDRESS" in os.environ:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
        return
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # see keep_freed_memory
    cores = os.cpu_count() or 1
    wanted = max(cluster.worker_range or (0,)) * cluster.cpus_per_worker
    ray.init(
        address="local",
        num_cpus=max(cores, math.ceil(wanted)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def resolve_workers(cluster: ClusterConfig, most: int | None = None) -> tuple[int | tuple[int, int], str]:
    """Number of workers (or the least and the most) and their device, from the configuration and from what Ray has.

    Args:
        cluster: The configuration.
        most: The work has no use for more workers than this; bounds `workers: auto`.

    Raises:
        UserError: A GPU is asked for and Ray has none, or more workers than Ray has room for.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), resources.get("CPU", 1)
    device = cluster.device if cluster.device != "auto" else ("cuda" if gpus else "cpu")
    may_grow = "RAY_ADDRESS" in os.environ  # an autoscaled cluster begins without machines
    if device == "cuda" and not gpus and not may_grow:
        raise UserError("cluster.device = cuda, but Ray sees no GPU; set cluster.device=cpu or run `rarelens doctor`")
    room = gpus if device == "cuda" else max(1, int(cores / cluster.cpus_per_worker))
    if cluster.worker_range is None:
        if not room:
            raise UserError("cluster.workers = auto, but the cluster has no GPU yet; give the number of workers")
        return room if most is None else min(room, most), device
    least, most = cluster.worker_range
    if least > room and not may_grow:
        unit = "GPUs" if device == "cuda" else "cores"
        given = list(cluster.worker_range) if least < most else least
        raise UserError(f"cluster.workers = {given}, but there are {room} {unit} for them; lower cluster.workers")
    return (least, most) if least < most else least, device


def run_workers(
    function: Callable[..., None],
    arguments: dict[str, Any],
    *,
    name: str,
    run_uri: str,
    cluster: ClusterConfig,
    keep: tuple[int, str] | None = None,
    most: int | None = None,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Outcome:
    """Call `function(worker, **arguments)` on every worker until it has returned everywhere.

    A worker that dies takes the group down; the group starts again, `Worker.checkpoint` giving the newest checkpoint,
    up to `cluster.max_failures` times without a newer one. The same `name` and `run_uri` go on where a driver that died
    had come to.

    Args:
        function: Importable on the workers; must not return before it is done.
        arguments: Its keyword arguments, picklable.
        name: Folder below the run folder for Ray Train's state and the checkpoints.
        run_uri: Run folder, a path or s3:// URI that every worker reaches.
        cluster: Workers, device, failures.
        keep: (number of the best checkpoints to keep, metric by which they are; the two newest always stay). None = the
            function makes none.
        most: Bounds `workers: auto`.
        on_message: Called in the driver with what the workers `tell`, and with incidents: kind `warning`, `hang`
            or `lost`, with a `text`, which have been shown then.

    Raises:
        UserError: The function raised one on a worker, or workers died more often than is allowed.
        RunStopped: The driver got SIGTERM, and the workers have saved their last checkpoint.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    start_ray(cluster)
    workers: Any
    workers, device = resolve_workers(cluster, most)
    if device == "cpu" and cluster.device == "auto" and "RAY_ADDRESS" in os.environ:
        _say_once("no GPU in the cluster yet: training on the CPU; cluster.device=cuda has the autoscaler start some")
    mailbox = _start_mailbox()
    filesystem, path = to_pyarrow(run_uri)
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if device == "cuda":
        resources["GPU"] = 1
    settings: dict[str, Any] = {
        "train_loop_config": {
            # By reference: Ray Train's controller would import all that the function's module does, for nothing.
            "work": ray.put((function, arguments)),
            "mailbox": mailbox,
            "device": device,
            "folder_uri": f"{run_uri}/{name}",
            "hang_after_s": cluster.hang_after_s,
            "working_folder": os.getcwd(),
            "environment": worker_environment(),
        },
        "torch_config": _torch_config("nccl" if device == "cuda" else "gloo"),
        "scaling_config": ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=device == "cuda",
            resources_per_worker=resources,
            placement_strategy=cluster.placement.upper(),
        ),
        "run_config": ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            callbacks=[loss_teller(mailbox), *([retention(*keep)] if keep else [])],
        ),
    }
    logging.getLogger("ray.train").setLevel(logging.ERROR)

    def told(message: dict[str, Any]) -> None:
        if message.get("kind") in INCIDENTS:
            console.print(f"{name}: {message['text']}", highlight=False, markup=False, soft_wrap=True)
        on_message(message)

    def newest_step() -> int:
        warn = lambda text: told({"kind": "warning", "step": 0, "text": text})  # noqa: E731
        return mend_registry(open_storage(f"{run_uri}/{name}"), warn)

    def may_begin_anew() -> bool:
        ended = ray.get([mailbox.failure.remote(), mailbox.is_stopped.remote()])
        return cluster.max_failures != 0 and not any(ended)

    watch = Watch(mailbox, cluster.hang_after_s, told)
    with messages_delivered(mailbox, watch, told), sigterm_stops(mailbox, gracefully=keep is not None):
        try:
            result = fit_while_it_gets_on(
                lambda: fit(TorchTrainer(_on_worker, **settings)), newest_step, may_begin_anew
            )
        except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
            failure = ray.get(mailbox.failure.remote())
            if failure:
                raise UserError(failure) from None
            raise _given_up(error, name, run_uri, cluster) from error
    failure = ray.get(mailbox.failure.remote())
    if failure:
        raise UserError(failure)
    if ray.get(mailbox.is_stopped.remote()):
        raise RunStopped
    root = f"{path.rstrip('/')}/"
    reported = [(c.path.removeprefix(root), dict(m)) for c, m in result.best_checkpoints or []]
    return Outcome(best_first(reported, keep[1]) if keep else reported)


def _start_mailbox() -> Any:
    """A `Mailbox` on the driver's machine: Ray would put it on any, and it would be lost with a spot machine."""
    import ray

    here = {NODE_ID_LABEL: ray.get_runtime_context().get_node_id()}  # as Ray Train's own controller
    return ray.remote(num_cpus=0, label_selector=here)(Mailbox).remote()


def _given_up(error: Exception, name: str, run_uri: str, cluster: ClusterConfig) -> UserError:
    """What is said of a failure that Ray Train does not restart after."""
    import ray.train

    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, ray.train.WorkerGroupError):
        return UserError(
            f"{name} failed on its workers more often than cluster.max_failures = {cluster.max_failures} allows in a "
            f"row without progress, the last time with: {reason}; mend it, and the same command goes on from the last "
            "checkpoint"
        )
    return UserError(
        f"Ray Train's controller of {name} failed, on the driver's machine, with: {reason}; see whether {run_uri} can "
        "be written and this machine has memory left, and the same command goes on from the last checkpoint"
    )


@cache
def _say_once(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _on_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    import ray
    import ray.train

    mailbox, device = config["mailbox"], config["device"]
    if ray.get(mailbox.failure.remote()):  # the group was restarted after a user's mistake: a restart does not mend it
        return
    if os.path.isdir(config["working_folder"]):  # Ray Train moves away from it; relative paths mean the driver's
        os.chdir(config["working_folder"])
    os.environ.update(config["environment"])
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja, for DeepSpeed
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    pulse = Pulse(rank, world, mailbox, config["hang_after_s"])
    worker = RayWorker(rank, world, device, mailbox, config["folder_uri"], pulse)
    pulse.start()
    try:
        function, arguments = ray.get(config["work"])
        function(worker, **arguments)
        worker.settle()
    except RunStopped:
        ray.get(mailbox.note_stopped.remote())
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise
    finally:
        pulse.end()


def _torch_config(backend: str) -> TorchConfig:
    """Ray Train's process group, and on each worker's main thread, where alone it can be done, an ear for SIGTERM."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class ListeningBackend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_start(worker_group, backend_config)
            worker_group.execute(listen_for_sigterm)

    class ListeningTorchConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[_TorchBackend]:
            return ListeningBackend

    return ListeningTorchConfig(backend=backend)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the kernel.

    Each step frees and takes the same activations again; by default every one of them is mapped and zeroed anew
    (EfficientNet-Lite0, 64 images of 128 px, one process: 29 images/s without this, 48 with it; docs/log.md). That
    holds for the heap of the main thread alone. Ray trains in another one, whose own heap (an arena) gives everything
    back whatever it is told, and is slower still: `start_ray` therefore starts the workers with MALLOC_ARENA_MAX=1,
    which glibc reads when a process starts (15 images/s without, 55 with it).
    """
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
    with suppress(OSError, AttributeError):  # another C library has no such thing
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
