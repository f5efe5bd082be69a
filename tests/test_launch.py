"""Ray Train for real, on two workers: messages, restart from a checkpoint, users' mistakes."""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.errors import UserError
from cluster.launch import Worker, resolve_workers, run_workers

CLUSTER = ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5, max_failures=2)


def count_to_four(worker: Worker, marks: str) -> None:
    """Counts, a checkpoint a number; rank 1 is killed once, just after 2."""
    with worker.checkpoint() as folder:
        first = json.loads((folder / "state.json").read_text())["step"] + 1 if folder else 1
    for step in range(first, 5):
        if worker.rank == 0:
            worker.tell({"step": step, "world": worker.world})
        with tempfile.TemporaryDirectory() as name:
            if worker.rank == 0:
                (Path(name) / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(Path(name), worker.rank, worker.world, {"step": step})
            worker.report({"step": step, "score": -abs(step - 3)}, Path(name), f"step-{step}")
        if worker.rank == 1 and step == 2 and not (Path(marks) / "killed").exists():
            (Path(marks) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def refuse(worker: Worker, marks: str) -> None:
    (Path(marks) / f"called-{worker.rank}-{os.getpid()}").touch()
    raise UserError("model.backbone = 'resnet5' is no timm network")


def test_a_killed_worker_costs_no_more_than_the_steps_since_the_last_checkpoint(ray_session, tmp_path):
    told = []
    outcome = run_workers(
        count_to_four,
        {"marks": str(tmp_path)},
        name="count",
        run_uri=str(tmp_path / "run"),
        cluster=CLUSTER,
        keep=(2, "score"),
        on_message=told.append,
    )
    assert (tmp_path / "killed").exists()
    steps = [m["step"] for m in told]
    assert sorted(set(steps)) == [1, 2, 3, 4] and steps[-1] == 4
    assert steps.count(1) == 1, "started anew; at most the report of 2 is lost with the worker"
    assert {m["world"] for m in told} == {2}
    best, metrics = outcome.checkpoints[0]
    assert best == "count/step-3" and metrics["score"] == 0
    assert (tmp_path / "run" / best / "manifest.json").exists()


def test_a_users_mistake_on_a_worker_reaches_the_driver_and_is_not_tried_again(ray_session, tmp_path):
    with pytest.raises(UserError, match=r"^model.backbone = 'resnet5' is no timm network$"):
        run_workers(refuse, {"marks": str(tmp_path)}, name="refuse", run_uri=str(tmp_path / "run"), cluster=CLUSTER)
    called = [path.name.split("-")[1] for path in tmp_path.glob("called-*")]
    assert called and len(called) == len(set(called)), "a rank was called twice"


def test_more_workers_than_room_and_a_missing_gpu_are_refused(ray_session):
    with pytest.raises(UserError, match=r"cluster.workers = 64, but there are 4 cores for them; lower cluster.workers"):
        resolve_workers(CLUSTER.model_copy(update={"workers": 64}))
    with pytest.raises(UserError, match=r"cluster.device = cuda, but Ray sees no GPU; set cluster.device=cpu"):
        resolve_workers(CLUSTER.model_copy(update={"device": "cuda"}))
    assert resolve_workers(CLUSTER.model_copy(update={"workers": "auto"})) == (4, "cpu")
