"""Whole runs whose bucket misbehaves: what passes is waited for, what does not is one clear error, nothing is lost."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from cluster.storage import open_storage
from data_pipeline.synthetic import draw_synthetic
from tests import faulty_s3
from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
FAULTS = [
    faulty_s3.refusal(503, "SlowDown"),
    faulty_s3.reset,
    faulty_s3.half_a_body,
    faulty_s3.half_a_body_and_reset,
    faulty_s3.no_answer,
    faulty_s3.lost_answer,
]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    draw_synthetic(folder / "images", seed=2, scale=0.06)
    values = tiny_config(folder / "images", "runs/none").model_dump(mode="json")
    values["stage_one"] |= {"epochs": 4, "checkpoint_every_steps": 4}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def bucket(moto_s3, monkeypatch):
    with faulty_s3.proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy, moto_s3


def begin(config_file, run):
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, str(ROOT / "rarelens.py"), "stage-one", str(config_file), f"run={run}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


def wait_for(storage, path, process):
    deadline = time.monotonic() + 120
    while not storage.list(path) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)


@pytest.mark.long
def test_one_request_in_twenty_fails(bucket, config_file):
    proxy, uri = bucket
    draw, failed, lock = random.Random(0), [], threading.Lock()

    def sometimes(handler):
        with lock:
            fault = draw.choice(FAULTS) if draw.random() < 0.05 else faulty_s3.pass_on
        if fault is not faulty_s3.pass_on:
            failed.append(handler.command)
        fault(handler)

    proxy.rule = sometimes
    process = begin(config_file, f"{uri}/runs/faulty")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert len(failed) > 5
    assert open_storage(f"{uri}/runs/faulty").exists("stage_one/result.json")


@pytest.mark.long
def test_an_outage_of_ten_seconds_is_waited_for(bucket, config_file):
    proxy, uri = bucket
    direct = open_storage(f"{uri}/runs/outage")
    process = begin(config_file, f"{uri}/runs/outage")
    wait_for(direct, "stage_one/epoch-0000/", process)
    proxy.rule = faulty_s3.no_answer
    time.sleep(10)
    proxy.rule = faulty_s3.pass_on
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert direct.exists("stage_one/result.json")


@pytest.mark.long
def test_permission_that_is_withdrawn_is_one_error_and_the_run_goes_on_when_it_is_back(bucket, config_file):
    proxy, uri = bucket
    run = f"{uri}/runs/withdrawn"
    storage = open_storage(run)
    process = begin(config_file, run)
    wait_for(storage, "stage_one/step-", process)
    refuse = faulty_s3.refusal(403, "AccessDenied")
    proxy.rule = lambda handler: (refuse if handler.command == "PUT" else faulty_s3.pass_on)(handler)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2, said
    error = said.strip().splitlines()[-1]
    assert error.startswith("error: ") and "is denied (AccessDenied); correct the credentials, or allow" in error
    assert "Traceback" not in said
    proxy.rule = faulty_s3.pass_on
    process = begin(config_file, run)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert storage.exists("stage_one/result.json")


@pytest.fixture
def no_ray(tmp_path, monkeypatch):
    """Where Ray would leave its logs, had it been started."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    yield
    assert not list(tmp_path.iterdir()), "Ray was started"


def check_refused(process, words):
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2, (words, said)
    assert said.strip().startswith("error: ") and words in said and len(said.strip().splitlines()) == 1, (words, said)


def test_a_bucket_that_cannot_be_used_is_an_error_before_any_worker_is_started(bucket, config_file, no_ray):
    proxy, uri = bucket
    for status, code, words in [
        (403, "AccessDenied", "is denied (AccessDenied)"),
        (403, "InvalidAccessKeyId", "refused the credentials"),
        (403, "RequestTimeTooSkewed", "clock"),
        (404, "NoSuchBucket", "does not exist"),
        (400, "AuthorizationHeaderMalformed", "is in another region"),
        (507, "QuotaExceeded", "QuotaExceeded"),
    ]:
        proxy.rule = faulty_s3.refusal(status, code)
        check_refused(begin(config_file, f"{uri}/runs/none"), words)


def test_a_bucket_that_cannot_be_written_read_listed_or_deleted_from_is_found_at_the_start(bucket, config_file, no_ray):
    proxy, uri = bucket
    refuse = faulty_s3.refusal(403, "AccessDenied")
    for name, is_denied in faulty_s3.DENIED.items():
        proxy.rule = lambda asked, is_denied=is_denied: (refuse if is_denied(asked) else faulty_s3.pass_on)(asked)
        check_refused(begin(config_file, f"{uri}/runs/not-{name}"), "is denied (AccessDenied)")
