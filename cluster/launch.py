"""Run a function on N workers with Ray Train, and restart it from its last checkpoint when something dies.

The function is called on every worker as `function(worker, **arguments)`. It talks to the driver through
`Worker.tell`, and saves and restores through `Worker.report` and `Worker.checkpoint`. What it computes is its own
business.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint import newest_whole
from cluster.config import ClusterConfig
from cluster.errors import UserError
from cluster.storage import to_pyarrow, worker_environment

POLL_MESSAGES_EVERY_S = 0.5
OBJECT_STORE_BYTES = 200 * 2**20  # features and images travel through files; Ray's store only carries messages


@dataclass
class Worker:
    """One training process: who it is, and its way to the driver and to the checkpoints."""

    rank: int
    world: int
    device: str
    _mailbox: Any

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the driver's `on_message`; returns at once."""
        self._mailbox.put.remote(message)

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The newest whole checkpoint as a local folder, or None; every rank gets the same one.

        A damaged one is passed over, with a warning that names the file, for the one before.

        Raises:
            UserError: There are checkpoints and none is whole: starting anew silently would lose the run.
        """
        import ray.train

        reported = sorted(ray.train.get_all_reported_checkpoints(), key=lambda r: r.metrics["step"], reverse=True)
        for candidate in reported:
            with candidate.checkpoint.as_directory() as folder:
                whole = newest_whole([Path(folder)])
                if whole is not None:
                    yield whole
                    return
        if reported:
            raise UserError(
                f"none of the {len(reported)} checkpoints below {Path(reported[0].checkpoint.path).parent} is whole; "
                "delete that folder to train from the start"
            )
        yield None

    def report(self, metrics: dict[str, float], folder: Path, name: str) -> None:
        """Register `folder` (each rank its own files, merged under `name`) as a checkpoint. Every rank takes part.

        `metrics` hold `step`, by which checkpoints are put in order.
        """
        import ray.train

        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)


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
    cores = os.cpu_count() or 1
    wanted = cluster.workers * cluster.cpus_per_worker if isinstance(cluster.workers, int) else 0
    ray.init(
        address="local",
        num_cpus=max(cores, math.ceil(wanted)),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def resolve_workers(cluster: ClusterConfig) -> tuple[int, str]:
    """Number of workers and their device (`cuda` or `cpu`), from the configuration and from what Ray has.

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
    if cluster.workers == "auto":
        if not room:
            raise UserError("cluster.workers = auto, but the cluster has no GPU yet; give the number of workers")
        return room, device
    if cluster.workers > room and not may_grow:
        unit = "GPUs" if device == "cuda" else "cores"
        raise UserError(
            f"cluster.workers = {cluster.workers}, but there are {room} {unit} for them; lower cluster.workers"
        )
    return cluster.workers, device


def run_workers(
    function: Callable[..., None],
    arguments: dict[str, Any],
    *,
    name: str,
    run_uri: str,
    cluster: ClusterConfig,
    keep: tuple[int, str] | None = None,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Outcome:
    """Call `function(worker, **arguments)` on every worker until it has returned everywhere.

    A worker that dies takes the group down; the group starts again, `Worker.checkpoint` giving the newest checkpoint,
    up to `cluster.max_failures` times. The same `name` and `run_uri` go on where a driver that died had come to.

    Args:
        function: Importable on the workers; must not return before it is done.
        arguments: Its keyword arguments, picklable.
        name: Folder below the run folder for Ray Train's state and the checkpoints.
        run_uri: Run folder, a path or s3:// URI that every worker reaches.
        cluster: Workers, device, failures.
        keep: (number of checkpoints to keep, metric by which the best are kept; the newest always stays).
        on_message: Called in the driver with what the workers `tell`.

    Raises:
        UserError: The function raised one on a worker.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    start_ray(cluster)
    workers, device = resolve_workers(cluster)
    mailbox = _mailbox_class().remote()
    filesystem, path = to_pyarrow(run_uri)
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if device == "cuda":
        resources["GPU"] = 1
    keep_number, keep_by = keep or (None, None)
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={
            "function": function,
            "arguments": arguments,
            "mailbox": mailbox,
            "device": device,
            "working_folder": os.getcwd(),
            "environment": worker_environment(),
        },
        torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=device == "cuda", resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=keep_number, checkpoint_score_attribute=keep_by, checkpoint_score_order="max"
            ),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    with _messages(mailbox, on_message):
        try:
            result = _fit(trainer)
        except ray.train.TrainingFailedError as error:
            failure = ray.get(mailbox.failure.remote())
            if failure:
                raise UserError(failure) from None
            raise error
    failure = ray.get(mailbox.failure.remote())
    if failure:
        raise UserError(failure)
    root = f"{path.rstrip('/')}/"
    best = [(c.path.removeprefix(root), dict(m)) for c, m in result.best_checkpoints or []]
    return Outcome(sorted(best, key=lambda item: -item[1][keep_by]) if keep_by else best)


def _fit(trainer: Any) -> Any:
    """`trainer.fit()` on a thread of its own: on the main one Ray Train takes Ctrl-C over and exits with status 0."""
    outcome: Future[Any] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:  # handed to the main thread
            outcome.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    return outcome.result()


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
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, mailbox)
    try:
        config["function"](worker, **config["arguments"])
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        raise


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the kernel.

    Each step frees and takes the same activations again; by default every one of them is mapped and zeroed anew
    (EfficientNet-Lite0, 64 images of 128 px, one process: 29 images/s without this, 48 with it; docs/log.md).
    """
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
    with suppress(OSError, AttributeError):  # another C library has no such thing
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _mailbox_class() -> Any:
    import ray

    @ray.remote(num_cpus=0)
    class Mailbox:
        """Messages from the workers to the driver, and the first user's mistake that a worker met."""

        def __init__(self) -> None:
            self.messages: list[dict[str, Any]] = []
            self.first_failure: str | None = None

        def put(self, message: dict[str, Any]) -> None:
            self.messages.append(message)

        def drain(self) -> list[dict[str, Any]]:
            messages, self.messages = self.messages, []
            return messages

        def fail(self, text: str) -> None:
            self.first_failure = self.first_failure or text

        def failure(self) -> str | None:
            return self.first_failure

    return Mailbox


@contextmanager
def _messages(mailbox: Any, on_message: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Hand messages to the driver while the workers run, and the rest of them at the end."""
    import ray

    done = threading.Event()

    def deliver() -> None:
        try:
            messages = ray.get(mailbox.drain.remote())
        except ray.exceptions.RayError:  # Ray itself is going down: `fit` tells why
            return
        for message in messages:
            on_message(message)

    def poll() -> None:
        while not done.wait(POLL_MESSAGES_EVERY_S):
            deliver()

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        deliver()
