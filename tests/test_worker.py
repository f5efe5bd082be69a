"""A worker of Ray Train without a session: which checkpoint it takes, what it deletes, when its machine is drained."""

from types import SimpleNamespace

import pytest
import ray.train
import ray.train.collective
import ray.train.v2._internal.execution.context as execution
from ray.train import Checkpoint
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.checkpoint import write_manifest
from cluster.errors import UserError
from cluster.worker import RayWorker


@pytest.fixture
def worker(tmp_path):
    """Rank 0 of 2; what it warns of is in `worker.warned`."""
    worker = RayWorker(0, 2, "cpu", None, str(tmp_path / "run"), SimpleNamespace(run_stops=False))
    worker.warned = []
    worker.warn = worker.warned.append
    return worker


def save(worker, step, name=None, world=1):
    folder = worker._storage.root / (name or f"step-{step}")
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(b"1")
    write_manifest(folder, 0, world, {"step": step})
    return folder


@pytest.fixture
def registered(worker, monkeypatch):
    """Let Ray Train have registered checkpoints, in this order."""

    def register(*names_and_steps):
        reported = [
            SimpleNamespace(
                checkpoint=Checkpoint.from_directory(str(worker._storage.root / name)), metrics={"step": step}
            )
            for name, step in names_and_steps
        ]
        monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda **options: reported)
        monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda name: name)

    register()
    return register


def taken(worker):
    with worker.checkpoint() as folder:
        return folder and folder.name


def names(worker):
    return {path.name for path in worker._storage.root.iterdir() if list(path.iterdir())}


class TestCheckpoint:
    def test_the_others_take_what_rank_zero_chose(self, worker, registered, monkeypatch):
        """Though a newer one may be whole by then: rank 0 found it damaged, and the run has saved it anew."""
        for step in (1, 2, 3):
            save(worker, step)
        registered(("step-1", 1), ("step-2", 2), ("step-3", 3))
        late = RayWorker(1, 2, "cpu", None, str(worker._storage.root), SimpleNamespace(run_stops=False))
        monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda name: "step-2")
        assert taken(late) == "step-2"
        (worker._storage.root / "step-2" / "weights.bin").write_bytes(b"2")
        with pytest.raises(UserError, match=r"weights\.bin was altered"):
            taken(late)

    def test_the_newest_is_taken_and_what_nobody_registered_is_deleted(self, worker, registered):
        for step in (1, 2, 3):
            save(worker, step)
        save(worker, 4, world=2)  # the other rank was killed
        registered(("step-1", 1), ("step-2", 2))
        assert taken(worker) == "step-2" and not worker.warned
        assert names(worker) == {"step-1", "step-2"}

    def test_of_one_step_the_end_of_the_epoch_is_newer(self, worker, registered):
        save(worker, 8)
        save(worker, 8, "epoch-1")
        registered(("step-8", 8), ("epoch-1", 8))
        assert taken(worker) == "epoch-1"

    def test_a_registered_folder_that_is_gone_is_passed_over_for_the_one_before(self, worker, registered):
        save(worker, 1)
        registered(("step-1", 1), ("step-2", 2))
        assert taken(worker) == "step-1"
        root = worker._storage.root
        assert worker.warned == [f"passed over: checkpoint {root}/step-2 is not whole: manifest.json is missing"]

    def test_where_none_is_whole_training_does_not_begin_anew(self, worker, registered):
        (save(worker, 1) / "weights.bin").write_bytes(b"2")
        registered(("step-1", 1), ("step-2", 2))
        with pytest.raises(UserError, match=r"^none of the 2 checkpoints below \S+/run is whole; delete that folder"):
            taken(worker)
        assert names(worker) == {"step-1"}

    def test_whole_ones_are_not_deleted_because_nothing_is_registered(self, worker, registered):
        save(worker, 1)
        save(worker, 2, world=2)
        assert taken(worker) is None
        assert names(worker) == {"step-1"}


class TestReport:
    @pytest.fixture(autouse=True)
    def reports(self, monkeypatch):
        given = []
        monkeypatch.setattr(ray.train, "report", lambda metrics, **options: given.append(options))
        return given

    def test_a_save_that_is_repeated_is_not_mixed_with_its_first_try(self, worker, registered, tmp_path, reports):
        """Of another number of workers it would leave files that no manifest vouches for."""
        save(worker, 1)
        (save(worker, 2) / "weights.bin").write_bytes(b"damaged")
        registered(("step-1", 1), ("step-2", 2))
        assert taken(worker) == "step-1"
        worker.report({"step": 2}, tmp_path, "step-2")
        assert names(worker) == {"step-1"} and len(reports) == 1

    def test_what_the_run_goes_on_from_stays(self, worker, registered, tmp_path):
        for step in (1, 2):
            save(worker, step)
        registered(("step-1", 1), ("step-2", 2))
        assert taken(worker) == "step-2"
        worker.report({"step": 3}, tmp_path, "step-3")
        worker.report({"step": 2}, tmp_path, "step-2")
        assert names(worker) == {"step-1", "step-2"}


def test_a_machine_that_is_drained_is_left_after_one_more_checkpoint(worker, monkeypatch):
    told = PreemptionContext()
    monkeypatch.setattr(execution, "get_train_context", lambda: SimpleNamespace(preemption_context=told))
    settled = []
    monkeypatch.setattr(worker, "settle", lambda: settled.append(True))
    assert not worker.should_stop
    told.preemption_info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a node": [1]})
    assert worker.should_stop and worker.should_stop
    worker.leave()
    assert settled and not worker.should_stop, "one checkpoint is enough: Ray Train moves the group"


def test_ray_has_what_the_worker_asks_for_in_its_own_context():
    assert "preemption_context" in execution.TrainContext.__dataclass_fields__
    assert PreemptionContext().preemption_info is None
