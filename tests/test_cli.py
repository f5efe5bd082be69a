"""The command line as a user meets it: real processes, exit status, what is printed, what lies in the run folder."""

import csv
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.storage import open_storage
from data_pipeline.dataset import open_dataset
from data_pipeline.synthetic import draw_synthetic
from tests.drivers import start_driver
from tests.planted import SECRETS, CommandLines, files_below, leaks
from tests.reports import Reader
from tests.tiny import tiny_config
from trainer import load_model
from trainer.page import percent, signed_points

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
    first = start_driver("train", config_file, stderr=subprocess.PIPE)
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
    left = {path.name for path in (run / "model").iterdir()}
    assert left >= {"model.safetensors", "model.json", "examples.safetensors", "README.md"}
    assert left >= {"metrics.json", "predictions.parquet", "report.html"}


def test_the_report_says_what_the_run_s_files_hold(finished):
    _, run = finished
    metrics = json.loads((run / "model" / "metrics.json").read_text())
    read = Reader((run / "model" / "report.html").read_text())
    rows = {row["name"]: row for row in metrics["rows"]}
    own, model = rows["own"], rows[metrics["model"]]
    before, after = (percent(row["balanced_accuracy"]) for row in (own, model))
    assert f"from {before} % to {after} %" in read.text
    test, dataset = metrics["test"], open_dataset(str(run / "dataset"))
    assert f"Measured on {test['samples']:,} test images of {test['groups']:,} groups." in read.text
    for row in metrics["rows"]:
        assert f"{percent(row['balanced_accuracy'])}" in read.text and row["description"] in read.text
    for name, difference in metrics["differences"].items():
        low, high = (signed_points(end) for end in difference["interval"])
        told = f"{signed_points(difference['value'])} points (95 % interval {low} to {high})"
        assert told in read.text, name
    counts = {split: dataset.class_counts(split) for split in ("train", "val", "test")}
    classes = read.text[read.text.index("Which classes gained") : read.text.index("What is taken for what")]
    data = read.text[read.text.index("class train val test") : read.text.index("Leak audit")]
    for label, name in enumerate(dataset.classes):
        was, now = (percent(row["per_class_recall"][label], 0) for row in (own, model))
        assert f"{name} {counts['train'][label]:,} {counts['test'][label]:,} {was} {now} " in classes
        assert f"{name} " + " ".join(f"{counts[split][label]:,}" for split in counts) in data
    assert f"the best on val of {pq.read_metadata(run / 'stage_two/results.parquet').num_rows - 1} heads" in read.text
    assert "trained for 2 epochs by cross-entropy with a supervised contrastive loss on" in read.text
    assert "the ring marks the epoch that was kept" in read.text
    checksum = json.loads((run / "model" / "model.json").read_text())["sha256"]["model.safetensors"]
    assert (
        checksum in read.text and hashlib.sha256((run / "model/model.safetensors").read_bytes()).hexdigest() == checksum
    )


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


def test_the_command_that_train_ends_with_writes_a_row_an_image(finished, images, tmp_path):
    done, run = finished
    (told,) = re.findall(r"^use it: rarelens (.*)$", done.stdout, re.MULTILINE)
    assert f"rarelens {told}" in (run / "model" / "README.md").read_text()
    some = sorted((images).rglob("*.jpg"))[:5]
    (tmp_path / "torn.jpg").write_bytes(some[0].read_bytes()[:200])
    typed = told.replace("predictions.csv", str(tmp_path / "p.csv"))
    words = [[word] if word != "NEW_IMAGES" else [*some, tmp_path / "torn.jpg"] for word in shlex.split(typed)]
    said = rarelens(*(word for part in words for word in part), timeout=120)
    assert said.returncode == 1 and "5 images classified, 1 unreadable" in said.stdout, said.stderr
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and set(rows[0]) > {"image", "label", "similar_5", "similar_5_label", "distance"}
    assert rows[0]["label"] == max((k for k in rows[0] if k.startswith("p_")), key=lambda k: float(rows[0][k]))[2:]
    assert {row["unlike_training"] for row in rows} <= {"true", "false"}


def loose_files(dataset, split, folder):
    """The images of a packed split as files, in the order of its index."""
    index = dataset.index(split)
    folder.mkdir()
    for row, key in enumerate(index.key):
        path, offset, length = dataset.shards[index.shard[row]].path, int(index.offset[row]), int(index.length[row])
        (folder / f"{row:04d}-{key}.jpg").write_bytes(dataset.storage.read_range(path, offset, length))
    return folder


