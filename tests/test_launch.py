"""Ray Train for real, on two workers: messages, restart from a checkpoint, users' mistakes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.driver import why_lost
from cluster.errors import UserError
from cluster.launch import _say_once, resolve_workers, run_workers
from cluster.worker import Worker
from tests.drivers import ROOT

CLUSTER = ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5, max_failures=2)


def count_to_four(worker: Worker, marks: str) -> None:
    """Counts, a checkpoint a number; rank 1 is killed once, just after 2."""
    with worker.checkpoint() as folder:
        first = json.loads((folder / "state.json").read_text())["step"] + 1 if folder else 1
    for step in range(first, 5):
        if worker.rank == 0:
            worker.tell({"step": step, "world": worker.world})
        with worker.snapshot() as folder:
            if worker.rank == 0:
                (folder / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(folder, worker.rank, worker.world, {"step": step})
            worker.report({"step": step, "score": -abs(step - 3)}, folder, f"step-{step}")
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
    (lost,) = [m["text"] for m in told if m.get("kind") == "lost"]
    assert re.fullmatch(r"rank 1 \(process \d+ on 127\.0\.0\.1\) died: its worker process has died", lost)
    steps = [m["step"] for m in told if "kind" not in m]
    assert sorted(set(steps)) == [1, 2, 3, 4] and steps[-1] == 4
    assert steps.count(1) == 1, "started anew; at most the report of 2 is lost with the worker"
    assert {m["world"] for m in told if "kind" not in m} == {2}
    best, metrics = outcome.checkpoints[0]
    assert best == "count/step-3" and metrics["score"] == 0
    assert (tmp_path / "run" / best / "manifest.json").exists()
    kept = {path.parent.name for path in (tmp_path / "run/count").glob("step-*/manifest.json")}
    assert {"step-3", "step-4"} <= kept and "step-1" not in kept, "the best, and the newest"


def test_a_users_mistake_on_a_worker_reaches_the_driver_and_is_not_tried_again(ray_session, tmp_path):
    with pytest.raises(UserError, match=r"^model.backbone = 'resnet5' is no timm network$"):
        run_workers(refuse, {"marks": str(tmp_path)}, name="refuse", run_uri=str(tmp_path / "run"), cluster=CLUSTER)
    called = [path.name.split("-")[1] for path in tmp_path.glob("called-*")]
    assert called and len(called) == len(set(called)), "a rank was called twice"


def damage_the_newest(worker: Worker, folder: str) -> None:
    """Counts to three; then rank 1 leaves a damaged checkpoint, part of a killed save, and no sign of life."""
    with worker.checkpoint() as kept:
        done = json.loads((kept / "state.json").read_text())["step"] if kept else 0
    worker.tell({"goes on from": done})
    for step in range(done + 1, 4):
        with worker.snapshot() as snapshot:
            if worker.rank == 0:
                (snapshot / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(snapshot, worker.rank, worker.world, {"step": step})
            worker.report({"step": step}, snapshot, f"step-{step}")
    worker.settle()
    if worker.rank == 1 and not done:
        (Path(folder) / "step-3" / "state.json").write_text('{"step": 4}')
        (Path(folder) / "step-4").mkdir()
        (Path(folder) / "step-4" / "manifest-rank1.json").write_text("{}")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_what_killed_saves_left_is_deleted(
    ray_session, tmp_path
):
    told, folder = [], tmp_path / "run" / "count"
    run_workers(
        damage_the_newest,
        {"folder": str(folder)},
        name="count",
        run_uri=str(tmp_path / "run"),
        cluster=CLUSTER,
        keep=(3, "step"),
        on_message=told.append,
    )
    assert [m["goes on from"] for m in told if "goes on from" in m] == [0, 0, 2, 2]
    warnings = {
        m["text"].partition("; ")[0].partition(" is not whole: ")[2] for m in told if m.get("kind") == "warning"
    }
    assert warnings == {"state.json was altered: its SHA-256 is not the manifest's"}
    assert {path.parent.name for path in folder.glob("step-*/*")} == {"step-1", "step-2", "step-3"}


def count_for_ever(worker: Worker) -> None:
    for step in range(10_000):
        worker.beat(f"step {step}")
        worker.tell({"step": step})
        time.sleep(0.1)


def test_a_driver_that_cannot_take_messages_ends_the_run_with_its_error(ray_session, tmp_path):
    def take(message):
        if message["step"] == 3:
            raise UserError("no space left in /runs; free some or choose a folder on another disk")

    with pytest.raises(UserError, match=r"^no space left in /runs; free some"):
        run_workers(count_for_ever, {}, name="n", run_uri=str(tmp_path), cluster=CLUSTER, on_message=take)


class Died(Exception):
    """As Ray Train's WorkerHealthCheckFailedError."""

    health_check_failure = RuntimeError()


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ({1: RuntimeError("Traceback\n  in gather\nValueError: no\n")}, "rank 1 failed: ValueError: no"),
        ({0: RuntimeError("peer"), 2: Died("pid: 7\nip: h2\nThe actor died because its node has died. Node Id: x")},
         "rank 2 (process 7 on h2) died: its node has died"),
        ({0: Died("one\nanother sentence"), 1: Died("pid: 8\nip: h1")},
         "rank 0 died: another sentence; rank 1 (process 8 on h1) died: ip: h1"),
    ],
)  # fmt: skip
def test_why_workers_were_lost(errors, text):
    assert why_lost(errors) == text


