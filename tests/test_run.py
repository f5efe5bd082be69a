import json

import pytest

from cluster.errors import UserError
from cluster.run import RunFolder


def test_config_is_pinned_and_a_changed_one_is_refused(tmp_path):
    uri = str(tmp_path / "run")
    RunFolder(uri).pin_config({"run": uri, "stage_one": {"epochs": 8, "lr": 0.1}, "cluster": {"workers": 2}})
    RunFolder(uri).pin_config({"run": uri, "stage_one": {"epochs": 8, "lr": 0.1}, "cluster": {"workers": 1}})
    with pytest.raises(
        UserError, match=r"was started with another configuration \(stage_one.epochs = 9, was 8\); give another run="
    ):
        RunFolder(uri).pin_config({"run": uri, "stage_one": {"epochs": 9, "lr": 0.1}, "cluster": {"workers": 2}})


def test_resume_of_nothing_is_refused(tmp_path):
    uri = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=rf"nothing to resume: {uri} holds no config.yaml; leave --resume out to start"):
        RunFolder(uri).pin_config({"seed": 0}, must_exist=True)


def test_log_keeps_the_last_line_of_a_repeated_step_and_passes_over_a_torn_one(tmp_path):
    run = RunFolder(str(tmp_path))
    for step, loss in ((1, 3.0), (2, 2.0), (2, 2.5)):
        run.log({"stage": "stage_one", "kind": "step", "step": step, "loss": loss})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"stage": "stage_one", "ki')
    assert [line["loss"] for line in run.read_log()] == [3.0, 2.5]


def test_a_run_in_a_bucket_is_published_and_fetched_from_another_machine(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    run = RunFolder(f"{moto_s3}/runs/name")
    run.path("features/train.txt").write_text("rows")
    run.publish("features")
    run.write_json("result.json", {"epoch": 3})
    run.log({"stage": "s", "kind": "step", "step": 1})
    run.close()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    other = RunFolder(f"{moto_s3}/runs/name")
    assert other.work != run.work
    assert (other.fetch("features") / "train.txt").read_text() == "rows"
    assert other.read_json("result.json") == {"epoch": 3}
    assert other.read_json("absent.json") is None
    assert [json.dumps(line["step"]) for line in other.read_log()] == ["1"]
