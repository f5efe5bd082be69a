"""The command line as a user meets it: real processes, exit status, what is printed, what lies in the run folder."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from cluster.storage import open_storage
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
STEPS = ["dataset/dataset.json", "stage_one/result.json", "features/stage_one/features.json", "stage_two/winner.json"]


def rarelens(*arguments, **options):
    command = [sys.executable, str(ROOT / "rarelens.py"), *map(str, arguments)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)  # a run of its own, not a guest of the test session's Ray
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, **options)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_synthetic(folder, seed=2, scale=0.06)
    return folder


@pytest.fixture(scope="module")
def config_file(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    values = tiny_config(images, folder / "run", evaluation={"baseline": True}).model_dump(mode="json")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def stopped(config_file):
    """(exit status, what was said, run folder) of a run that Ctrl-C met in stage one, after its first checkpoint."""
    run = config_file.parent / "run"
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "rarelens.py"), "train", str(config_file)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )
    deadline = time.monotonic() + 120
    while not (run / "stage_one" / "epoch-0000").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=60)[1]
    return first.returncode, said, run


@pytest.fixture(scope="module")
def finished(stopped, config_file):
    """(what the same command said, its run folder), once it had gone on to the end."""
    return rarelens("train", config_file, "--resume", timeout=240), stopped[2]


def test_ctrl_c_says_that_nothing_is_lost(stopped):
    status, said, run = stopped
    assert "stopped; the same command goes on from here" in said
    assert status == 130
    assert not (run / "stage_one" / "result.json").exists(), "the run ended before it could be stopped"


def test_train_ends_with_a_table_a_report_and_a_model(finished):
    done, run = finished
    assert done.returncode == 0, done.stderr
    for text in ("balanced accuracy", "plain cross-entropy", "winner", "report.html"):
        assert text in done.stdout
    for name in (*STEPS, "baseline/result.json", "config.yaml", "stage_two/results.parquet"):
        assert (run / name).exists(), name
    for name in ("model.safetensors", "model.json", "metrics.json", "predictions.parquet", "report.html"):
        assert (run / "model" / name).exists(), name


def test_the_log_has_a_line_a_step_with_its_terms(finished):
    _, run = finished
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and line["stage"] == "stage_one"]
    assert {"step", "epoch", "loss", "cross_entropy", "metric_loss", "images_per_s"} <= steps[0].keys()
    assert {line["step"] for line in steps} == set(range(1, max(line["step"] for line in steps) + 1))


def test_predictions_hold_each_test_image_once_with_its_probabilities(finished):
    _, run = finished
    table = pq.read_table(run / "model" / "predictions.parquet").to_pydict()
    probabilities = [name for name in table if name.startswith("p_")]
    assert (
        len(set(table["image"]))
        == len(table["image"])
        == json.loads((run / "model/metrics.json").read_text())["test"]["samples"]
    )
    for i in range(len(table["image"])):
        assert sum(table[name][i] for name in probabilities) == pytest.approx(1, abs=1e-4)


def test_test_is_read_once_however_often_train_is_called(finished, config_file):
    done, run = finished
    before = (run / "log.jsonl").read_text()
    again = rarelens("train", config_file, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    assert json.loads((run / "model" / "metrics.json").read_text())["test"]["reads"] == 1
    assert (run / "log.jsonl").read_text() == before, "something was trained again"


def test_another_configuration_is_refused(finished, config_file):
    refused = rarelens("train", config_file, "stage_one.epochs=3", timeout=60)
    assert refused.returncode == 2
    assert "was started with another configuration (stage_one.epochs = 3, was 2)" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_predict_writes_a_row_an_image(finished, images, tmp_path):
    _, run = finished
    some = sorted((images).rglob("*.jpg"))[:5]
    (tmp_path / "torn.jpg").write_bytes(some[0].read_bytes()[:200])
    done = rarelens("predict", run / "model", *some, tmp_path / "torn.jpg", "--out", tmp_path / "p.csv", timeout=120)
    assert done.returncode == 1 and "5 images classified, 1 unreadable" in done.stdout, done.stderr
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and set(rows[0]) > {"image", "label"}
    assert rows[0]["label"] == max((k for k in rows[0] if k.startswith("p_")), key=lambda k: float(rows[0][k]))[2:]


def test_audit_of_the_packed_dataset_finds_no_leak(finished):
    _, run = finished
    done = rarelens("audit", run / "dataset", timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "nowhere.yaml"], "configuration nowhere.yaml does not exist"),
        (["train", "CONFIG", "stage_one.epoch=3"], "unknown key 'stage_one.epoch'; did you mean 'epochs'?"),
        (["train", "CONFIG", "stage_one.loss.name=suprvised_contrastive"], "did you mean 'supervised_contrastive'?"),
        (["train", "CONFIG", "source.path=nowhere", "run=RUN"], "nowhere"),
        (["train", "CONFIG", "run=RUN", "--resume"], "nothing to resume"),
        (["train", "CONFIG", "run=RUN", "model.backbone=resnet5"], "model.backbone = 'resnet5' is no timm network"),
        (["audit", "nowhere"], "nowhere"),
        (["predict", "nowhere", "x.jpg", "--out", "p.csv"], "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(arguments, message, config_file, tmp_path):
    filled = [a.replace("CONFIG", str(config_file)).replace("RUN", str(tmp_path / "run")) for a in arguments]
    done = rarelens(*filled, timeout=120)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback():
    assert "Traceback" in rarelens("train", "nowhere.yaml", "--debug", timeout=60).stderr


def test_every_command_has_help():
    help_text = rarelens("--help", timeout=60).stdout
    for command in (
        "demo",
        "pack",
        "audit",
        "train",
        "stage-one",
        "features",
        "stage-two",
        "evaluate",
        "report",
        "predict",
        "doctor",
    ):
        assert command in help_text
        assert rarelens(command, "--help", timeout=60).returncode == 0


def test_a_run_in_a_bucket_leaves_the_same_there(moto_s3, config_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    overrides = [f"run={moto_s3}/runs/tiny", "stage_one.epochs=1", "evaluation.baseline=false"]
    done = rarelens("train", config_file, *overrides, timeout=240)
    assert done.returncode == 0, done.stderr
    stored = {entry.path for entry in open_storage(f"{moto_s3}/runs/tiny").list()}
    assert stored >= {*STEPS, "config.yaml", "log.jsonl", "model/report.html", "model/model.safetensors"}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))  # another machine finds all of it done
    again = rarelens("train", config_file, *overrides, "--resume", timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


def test_class_folders_are_packed_and_audited(images, tmp_path):
    with open(images / "labels.csv") as file:
        for row in csv.DictReader(file):
            folder = tmp_path / "classes" / row["label"]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / Path(row["image"]).name).write_bytes((images / "images" / row["image"]).read_bytes())
    packed = rarelens("pack", tmp_path / "classes", tmp_path / "packed", "--size", 48, timeout=60)
    assert packed.returncode == 0, packed.stderr
    assert "images of 16 classes into" in packed.stdout
    assert rarelens("audit", tmp_path / "packed", timeout=60).returncode == 0
    # A set compared with itself leaks everything.
    assert rarelens("audit", tmp_path / "packed", tmp_path / "packed", timeout=60).returncode == 1