class Trained(Exception):
    """Ray Train would start now."""


@pytest.fixture
def train_settings(ray_session, monkeypatch, tmp_path):
    """What Ray Train is given for a cluster section, on a cluster with three GPUs."""
    import ray.train.torch

    def settings(most=None, **cluster):
        given = {}

        def trainer(function, **kwargs):
            given.update(kwargs)
            raise Trained

        monkeypatch.setattr(ray.train.torch, "TorchTrainer", trainer)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 24.0, "GPU": 3.0})
        with pytest.raises(Trained):
            run_workers(say_the_world, {}, name="n", run_uri=str(tmp_path), cluster=ClusterConfig(**cluster), most=most)
        return given["torch_config"], given["scaling_config"]

    return settings


def test_auto_is_every_gpu_with_nccl_and_else_every_core_with_gloo(train_settings):
    torch_config, scaling = train_settings(cpus_per_worker=4)
    assert (torch_config.backend, scaling.num_workers, scaling.use_gpu) == ("nccl", 3, True)
    assert scaling.resources_per_worker == {"CPU": 4, "GPU": 1} and scaling.placement_strategy == "PACK"
    torch_config, scaling = train_settings(device="cpu", cpus_per_worker=0.5, placement="strict_spread")
    assert (torch_config.backend, scaling.num_workers, scaling.use_gpu) == ("gloo", 48, False)
    assert scaling.resources_per_worker == {"CPU": 0.5} and scaling.placement_strategy == "STRICT_SPREAD"


def test_auto_is_no_more_workers_than_the_work_has_a_use_for(train_settings):
    assert train_settings(most=2)[1].num_workers == 2
    assert train_settings(most=8)[1].num_workers == 3
    assert train_settings(most=8, device="cpu", cpus_per_worker=0.5)[1].num_workers == 8


def test_the_mailbox_lives_on_the_drivers_machine(train_settings, monkeypatch):
    """Ray puts an actor without resources on any machine, and a spot machine would take the mail with it."""
    import ray

    given, remote = {}, ray.remote

    def recorded(*args, **options):
        made = remote(*args, **options)
        return made if not options else lambda cls: given.setdefault(cls.__name__, options) and made(cls)

    monkeypatch.setattr(ray, "remote", recorded)
    train_settings()
    (node,) = ray.nodes()
    assert given["Mailbox"] == {"num_cpus": 0, "label_selector": {"ray.io/node-id": node["NodeID"]}}


