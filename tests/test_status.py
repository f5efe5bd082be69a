"""`rarelens status` of run folders as every step leaves them, on disk and in a bucket, and of runs that failed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import rarelens as command_line
from cluster.errors import UserError
from cluster.lock import LOCK_FILE, RunLock
from cluster.run import RunFolder
from cluster.storage import open_storage
from tests.tiny import tiny_config
from tuning.read_status import read_status
from tuning.status import duration

ROOT = Path(__file__).parent.parent
SHARDS = [{"split": "train", "samples": 30}, {"split": "train", "samples": 34}, {"split": "val", "samples": 100}]
STEPS_PER_EPOCH = 4  # 64 images in batches of 16


@pytest.fixture
def run(tmp_path):
    """A run that has just packed its images: 8 epochs of 4 steps, a baseline, fine-tuning for 2 epochs."""
    return begun(str(tmp_path / "run"))


@pytest.fixture(params=["folder", "bucket"])
def run_anywhere(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return begun(str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return begun(f"{request.getfixturevalue('moto_s3')}/{tmp_path.name}/run")


def begun(uri):
    config = tiny_config(
        Path("images"), uri, stage_one={"epochs": 8}, fine_tune={"epochs": 2}, evaluation={"baseline": True}
    )
    run = RunFolder(uri)
    run.pin_config(config.model_dump(mode="json"))
    run.write_json("dataset/dataset.json", {"shards": SHARDS})
    return run


def say_step(run, step, stage="stage_one", **values):
    line = {"step": step, "epoch": (step - 1) // STEPS_PER_EPOCH, "loss": 3.0 / step, "images_per_s": 100.0}
    run.log({"stage": stage, "kind": "step", **line, "step_s": 0.5, **values})


def say_epoch(run, epoch, balanced_accuracy, stage="stage_one"):
    line = {"epoch": epoch, "step": (epoch + 1) * STEPS_PER_EPOCH, "balanced_accuracy": balanced_accuracy}
    run.log({"stage": stage, "kind": "epoch", **line, "macro_f1": 0.1, "worst_recall": 0.0})


def keep_checkpoint(run, name, step, world=1):
    run.write_json(f"{name}/manifest.json", {"world": world, "extra": {"step": step, "save": "mark"}})


def status_of(run):
    run.close()
    return read_status(run.uri)


def test_there_is_no_run(tmp_path, moto_s3):
    for uri in (str(tmp_path / "nothing"), f"{moto_s3}/nothing"):
        with pytest.raises(
            UserError, match=rf"no run at {uri}: it holds no config.yaml; check the path, or start .*run={uri}"
        ):
            read_status(uri)
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_has_only_begun(run):
    status = status_of(run)
    assert (status.step, status.steps_done, status.steps) == ("stage one", 1, 8)
    assert status.process is None and status.training is None and status.checkpoint is None
    assert status.trials is None and status.heads is None
    assert status.restarts == 0 and status.incidents == {} and status.last_incident is None and status.log_ago_s is None


def test_before_anything_is_packed(tmp_path):
    run = begun(str(tmp_path))
    run.storage.delete("dataset/dataset.json")
    assert (status_of(run).step, status_of(run).steps_done) == ("pack", 0)


def test_how_far_stage_one_is(run_anywhere):
    run = run_anywhere
    for step in range(1, 3):
        say_step(run, step)
    early = status_of(run).training
    assert (early.epoch, early.epochs, early.step, early.steps) == (1, 8, 2, 32), "by the packed dataset"
    assert early.best_epoch is None and early.left_s == 15.0

    for step in range(3, 5):
        say_step(run, step)
    say_epoch(run, 0, 0.4)
    keep_checkpoint(run, "stage_one/epoch-0000", 4)
    for step in range(5, 9):
        say_step(run, step)
    say_epoch(run, 1, 0.3)
    keep_checkpoint(run, "stage_one/epoch-0001", 8)
    say_step(run, 9)
    keep_checkpoint(run, "stage_one/step-00000009", 9)
    run.storage.write("stage_one/step-00000010/weights.safetensors", b"of a save in progress")
    run.storage.write("stage_one/step-00000011/manifest.json", b"damaged")
    status = status_of(run)
    training = status.training
    assert status.step == "stage one" and training.name == "stage_one"
    assert (training.epoch, training.epochs, training.step, training.steps) == (3, 8, 9, 32)
    assert (training.loss, training.images_per_s, training.left_s) == (3.0 / 9, 100.0, 11.5)
    assert (training.best_epoch, training.best_balanced_accuracy) == (1, 0.4)
    assert status.checkpoint.path == "stage_one/step-00000009" and 0 <= status.checkpoint.ago_s < 60
    assert 0 <= status.log_ago_s < 60


def test_a_checkpoint_counts_when_every_rank_has_finished_it(run_anywhere):
    run = run_anywhere
    keep_checkpoint(run, "stage_one/epoch-0000", 4)
    keep_checkpoint(run, "stage_one/step-00000006", 6, world=3)
    say_step(run, 6)
    for rank in (2, 1):
        assert status_of(run).checkpoint.path == "stage_one/epoch-0000"
        run.write_json(f"stage_one/step-00000006/manifest-rank{rank}.json", {})
    assert status_of(run).checkpoint.path == "stage_one/step-00000006"


def test_a_checkpoints_age_is_by_its_file_or_by_the_log(run_anywhere):
    run = run_anywhere
    for step in range(1, 5):
        say_step(run, step)
    keep_checkpoint(run, "stage_one/step-00000002", 2)
    run.close()
    lines = [json.loads(text) for text in run.storage.read("log.jsonl").splitlines()]
    for line in lines:
        line["at"] -= 1000 * line["step"]
    run.storage.write("log.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    if run.is_local:
        os.utime(run.work / "stage_one/step-00000002/manifest.json", (time.time() - 300,) * 2)
    assert read_status(run.uri).checkpoint.ago_s == pytest.approx(300 if run.is_local else 2000, abs=60)


FILES = {
    "baseline": ["stage_one/result.json"],
    "features": ["baseline/result.json"],
    "stage two": ["features/stage_one/features.json"],
    "fine-tuning": ["stage_two/winner.json"],
    "evaluation": ["fine_tuned/result.json", "fine_tuned/choice.json"],
    "report": ["model/metrics.json"],
    "done": ["model/report.html"],
}


def test_every_step_in_its_turn(run):
    say_step(run, 32)
    for number, (step, files) in enumerate(FILES.items(), 2):
        for file in files:
            run.write_json(file, {})
        status = status_of(run)
        assert (status.step, status.steps_done, status.steps) == (step, number, 8)
        if step == "features":
            assert status.training.name == "stage_one" and status.training.left_s is None
    say_step(run, 3, stage="fine_tuned")
    run.storage.delete("fine_tuned/result.json")
    assert (status_of(run).training.name, status_of(run).training.epochs) == ("fine_tuned", 2)


def test_heads_are_counted_by_finished_blocks(run):
    run.write_json("stage_two/heads-old/blocks/00000.safetensors", {})
    assert status_of(run).heads == {"done": 12, "of": 24}
    for block in range(2):
        run.write_json(f"stage_two/heads-new/blocks/{block:05d}.safetensors", {})
    run.write_json("stage_two/finalists-x/blocks/00000.safetensors", {})
    assert status_of(run).heads == {"done": 24, "of": 24}


def tune_state(*statuses):
    """What Ray Tune writes of its trials, by its own code."""
    from ray.tune.experiment import Trial

    states = []
    for status in statuses:
        trial = Trial("run_trial", stub=True)
        trial.set_status(status)
        states.append(trial.get_json_state())
    return {"trial_data": states}


def test_a_search_tells_of_its_trials(run_anywhere):
    run = run_anywhere
    run.storage.delete("dataset/dataset.json")
    run.write_json("search/began.json", 1.0)
    status = status_of(run)
    assert status.step == "pack" and status.steps == 2
    assert status.trials == {"done": 0, "failed": 0, "running": 0, "of": 26}

    run.write_json("dataset/dataset.json", {"shards": SHARDS})
    for name, choices, epochs in (
        ("to-the-end", {"stage_one.loss.weight": 0.3}, 8),
        ("shorter", {"stage_one.epochs": 4}, 4),
        ("longer", {"stage_one": {"epochs": 16}}, 8),
        ("default", {"stage_one": {}}, 8),  # of a section that says nothing, 20
        ("behind", {}, 2),
        ("under-way", {}, 2),
        ("begun", {}, None),
    ):
        run.write_json(f"search/trials/{name}/choices.json", choices)
        if epochs:
            run.write_json(f"search/trials/{name}/scores.json", [{"epochs": 2}, {"epochs": epochs}])
    run.write_json("search/trials/behind/stopped.json", True)
    before = "search/tune/settings/attempt-000/experiment_state-2026-01-01_10-00-00.json"
    run.write_json(before, tune_state("ERROR", "ERROR", "RUNNING", "RUNNING", "RUNNING", "RUNNING"))
    attempt = "search/tune/settings/attempt-001/experiment_state-2026-01-01"
    run.write_json(f"{attempt}_11-00-00.json", tune_state("RUNNING"))
    run.write_json(f"{attempt}_12-00-00.json", tune_state("TERMINATED", "TERMINATED", "ERROR", "RUNNING", "PENDING"))
    run.write_json("search/tune/seeds/attempt-000/experiment_state-2026-01-01_12-00-00.json", tune_state("RUNNING"))
    status = status_of(run)
    assert status.step == "search"
    assert status.trials == {"done": 3, "failed": 1, "running": 2, "of": 26}

    run.storage.write("search/best.yaml", b"")
    assert status_of(run).step == "done"
    say_step(run, 1)  # the same folder is trained in, too
    assert status_of(run).step == "stage one"


def test_restarts_and_what_went_wrong(run):
    for stage in ("stage_one", "stage_one", "baseline", "stage_one"):
        run.log({"stage": stage, "kind": "start"})
    skipped = {
        "stage": "stage_one",
        "kind": "skipped",
        "step": 4,
        "epoch": 0,
        "skipped": 1,
        "reason": "the loss is nan",
    }
    for line in (
        {"stage": "stage_one", "kind": "warning", "step": 0, "text": "passed over: one"},
        {"stage": "stage_one", "kind": "warning", "step": 0, "text": "passed over: two"},
        {"stage": "stage_one", "kind": "hang", "step": 0, "text": "rank 1 is gone"},
        skipped,
    ):
        run.log(line)
    say_step(run, 5)
    status = status_of(run)
    assert status.restarts == 2
    assert status.incidents == {"warning": 2, "hang": 1, "skipped": 1}
    last = status.last_incident
    assert (last.kind, last.text) == ("skipped", "step 4 was left out: the loss is nan") and 0 <= last.ago_s < 60

    run.log(skipped)  # once more, after a restart
    run.log({"kind": "error", "text": "no space left"})
    status = status_of(run)
    assert status.incidents == {"warning": 2, "hang": 1, "skipped": 1, "error": 1}
    assert status.last_incident.text == "no space left"


def test_who_holds_the_run_folder(run):
    with RunLock(run.storage):
        process = status_of(run).process
        assert process.lives and f"process {os.getpid()}" in process.owner
        content = json.loads(run.storage.read(LOCK_FILE))
    run.write_json(LOCK_FILE, {**content, "process_began": 1})
    assert status_of(run).process.lives is False
    run.write_json(LOCK_FILE, {**content, "host": "elsewhere"})
    assert read_status(run.uri, watch_for_s=0.2).process.lives is False
    assert run.storage.exists(LOCK_FILE), "nothing is touched"


def test_a_bucket_gets_no_mirror(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    run = begun(f"{moto_s3}/{tmp_path.name}/run")
    say_step(run, 1)
    run.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert read_status(f"{run.uri}/").training.step == 1
    assert not (tmp_path / "two").exists()


# ---- the command


def rarelens(*arguments):
    command = [sys.executable, str(ROOT / "rarelens.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)


def test_the_command_prints_a_table_or_json(tmp_path):
    run = begun(str(tmp_path / "run"))
    for step in range(1, 5):
        say_step(run, step)
    say_epoch(run, 0, 0.4321)
    run.log({"stage": "stage_one", "kind": "hang", "step": 0, "text": "rank 1 [bold]hangs[/bold]"})
    table = rarelens("status", run.uri)
    assert table.returncode == 0 and table.stderr == ""
    said = {line[:18].strip(): line[18:].strip() for line in table.stdout.splitlines()}
    assert said["run"] == run.uri
    assert said["step"] == "stage one (1 of 8 steps done)"
    assert said["process"] == "none holds the run folder"
    assert said["epoch"] == "1 of 8" and said["step of training"] == "4 of 32" and said["loss"] == "0.7500"
    assert said["images/s"] == "100" and said["time left"] == "about 14 s, validation not counted"
    assert said["best epoch"] == "1, balanced accuracy 0.432"
    assert said["incidents"] == "1 hang" and said["restarts"] == "0"
    assert said["last incident"].startswith("hang, ") and said["last incident"].endswith("rank 1 [bold]hangs[/bold]")

    as_json = rarelens("status", run.uri, "--json")
    values = json.loads(as_json.stdout)
    ages = ("log_ago_s", "last_incident")
    now = asdict(read_status(run.uri))
    assert {k: v for k, v in values.items() if k not in ages} == {k: v for k, v in now.items() if k not in ages}
    assert values["last_incident"]["text"] == "rank 1 [bold]hangs[/bold]"


def test_no_run_is_one_line_and_status_2(tmp_path):
    done = rarelens("status", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: no run at ") and len(done.stderr.splitlines()) == 1


def test_it_needs_neither_ray_nor_torch():
    code = "import tuning.read_status, sys; assert not {'ray', 'torch', 'deepspeed', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_an_error_that_ends_a_run_is_told_and_a_refused_run_writes_nothing(tmp_path):
    config = tiny_config(tmp_path / "nowhere", tmp_path / "run").model_dump(mode="json")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    failed = rarelens("train", tmp_path / "tiny.yaml")
    assert failed.returncode == 2
    status = read_status(str(tmp_path / "run"))
    assert status.step == "pack" and status.process is None and status.incidents == {"error": 1}
    assert failed.stderr == f"error: {status.last_incident.text}\n" and "nowhere" in status.last_incident.text

    with RunLock(open_storage(tmp_path / "run")):
        refused = rarelens("train", tmp_path / "tiny.yaml")
        assert refused.returncode == 2
        assert f"(process {os.getpid()}), since" in refused.stderr and len(refused.stderr.splitlines()) == 1
        with pytest.raises(UserError, match="is in use by"):
            command_line.search(str(tmp_path / "tiny.yaml"))
        assert read_status(str(tmp_path / "run")).incidents == {"error": 1}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2.0 h"), (200_000, "2.3 days")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
