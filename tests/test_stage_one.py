"""Stage one on Ray's workers: a killed run equals an unbroken one, the first losses stay as they are, what it logs."""

import json
from pathlib import Path

import psutil
import pytest

import trainer.stage_one
from cluster.run import RunFolder
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config
from trainer.engine import deepspeed_settings
from trainer.stage_one import train_stage_one
from tuning.read_status import read_status

GOLDEN = Path(__file__).parent / "golden" / "stage_one.json"
# Batch norm uses each rank's own images; on running statistics the number of workers makes no difference.
FROZEN = {"freeze_batch_norm": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw_synthetic(folder, seed=1, scale=0.06)
    return folder


@pytest.fixture(scope="module")
def train(images, ray_session, tmp_path_factory):
    def run_once(name, **sections):
        run = RunFolder(str(tmp_path_factory.mktemp(name)))
        config = tiny_config(images, run.uri, **sections)
        dataset = pack(config.source, config.data, f"{run.uri}/dataset", config.seed, progress=False)
        run.pin_config(config.model_dump(mode="json"))
        result = train_stage_one(config, dataset, run)
        return result, [line for line in run.read_log() if line["kind"] == "step"], run

    return run_once


@pytest.fixture(scope="module")
def unbroken(train):
    return train("unbroken", model={**tiny_model(), **FROZEN})


def tiny_model():
    return {"backbone": "test_resnet", "hidden_dim": 16, "embedding_dim": 8}


def losses(lines):
    return {line["step"]: (line["cross_entropy"], line["metric_loss"]) for line in lines}


def test_the_first_losses_are_the_golden_ones(unbroken):
    _, lines, _ = unbroken
    golden = json.loads(GOLDEN.read_text())
    for line, expected in zip(lines, golden, strict=False):
        assert line["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=2e-5), line["step"]
        assert line["metric_loss"] == pytest.approx(expected["metric_loss"], rel=2e-5), line["step"]


def test_a_killed_worker_changes_no_loss(unbroken, train, monkeypatch):
    result, lines, _ = unbroken
    killed = []

    def kill_a_worker_in_the_second_epoch(*args, on_message, **kwargs):
        def watch(message):
            if message["kind"] == "step" and message["epoch"] == 1 and not killed:
                own = psutil.Process().children(recursive=True)
                victim = next(process for process in own if "RayTrainWorker" in " ".join(process.cmdline()))
                killed.append(victim.pid)
                victim.kill()
            on_message(message)

        return run_workers(*args, on_message=watch, **kwargs)

    run_workers = trainer.stage_one.run_workers
    monkeypatch.setattr(trainer.stage_one, "run_workers", kill_a_worker_in_the_second_epoch)
    again, after, run = train("killed", model={**tiny_model(), **FROZEN})
    assert killed
    assert losses(after) == losses(lines)
    assert again["metrics"] == result["metrics"]
    said = read_status(run.uri)
    assert said.restarts == 1 and said.incidents == {"lost": 1}
    assert f"(process {killed[0]} on 127.0.0.1) died: its worker process has died" in said.last_incident.text


def test_what_is_done_is_not_done_again(unbroken, images, monkeypatch):
    result, _, run = unbroken
    monkeypatch.setattr(trainer.stage_one, "run_workers", None)  # would raise if it were called
    config = tiny_config(images, run.uri)
    assert train_stage_one(config, None, run) == result  # type: ignore[arg-type]


def test_a_step_is_logged_with_what_it_cost_and_what_the_pool_held(unbroken):
    _, lines, _ = unbroken
    for line in lines:
        assert line.keys() >= {
            "loss", "cross_entropy", "metric_loss", "metric_weight", "lr", "grad_norm", "images_per_s", "step_s",
            "wait_share", "peak_memory_mib", "pool_rows", "positives_per_anchor", "anchors_without_term_by_class",
        }  # fmt: skip
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["metric_loss"])
        assert line["images_per_s"] == pytest.approx(16 / line["step_s"])
        assert 0 <= line["wait_share"] <= 1 and line["peak_memory_mib"] > 50 and line["grad_norm"] > 0
        # Two views of 16 images: each has at least its own other view as a positive.
        assert line["pool_rows"] == 32 and line["positives_per_anchor"] >= 1
        assert line["anchors_without_term"] == 0 and line["anchors_without_term_by_class"] == {}


def test_tensorboard_shows_the_same_figures(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, lines, run = unbroken
    events = EventAccumulator(str(run.work / "tensorboard" / "stage_one"))
    events.Reload()
    for name in lines[0].keys() - {"kind", "stage", "at", "step", "epoch", "anchors_without_term_by_class"}:
        shown = {event.step: event.value for event in events.Scalars(f"step/{name}")}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6), name
    assert len(events.Scalars("epoch/balanced_accuracy")) == 2


def test_what_deepspeed_was_given_lies_in_the_run_folder(unbroken):
    _, _, run = unbroken
    stage = tiny_config(Path("images"), run.uri).stage_one
    assert run.read_json("stage_one/deepspeed.json") == deepspeed_settings(stage, world=2)


@pytest.mark.long
def test_zero_3_and_bf16_train(train):
    raw = {"zero_optimization": {"overlap_comm": False}}
    stage = {
        "epochs": 1,
        "batch_size": 16,
        "zero_stage": 3,
        "precision": "bf16",
        "deepspeed": raw,
        "log_every_steps": 1,
    }
    result, lines, run = train("zero3", stage_one=stage)
    assert 0 <= result["metrics"]["balanced_accuracy"] <= 1
    assert run.read_json("stage_one/deepspeed.json")["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert lines[-1]["loss"] < lines[0]["loss"] * 1.5