def test_the_training_images_that_a_model_keeps_are_its_own(finished, tmp_path):
    """Read as a loose file each is its own neighbour, and by the rule few of val are unlike them."""
    _, run = finished
    model, dataset = load_model(run / "model"), open_dataset(str(run / "dataset"))
    index, rule = dataset.index("train"), model.examples.rule
    assert sorted(model.examples.keys) == sorted(index.key) and rule.held_out_images == len(dataset.index("val"))
    train = model.predict([loose_files(dataset, "train", tmp_path / "train")])
    assert train.similar.distances[:, 0].max() < 0.01
    itself = train.similar.keys[:, 0] == np.array(list(index.key), dtype=object)
    assert itself.mean() > 0.9  # a drawn image may have a twin
    own = np.array(dataset.classes)[index.label]
    assert (train.similar.labels[:, 0] == own)[itself].all()
    val = model.predict([loose_files(dataset, "val", tmp_path / "val")])
    assert val.similar.unlike.mean() < 0.05 + 2 / len(val.images)  # the features that set the rule were float16


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
        "export",
        "doctor",
    ):
        assert command in help_text
        assert rarelens(command, "--help", timeout=60).returncode == 0


@pytest.fixture(scope="module")
def in_a_bucket(moto_s3, config_file, tmp_path_factory):
    """(a run, the same again by another machine, where they ran, their local files and command lines)."""
    folder, uri = tmp_path_factory.mktemp("bucket"), f"{moto_s3}/runs/tiny"
    overrides = [f"run={uri}", "stage_one.epochs=1", "evaluation.baseline=false"]
    with pytest.MonkeyPatch.context() as patch, CommandLines() as ps, tempfile.TemporaryDirectory(dir="/tmp") as ray:
        for name, value in {**SECRETS, "RAY_TMPDIR": ray, "XDG_CACHE_HOME": str(folder / "one")}.items():
            patch.setenv(name, value)
        done = rarelens("train", config_file, *overrides, timeout=240)
        patch.setenv("XDG_CACHE_HOME", str(folder / "two"))
        again = rarelens("train", config_file, *overrides, "--resume", timeout=120)
        files = [*files_below(folder), *files_below(Path(ray)), *(("ps", line) for line in ps.seen)]
    return done, again, open_storage(uri), files


@pytest.mark.long
def test_a_run_in_a_bucket_leaves_the_same_there(in_a_bucket):
    done, again, storage, _ = in_a_bucket
    assert done.returncode == 0, done.stderr
    stored = {entry.path for entry in storage.list()}
    assert stored >= {*STEPS, "config.yaml", "log.jsonl", "model/report.html", "model/model.safetensors"}
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


@pytest.mark.long
def test_two_runs_are_compared_wherever_they_are(finished, in_a_bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, run = finished
    _, _, storage, _ = in_a_bucket
    done = rarelens("report", run, storage.uri, "--out", tmp_path / "comparison.html", timeout=120)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(storage.read("model/metrics.json")), json.loads((run / "model/metrics.json").read_text())
    theirs, ours = (next(r for r in m["rows"] if r["name"] == m["model"])["balanced_accuracy"] for m in metrics)
    assert f"{100 * (theirs - ours):+.1f}".replace("-", "\N{MINUS SIGN}") in done.stdout
    page = (tmp_path / "comparison.html").read_text()
    assert "stage_one.<wbr>epochs" in page or "stage_one.epochs" in page
    refused = rarelens("report", run, storage.uri, "stage_one.epochs=3", timeout=60)
    assert refused.returncode == 2 and "compares two run folders" in refused.stderr


@pytest.mark.long
def test_no_secret_is_in_anything_that_a_run_leaves(in_a_bucket):
    done, again, storage, files = in_a_bucket
    stored = [(entry.path, storage.read(entry.path)) for entry in storage.list()]
    said = [(name, getattr(end, name).encode()) for end in (done, again) for name in ("stdout", "stderr")]
    assert any(name.endswith("_states.pt") for name, _ in stored), "no checkpoint"
    assert any("rarelens.py" in str(line) for name, line in files if name == "ps")
    assert any("/logs/" in name for name, _ in files), "no log of Ray's"
    assert sorted(set(leaks([*stored, *said, *files]))) == []


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