def test_a_cluster_without_gpus_yet_is_told_once(train_settings, monkeypatch, capsys):
    def said():
        train_settings()
        return " ".join(capsys.readouterr().err.split())

    line = "no GPU in the cluster yet: training on the CPU; cluster.device=cuda has the autoscaler start some"
    _say_once.cache_clear()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert line not in said(), "there are three"
    monkeypatch.setattr("cluster.launch.resolve_workers", lambda cluster, most: (2, "cpu"))
    assert line in said() and line not in said()
    _say_once.cache_clear()
    monkeypatch.delenv("RAY_ADDRESS")
    assert line not in said(), "no autoscaler would start any"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(Trained):
        run_workers(say_the_world, {}, name="n", run_uri="unused", cluster=ClusterConfig(device="cpu"))
    assert line not in capsys.readouterr().err, "it was asked for"


def test_auto_on_a_cluster_that_has_no_gpu_yet_asks_for_a_number(monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    with pytest.raises(
        UserError, match=r"^cluster.workers = auto, but the cluster has no GPU yet; give the number of workers$"
    ):
        resolve_workers(ClusterConfig(device="cuda"))
    assert resolve_workers(ClusterConfig(device="cuda", workers=3)) == (3, "cuda")


def say_the_world(worker: Worker) -> None:
    worker.tell({"world": worker.world})


def say_what_freeing_gives_back(worker: Worker) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    taken = [np.ones(2**20) for _ in range(32)]  # 8 MiB each
    held = resident_pages()
    taken.clear()
    worker.tell({"given_back_mib": (held - resident_pages()) * resource.getpagesize() / 2**20})


def test_workers_keep_what_a_step_frees_although_ray_trains_in_a_thread(tmp_path):
    """In a Ray that the program starts; the test session's has the same environment by its own hand."""
    script = f"""
from cluster.launch import run_workers
from tests.test_launch import CLUSTER, say_what_freeing_gives_back as say
one = CLUSTER.model_copy(update={{"workers": 1}})
run_workers(say, {{}}, name="n", run_uri={str(tmp_path)!r}, cluster=one, on_message=lambda said: print(said))
"""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    for name in ("RAY_ADDRESS", "MALLOC_ARENA_MAX"):
        environment.pop(name, None)
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    (said,) = re.findall(r"'given_back_mib': ([\d.-]+)", ended.stdout)
    assert float(said) < 64, "of 256"


def test_between_the_least_and_the_most_there_are_as_many_workers_as_there_is_room_for(ray_session, tmp_path):
    told = []
    cluster = CLUSTER.model_copy(update={"workers": (1, 3), "cpus_per_worker": 1.0})
    run_workers(say_the_world, {}, name="elastic", run_uri=str(tmp_path), cluster=cluster, on_message=told.append)
    assert [message["world"] for message in told] == [2, 2]


def test_more_workers_than_room_and_a_missing_gpu_are_refused(ray_session):
    with pytest.raises(UserError, match=r"cluster.workers = 64, but there are 4 cores for them; lower cluster.workers"):
        resolve_workers(CLUSTER.model_copy(update={"workers": 64}))
    with pytest.raises(UserError, match=r"cluster.device = cuda, but Ray sees no GPU; set cluster.device=cpu"):
        resolve_workers(CLUSTER.model_copy(update={"device": "cuda"}))
    with pytest.raises(UserError, match=r"cluster.workers = \[64, 65\], but there are 4 cores for them"):
        resolve_workers(CLUSTER.model_copy(update={"workers": (64, 65)}))
    assert resolve_workers(CLUSTER.model_copy(update={"workers": "auto"})) == (4, "cpu")
    assert resolve_workers(CLUSTER.model_copy(update={"workers": (2, 64)})) == ((2, 64), "cpu")
