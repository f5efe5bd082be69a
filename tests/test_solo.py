"""A trial's only worker: what is kept when it is killed while its checkpoint is judged, and what is said then."""

import json

import pytest
from ray import tune

import tuning.trial
from cluster.checkpoint import write_manifest
from cluster.solo import SoloWorker
from cluster.storage import open_storage
from tests.tiny import tiny_config
from tuning.stage_one import _trainable
from tuning.trial import TrialJob, read_scores, train_and_judge


class Killed(Exception):
    """Stands for SIGKILL."""


def save(worker, epoch):
    """As stage one does: a folder, vouched for, reported."""
    with worker.snapshot() as folder:
        (folder / "state.json").write_text(json.dumps({"epoch": epoch}))
        write_manifest(folder)
        metrics = {"epoch": epoch, "step": 10 * (epoch + 1), "balanced_accuracy": 0.5, "macro_f1": 0.5}
        worker.report(metrics, folder, f"epoch-{epoch:04d}")


def newest(worker):
    with worker.checkpoint() as folder:
        return None if folder is None else json.loads((folder / "state.json").read_text())["epoch"]


def test_a_checkpoint_that_was_not_judged_to_the_end_is_not_kept(tmp_path):
    storage = open_storage(tmp_path)

    def dies(metrics, folder):
        assert json.loads((folder / "state.json").read_text()) == {"epoch": metrics["epoch"]}
        raise Killed

    for before in (None, 0):  # of a first epoch, of a later one
        with pytest.raises(Killed):
            save(SoloWorker("cpu", storage, dies), 0 if before is None else 1)
        again = SoloWorker("cpu", storage, lambda metrics, folder: None)
        assert newest(again) == before, "the epoch is done again"
        save(again, 0 if before is None else 1)
        assert newest(again) == (0 if before is None else 1)


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """Runs a trial of three epochs, each judged, whose training is its checkpoints alone."""
    config = tiny_config(
        tmp_path, tmp_path / "run", stage_one={"epochs": 3}, search={"first_epochs": 1, "reduction": 2}
    )
    job = TrialJob(config, "packed", str(tmp_path / "trials"), "cpu", str(tmp_path), {}, 0.0)
    trained = []

    def train(worker, config, dataset_uri):
        done = newest(worker)
        for epoch in range(0 if done is None else done + 1, 3):
            trained.append(epoch)
            save(worker, epoch)

    monkeypatch.setattr(tuning.trial, "open_dataset", lambda uri: None)
    monkeypatch.setattr(tuning.trial, "train_on_worker", train)

    def run(judge, report):
        monkeypatch.setattr(tuning.trial, "judge", judge)
        train_and_judge(job, "one", {}, report)

    return run, trained, open_storage(tmp_path / "trials" / "one")


def judged(config, dataset, folder, device):
    return {"score": 0.1 * json.loads((folder / "state.json").read_text())["epoch"]}


def test_a_trial_that_is_killed_while_it_is_judged_loses_no_score(trial):
    run, trained, storage = trial
    heard = []

    def dies_at_the_second_epoch(config, dataset, folder, device):
        line = judged(config, dataset, folder, device)
        if line["score"]:
            raise Killed
        return line

    with pytest.raises(Killed):
        run(dies_at_the_second_epoch, heard.append)
    assert [line["epochs"] for line in heard] == [1]
    run(judged, heard.append)
    assert trained == [0, 1, 1, 2]
    assert [(line["epochs"], round(line["score"], 1)) for line in read_scores(storage)] == [
        (1, 0.0),
        (2, 0.1),
        (3, 0.2),
    ]
    assert [line["epochs"] for line in heard] == [1, 1, 2, 3], "what was said before is said again, then the rest"


def test_tune_hears_of_an_epoch_when_its_score_and_its_checkpoint_are_kept(trial):
    """It may end the trial there, and another process goes on with it later."""
    run, _, storage = trial
    kept = []

    def hears(line):
        (name,) = {stored.path.split("/")[1] for stored in storage.list("checkpoints/")}
        kept.append((line["epochs"], read_scores(storage)[-1]["epochs"], name))

    run(judged, hears)
    assert kept == [(n + 1, n + 1, f"{10 * (n + 1):08d}-epoch-{n:04d}") for n in range(3)]


@pytest.mark.parametrize(("device", "asked"), [("cuda", {"cpu": 1.0, "gpu": 0.5}), ("cpu", {"cpu": 1.0})])
def test_a_trial_asks_for_its_share_of_a_gpu_where_there_is_one(tmp_path, monkeypatch, device, asked):
    given, real = [], tune.with_resources
    monkeypatch.setattr(tune, "with_resources", lambda trial, wants: given.append(wants) or real(trial, wants))
    job = TrialJob(tiny_config(tmp_path, tmp_path), "packed", str(tmp_path / "trials"), device, str(tmp_path), {}, 0.0)
    _trainable(job, train_and_judge)
    assert given == [asked]
