"""When a run whose workers die is given up, and what is said then: deaths in a row without a newer checkpoint count."""

import json
import os
import signal
from pathlib import Path

import pytest
import ray.exceptions
import ray.train

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.driver import fit_while_it_gets_on
from cluster.launch import _given_up, run_workers
from cluster.storage import open_storage
from cluster.worker import Worker


class Fits:
    """Ray Train that fails until its steps are used up; `newest` is the newest checkpoint's before each attempt."""

    def __init__(self, *newest):
        self.newest, self.attempts = list(newest), 0

    def attempt(self):
        self.attempts += 1
        if len(self.newest) > 0:
            raise ray.train.WorkerGroupError(f"death {self.attempts}", {})
        return "trained"

    def newest_step(self):
        return self.newest.pop(0)


def test_deaths_count_anew_after_each_newer_checkpoint():
    fits = Fits(0, 10, 20, 30, 40, 41)
    assert fit_while_it_gets_on(fits.attempt, fits.newest_step, lambda: True) == "trained"
    assert fits.attempts == 6 and not fits.newest


@pytest.mark.parametrize(
    ("newest", "attempts"), [((0, 0, 1), 1), ((7, 7, 8), 1), ((0, 10, 10, 11), 2), ((0, 10, 8, 11), 2)]
)
def test_a_run_that_does_not_get_on_is_given_up(newest, attempts):
    fits = Fits(*newest)
    with pytest.raises(ray.train.WorkerGroupError, match=rf"death {attempts}$"):
        fit_while_it_gets_on(fits.attempt, fits.newest_step, lambda: True)
    assert fits.attempts == attempts


def test_a_users_mistake_is_not_tried_again_however_far_the_run_came():
    fits = Fits(0, 10, 20)
    with pytest.raises(ray.train.WorkerGroupError, match=r"death 1$"):
        fit_while_it_gets_on(fits.attempt, fits.newest_step, lambda: False)


def test_what_is_said_of_a_run_that_was_given_up():
    cluster = ClusterConfig(max_failures=2)
    deaths = _given_up(ray.train.WorkerGroupError("rank 1\nSIGKILL", {}), "stage_one", "s3://b/run", cluster)
    assert str(deaths) == (
        "stage_one failed on its workers more often than cluster.max_failures = 2 allows in a row without progress, "
        "the last time with: SIGKILL; mend it, and the same command goes on from the last checkpoint"
    )
    books = _given_up(ray.train.ControllerError(OSError("no such bucket")), "stage_one", "s3://b/run", cluster)
    assert str(books) == (
        "Ray Train's controller of stage_one failed, on the driver's machine, with: no such bucket; see whether "
        "s3://b/run can be written and this machine has memory left, and the same command goes on from the last "
        "checkpoint"
    )
    died = _given_up(ray.exceptions.ActorDiedError(), "stage_one", "s3://b/run", cluster)
    assert "max_failures" not in str(died) and "controller of stage_one failed" in str(died)


def count_to_six(worker: Worker, marks: str) -> None:
    """Counts, a checkpoint a number; rank 1 is killed after 2, 4 and 5, once each."""
    with worker.checkpoint() as folder:
        done = json.loads((folder / "state.json").read_text())["step"] if folder else 0
    worker.tell({"goes on from": done})
    for step in range(done + 1, 7):
        with worker.snapshot() as folder:
            if worker.rank == 0:
                (folder / "state.json").write_text(json.dumps({"step": step}))
            write_manifest(folder, worker.rank, worker.world, {"step": step})
            worker.report({"step": step}, folder, f"step-{step}")
        mark = Path(marks) / f"killed-{step}"
        if worker.rank == 1 and step in (2, 4, 5) and not mark.exists():
            worker.settle()
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
def test_more_deaths_than_max_failures_cost_no_more_where_the_run_gets_on(ray_session, moto_s3, tmp_path):
    told, uri = [], f"{moto_s3}/{tmp_path.name}/run"
    cluster = ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5, max_failures=1)
    arguments = {"marks": str(tmp_path)}
    run_workers(
        count_to_six, arguments, name="n", run_uri=uri, cluster=cluster, keep=(1, "score"), on_message=told.append
    )
    assert [m["goes on from"] for m in told if "goes on from" in m] == [0, 0, 2, 2, 4, 4, 5, 5]
    assert [m["kind"] for m in told if "kind" in m] == ["lost"] * 3
    stored = {file.path.split("/")[1] for file in open_storage(uri).list("n/step-")}
    assert stored == {"step-5", "step-6"}, "none has a score, and the two newest stay"
