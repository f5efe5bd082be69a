"""kill -9 and Ctrl-C at random moments: the run ends as if nothing had been, and nothing is lost.

Long: `make test-all` runs it. Drivers that are jobs on a cluster's head: `test_jobs.py`.
"""

import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from benchmarks.recovery import seconds_to_the_next_step, workers_of
from cluster.lock import LOCK_FILE
from data_pipeline.synthetic import draw_synthetic
from tests.drivers import kill_driver, start_driver
from tests.tiny import tiny_config

KILLS = INTERRUPTS = 20
STAGE = {"epochs": 5, "checkpoint_every_steps": 3}
LOST_BY_A_KILL = 2 * STAGE["checkpoint_every_steps"]  # the steps since the last checkpoint that counts, one in flight
LAST = f"stage_one/epoch-{STAGE['epochs'] - 1:04d}/weights.safetensors"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    draw_synthetic(folder / "images", seed=2, scale=0.06)
    values = tiny_config(folder / "images", folder / "unbroken").model_dump(mode="json")
    values["stage_one"] |= STAGE
    values["cluster"]["max_failures"] = KILLS
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config_file, run, *more, command="stage-one", **options):
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    return start_driver(command, config_file, f"run={run}", *more, **options)


def steps(run):
    """Lines of the log by step; of one that was repeated, all: they must agree."""
    lines = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines() if text.endswith("}")]
    return [line for line in lines if line["kind"] == "step" and line["stage"] == "stage_one"]


def losses(run):
    found = {}
    for line in steps(run):
        pair = (line["cross_entropy"], line["metric_loss"])
        assert found.setdefault(line["step"], pair) == pair, f"step {line['step']} differs from its first time"
    return found


@pytest.fixture(scope="module")
def unbroken(config_file):
    run, began = config_file.parent / "unbroken", time.monotonic()
    process = start(config_file, run)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    return run, time.monotonic() - began


def check_equal(run, unbroken):
    assert losses(run) == losses(unbroken)
    theirs = load_file(unbroken / LAST)
    for name, tensor in load_file(run / LAST).items():
        assert tensor.equal(theirs[name]), name


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments_change_nothing(config_file, unbroken):
    run_of_reference, seconds = unbroken
    draw = random.Random(0)
    killed, waits, number = 0, [], 0
    while killed < KILLS:
        run, before = config_file.parent / f"killed-{number}", killed
        number += 1
        while not (run / "stage_one/result.json").exists():
            process = start(config_file, run)
            moment = time.monotonic() + draw.uniform(0, seconds)
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.05)
            if killed < KILLS and process.poll() is None:
                kind = draw.choice(["worker", "driver"])
                victims = workers_of(process)
                if kind == "driver":
                    kill_driver(process)
                    killed += 1
                    continue
                if victims:
                    at = time.time()
                    draw.choice(victims).kill()
                    killed += 1
                    wait_s = seconds_to_the_next_step(run / "log.jsonl", at, process)
                    waits += [] if wait_s is None else [wait_s]
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said
        check_equal(run, run_of_reference)
        repeated = len(steps(run)) - len(losses(run))
        print(f"run {number}: {killed} kills so far, {repeated} steps done again")
        assert repeated <= LOST_BY_A_KILL * (killed - before)
    print(f"from SIGKILL of a worker to its next logged step: {sorted(round(wait, 1) for wait in waits)} s")
    assert max(waits) < 60


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ctrl_c_at_random_moments_is_one_line_and_the_same_command_goes_on(config_file, unbroken):
    """Of a whole run; to the driver alone, or as a terminal sends it, to all that it has started."""
    run_of_reference, seconds = unbroken
    draw, run = random.Random(1), config_file.parent / "interrupted"
    for _ in range(INTERRUPTS):
        process = start(config_file, run, command="train", start_new_session=True)
        moment = time.monotonic() + draw.uniform(0, seconds)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        children = psutil.Process(process.pid).children(recursive=True)
        began = (run / LOCK_FILE).exists()
        (os.killpg if draw.random() < 0.5 else os.kill)(process.pid, signal.SIGINT)
        said = process.communicate(timeout=120)[1]
        if began:  # else Python itself may not have been there yet
            assert process.returncode == 130, said
            assert said.strip().splitlines()[-1].startswith("stopped") and "Traceback" not in said, said
        assert psutil.wait_procs(children, timeout=60)[1] == []
    process = start(config_file, run, command="train")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert (run / "model/report.html").exists()
    check_equal(run, run_of_reference)


@pytest.mark.long
def test_sigterm_to_the_driver_is_a_last_checkpoint_and_the_same_command_goes_on(config_file, unbroken):
    run = config_file.parent / "told-to-stop"
    process = start(config_file, run, "stage_one.checkpoint_every_steps=null")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run.exists() and (run / "log.jsonl").exists() and steps(run)):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert said.strip().endswith("stopped, with a last checkpoint; the same command goes on from here")
    done = max(losses(run))
    assert not (run / "stage_one/result.json").exists()
    process = start(config_file, run)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    check_equal(run, unbroken[0])
    assert len(steps(run)) - len(losses(run)) <= 1, f"steps before {done} were done again"
