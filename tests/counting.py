"""What two of Ray Train's workers do in tests: count, with a collective and a checkpoint a step, until trouble comes.

A program of its own, too, for the trouble with the network; see `main`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.launch import run_workers
from cluster.worker import Worker

ROOT = Path(__file__).parent.parent
ADDRESS, DEVICE = "10.77.7.7", "lo:1"
"""Of the training's own network: an address more of loopback, so that Ray keeps the other one."""
CLUSTER = ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5, max_failures=2, hang_after_s=6)
STEPS = 8
BROKEN_STEP = 5


def count(worker: Worker, marks: str, trouble: str) -> None:
    """A collective and a checkpoint a step; rank 1 gets into trouble once, at BROKEN_STEP."""
    with worker.checkpoint() as folder:
        done = json.loads((folder / "state.json").read_text())["step"] if folder else 0
    for step in range(done + 1, STEPS + 1):
        once = Path(marks) / "trouble"
        if worker.rank == 1 and step == BROKEN_STEP and not once.exists():
            once.touch()
            TROUBLES[trouble](worker)
        else:
            dist.barrier()
        worker.beat(f"step {step}")
        stops = [False] * worker.world
        dist.all_gather_object(stops, worker.should_stop)
        with worker.snapshot() as folder:
            if worker.rank == 0:
                (folder / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(folder, worker.rank, worker.world, {"step": step})
            worker.report({"step": step}, folder, f"step-{step}")
        if worker.rank == 0:
            worker.tell({"step": step})
        if any(stops):
            worker.leave()


def stop(worker: Worker) -> None:
    """The driver has felt, before, that this rank was alive after its last step, and that it was not hung."""
    doing = f"step {BROKEN_STEP - 1}"
    while not any(beat["rank"] == 1 and beat["doing"] == doing for beat in ray.get(worker._mailbox.beats.remote())):
        worker.beat(doing)
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGSTOP)


def be_told_to_go(worker: Worker) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while not worker.should_stop:
        time.sleep(0.1)
    dist.barrier()


def cut_the_network(worker: Worker) -> None:
    """What is sent from here on is dropped without a word, as by a switch without power."""
    ip(f"route del local {ADDRESS} dev lo table local")
    ip(f"route add blackhole {ADDRESS} table local")
    dist.barrier()


def mend_the_network() -> None:
    ip(f"route del blackhole {ADDRESS} table local")
    ip(f"route add local {ADDRESS} dev lo table local")


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


TROUBLES: dict[str, Callable[[Worker], None]] = {
    "none": lambda worker: dist.barrier(),
    "stopped": stop,
    "skips": lambda worker: None,  # rank 0 waits in a barrier that rank 1 has left out
    "told to go": be_told_to_go,
    "network is cut": cut_the_network,
}


def run(
    folder: Path, trouble: str, run_uri: str | None = None, on_message: Callable[[dict[str, Any]], object] = id
) -> tuple[list[int], list[dict[str, Any]]]:
    """Count with a trouble.

    Args:
        folder: For marks, and for the run.
        trouble: Of `TROUBLES`.
        run_uri: Another run folder.
        on_message: Is told everything, too.

    Returns:
        The steps in the order in which they were told, and the incidents.
    """
    told: list[dict[str, Any]] = []

    def keep(message: dict[str, Any]) -> None:
        told.append(message)
        on_message(message)

    run_workers(
        count,
        {"marks": str(folder), "trouble": trouble},
        name="count",
        run_uri=run_uri or str(folder / "run"),
        cluster=CLUSTER,
        keep=(2, "step"),
        on_message=keep,
    )
    return [m["step"] for m in told if "kind" not in m], [m for m in told if "kind" in m]


def in_a_network_of_its_own(folder: Path) -> list[Any]:
    """What `run` returns of a run whose network is cut until that is told; in a network name space of its own."""
    network = f"ip link set lo up && ip addr add {ADDRESS}/32 dev lo label {DEVICE}"
    command = f"{network} && exec {sys.executable} -m tests.counting {folder}"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run(["unshare", "-rn", "sh", "-c", command], cwd=ROOT, env=environment, check=True)
    return json.loads((folder / "told.json").read_text())


def main(folder: Path) -> None:
    """`python -m tests.counting FOLDER`: writes FOLDER/told.json."""
    from tests.counting import run  # as Ray's workers import it

    def mend(message: dict[str, Any]) -> None:
        if message.get("kind") == "hang":
            mend_the_network()

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    (folder / "told.json").write_text(json.dumps(run(folder, "network is cut", on_message=mend)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
