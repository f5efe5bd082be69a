import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.run import RunFolder, alone_in, without_repeats
from cluster.worker import RunStopped

ROOT = Path(__file__).parent.parent


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


def test_a_file_in_the_place_of_a_folder_is_named(moto_s3, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    said = rf"^{tmp_path}/file.* is a file where a folder is needed; move it or choose another folder$"
    for uri in (f"{tmp_path}/file", f"{tmp_path}/file/run"):
        with pytest.raises(UserError, match=said):
            RunFolder(uri).pin_config({})
    run = RunFolder(str(tmp_path))
    with pytest.raises(UserError, match=said):
        run.path("file/below/it")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=said):
        RunFolder(f"{moto_s3}/{tmp_path.name}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = RunFolder(f"{moto_s3}/{tmp_path.name}")
    run.storage.write("log.jsonl", b"{}")
    run.path("log.jsonl/in/the/way")
    with pytest.raises(UserError, match=rf"^{run.work}/log.jsonl is a folder where a file is needed; move it"):
        run.read_log()


READ_ONLY = """
import os, sys
from cluster.errors import UserError
from cluster.run import RunFolder, alone_in
disk = sys.argv[1]
made = RunFolder(f"{disk}/made")
made.pin_config({})
assert os.system(f"mount -o remount,ro {disk}") == 0
os.environ["XDG_CACHE_HOME"] = disk
for act in (
    lambda: RunFolder(f"{disk}/run").pin_config({}),
    lambda: RunFolder(f"{disk}/deep/er/run").pin_config({}),
    lambda: made.path("features/train.arrow"),
    lambda: made.log({}),
    lambda: alone_in(made).__enter__(),
    lambda: RunFolder("s3://bucket/run"),
):
    try:
        act()
    except UserError as error:
        print(error)
"""


def test_a_read_only_place_is_one_sentence(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs none "$1" && exec "$0" -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, str(disk), READ_ONLY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 6
    for line in said:
        assert re.fullmatch(rf"{disk}\S*: read-only file system; allow it or choose another folder", line)


class Closed(dict):
    """A line of a log that fails with a text that nobody may read."""

    def get(self, *key):
        raise KeyError("secret")


def test_the_log_tells_where_a_mistake_of_the_program_was_and_not_its_text(tmp_path):
    run = RunFolder(str(tmp_path))
    with pytest.raises(KeyError, match="secret") as error, alone_in(run):
        without_repeats([Closed()])
    (line,) = run.read_log()
    (at,) = {entry.lineno + 1 for entry in error.traceback if entry.name == "without_repeats"}
    assert line["kind"] == "error" and line["text"].startswith(f"KeyError at cluster/run.py:{at}, a mistake of the")
    assert "secret" not in (tmp_path / "log.jsonl").read_text()


def test_the_log_has_the_text_of_a_users_mistake_and_nothing_of_a_stop(tmp_path):
    run = RunFolder(str(tmp_path))
    for stop in (KeyboardInterrupt, RunStopped):
        with pytest.raises(stop), alone_in(run):
            raise stop
    assert run.read_log() == []
    with pytest.raises(UserError), alone_in(run):
        raise UserError("no space left; free some")
    assert [(line["kind"], line["text"]) for line in run.read_log()] == [("error", "no space left; free some")]
