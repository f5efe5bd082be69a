"""Workers between a least and a most: a machine that is lost makes the group smaller, one that comes makes it larger.

Long. Two Ray nodes of their own on this machine, one of which is killed and replaced.
"""

import json
import os
import subprocess
import sys
import time
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.launch import run_workers
from cluster.worker import Worker

ROOT = Path(__file__).parent.parent
CLUSTER = ClusterConfig(workers=(1, 2), device="cpu", cpus_per_worker=1.0, max_failures=-1, hang_after_s=600)


def count_until(worker: Worker, done: str) -> None:
    """A collective and a checkpoint a step, until somebody has written `done`."""
    with worker.checkpoint() as folder:
        step = json.loads((folder / "state.json").read_text())["step"] if folder else 0
    is_done = [False]
    while not any(is_done):
        step += 1
        worker.tell({"step": step, "world": worker.world, "rank": worker.rank})
        with worker.snapshot() as folder:
            if worker.rank == 0:
                (folder / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(folder, worker.rank, worker.world, {"step": step})
            worker.report({"step": step}, folder, f"step-{step}")
        time.sleep(0.2)  # the work
        is_done = [False] * worker.world
        dist.all_gather_object(is_done, Path(done).exists())


def main(folder: Path) -> None:
    """Writes `folder/told.json`: (step, number of workers) of each step that rank 0 did."""
    import ray
    from ray.cluster_utils import Cluster

    from tests.test_elastic import count_until  # as Ray's workers import it

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)]
    ray.init(address=cluster.address, log_to_driver=False)
    # The next node is added by a thread that hands on messages; Python lets only the main one listen for signals.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    told: list[tuple[int, int]] = []

    def on_message(message):
        if "world" not in message or message["rank"]:
            return
        told.append((message["step"], message["world"]))
        worlds = [world for world, _ in groupby(world for _, world in told)]
        if worlds == [2] and len(told) == 4:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        if worlds == [2, 1] and not nodes:
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20))
        if worlds == [2, 1, 2]:
            (folder / "done").touch()

    arguments = {"done": str(folder / "done")}
    run_workers(
        count_until,
        arguments,
        name="count",
        run_uri=str(folder / "run"),
        cluster=CLUSTER,
        keep=(2, "step"),
        on_message=on_message,
    )
    (folder / "told.json").write_text(json.dumps(told))


@pytest.mark.long
def test_the_group_gets_smaller_with_a_lost_machine_and_larger_with_a_new_one(tmp_path):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([sys.executable, "-m", "tests.test_elastic", tmp_path], cwd=ROOT, env=environment, check=True)
    told = json.loads((tmp_path / "told.json").read_text())
    assert [world for world, _ in groupby(world for _, world in told)] == [2, 1, 2]
    for (before, _), (after, _) in pairwise(told):
        assert before - 2 < after <= before + 1, "more than the step since the last checkpoint was done again, or less"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
