"""What TensorBoard and an MLflow server are told of a training, read back from their own files and database."""

import shutil
import sys

import pytest
from mlflow import MlflowClient

import trainer.stage_one
from cluster.config import flatten
from cluster.errors import UserError
from cluster.launch import Outcome
from cluster.run import RunFolder
from tests.packed import write_packed
from tests.tiny import tiny_config
from trainer.stage_one import train_stage_one
from trainer.tracking import TrackingConfig, check_tracking, send_model, tracking

LINES = [
    {"kind": "step", "step": 1, "epoch": 0, "loss": 2.0, "images_per_s": 10.0, "anchors": {"a b": 3}},
    {"kind": "step", "step": 2, "epoch": 0, "loss": 1.5, "images_per_s": 11.0, "anchors": {"a b": 4}},
    {"kind": "epoch", "step": 2, "epoch": 0, "balanced_accuracy": 0.5},
]


def asked(folder, **sections):
    return tiny_config(folder / "images", folder / "run", tracking={"mlflow": True}, **sections)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """An empty MLflow database, which takes seconds to make."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def server(database, tmp_path, monkeypatch):
    """A client of an MLflow database on this disk, with its experiment; `tracking.mlflow` tells that one."""
    shutil.copy(database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = MlflowClient()
    client.create_experiment("rarelens", artifact_location=str(tmp_path / "artifacts"))
    return client


def the_run(client):
    """The only run of the experiment."""
    (found,) = client.search_runs([client.get_experiment_by_name("rarelens").experiment_id])
    return found


def history(client, run_id, name):
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}


def test_a_training_is_told_to_mlflow_as_one_run(server, tmp_path, monkeypatch):
    """The workers' messages are made up; who takes them in, and what takes the figures, is real."""
    config, run = asked(tmp_path), RunFolder(str(tmp_path / "run"))
    dataset = write_packed(tmp_path / "dataset", {"train": [20, 20], "val": [2, 2], "test": [2, 2]})

    def workers(*_, on_message, **__):
        for line in LINES:
            on_message(dict(line))
        metrics = {"epoch": 0, **dict.fromkeys(trainer.stage_one.METRICS, 0.5)}
        return Outcome([("stage_one/epoch-0000", metrics)])

    monkeypatch.setattr(trainer.stage_one, "run_workers", workers)
    train_stage_one(config, dataset, run)
    train_stage_one(config, dataset, run, "baseline")

    found = the_run(server)
    assert found.info.run_name == "run" and found.info.status == "RUNNING"
    settings = flatten(config.model_dump(mode="json"))
    assert found.data.params == {key: str(value)[:500] for key, value in settings.items()}
    assert history(server, found.info.run_id, "stage_one/step/loss") == {1: 2.0, 2: 1.5}
    assert history(server, found.info.run_id, "baseline/step/loss") == {1: 2.0, 2: 1.5}
    assert history(server, found.info.run_id, "stage_one/step/anchors/a b") == {1: 3.0, 2: 4.0}
    assert history(server, found.info.run_id, "stage_one/epoch/balanced_accuracy") == {2: 0.5}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.work / "tensorboard" / "baseline"))
    events.Reload()
    assert {event.step: event.value for event in events.Scalars("step/loss")} == {1: 2.0, 2: 1.5}
    assert [event.value for event in events.Scalars("step/anchors/a b")] == [3.0, 4.0]


def test_the_model_goes_to_the_server_once(server, tmp_path):
    config, run = asked(tmp_path), RunFolder(str(tmp_path / "run"))
    row = {"name": "winner", "balanced_accuracy": 0.75, "macro_f1": 0.5, "worst_recall": 0.25}
    run.write_json("model/metrics.json", {"rows": [row], "model": "winner"})
    (run.path("model/report.html")).write_text("a report")
    send_model(config, run)
    send_model(config, run)
    found = the_run(server)
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"test/balanced_accuracy": 0.75, "test/macro_f1": 0.5, "test/worst_recall": 0.25}
    assert len(server.get_metric_history(found.info.run_id, "test/macro_f1")) == 1
    assert {entry.path for entry in server.list_artifacts(found.info.run_id, "model")} == {
        "model/metrics.json",
        "model/report.html",
    }
    kept = tmp_path / "artifacts" / found.info.run_id / "artifacts" / "model"
    assert (kept / "report.html").read_text() == "a report"


def test_it_is_off_by_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import would raise
    config, run = tiny_config(tmp_path, tmp_path / "run"), RunFolder(str(tmp_path / "run"))
    with tracking(config, run, "stage_one") as told:
        assert len(told) == 1
    check_tracking(config.tracking)
    send_model(config, run)
    assert not (tmp_path / "run" / "mlflow.json").exists()


def test_without_the_extra_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"not installed; install it with `pip install 'rarelens\[mlflow\]'`"):
        check_tracking(TrackingConfig(mlflow=True))


def test_without_a_server_s_address_that_is_told(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI is not set; set it to the server's address"):
        check_tracking(TrackingConfig(mlflow=True))


def test_a_server_that_does_not_answer_is_told_without_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted-secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = RunFolder(str(tmp_path / "run"))
    told = r"cannot be told of the run .*; check the address"
    with pytest.raises(UserError, match=told) as caught, tracking(asked(tmp_path), run, "stage_one"):
        raise AssertionError
    assert "planted-secret" not in str(caught.value) and caught.value.__suppress_context__


def test_a_server_that_goes_away_costs_its_figures_and_no_training(server, tmp_path, monkeypatch, capsys):
    run = RunFolder(str(tmp_path / "run"))
    with tracking(asked(tmp_path), run, "stage_one") as told:
        (tmp_path / "mlflow.db").write_bytes(b"no database any more")
        for tracker in told:
            tracker.line(LINES[0])
    assert "stage_one: the MLflow server did not take all figures; log.jsonl" in capsys.readouterr().err
