"""The run's log: times, incidents, and a driver that goes on with it on another machine."""

import json
import time

from cluster.run import RunFolder, parse_log


def losses(run):
    return [line["loss"] for line in run.read_log()]


def say(run, step, loss):
    run.log({"stage": "stage_one", "kind": "step", "step": step, "loss": loss})


def test_every_line_has_its_time(tmp_path):
    run, before = RunFolder(str(tmp_path)), time.time()
    say(run, 1, 3.0)
    (line,) = run.read_log()
    assert before - 0.1 <= line["at"] <= time.time() + 0.1 and line["at"] == round(line["at"], 1)


def test_incidents_are_never_taken_for_one_another(tmp_path):
    run = RunFolder(str(tmp_path))
    for text in ("one", "two", "two"):
        run.log({"stage": "stage_one", "kind": "warning", "step": 0, "text": text})
    run.log({"stage": "stage_one", "kind": "hang", "step": 0, "text": "three"})
    say(run, 1, 3.0)
    say(run, 1, 2.5)
    assert [line.get("text") for line in run.read_log()] == ["one", "two", "two", "three", None]


def test_what_is_no_line_is_left_out():
    assert parse_log(b'{"step": 1}\n3\n[]\n{"st\n\xff\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"step"') == [
        {"step": 1},
        {"step": 2},
    ]


def test_a_driver_on_another_machine_goes_on_with_the_log(moto_s3, tmp_path, monkeypatch):
    uri = f"{moto_s3}/{tmp_path.name}/run"

    def machine(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return RunFolder(uri)

    first = machine("one")
    say(first, 1, 3.0)
    first.close()
    second = machine("two")
    say(second, 2, 2.0)
    second.close()
    assert losses(machine("three")) == [3.0, 2.0]
    assert losses(machine("one")) == [3.0, 2.0], "its own lines are older"


def test_lines_that_a_killed_driver_had_not_published_are_kept(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uri = f"{moto_s3}/{tmp_path.name}/run"
    killed = RunFolder(uri)
    say(killed, 1, 3.0)
    say(killed, 2, 2.0)  # within half a minute: on this machine only
    assert len(killed.storage.read("log.jsonl").splitlines()) == 1
    again = RunFolder(uri)
    say(again, 3, 1.0)
    again.close()
    assert [json.loads(text)["step"] for text in again.storage.read("log.jsonl").splitlines()] == [1, 2, 3]
