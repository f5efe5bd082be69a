"""`ray job submit --working-dir . -- rarelens ...` to the head of a Ray cluster, and its driver killed there.

Long: a head of its own, with the token that `ray_cluster.yaml` asks for, on loopback; the run folders are in a bucket.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.storage import open_storage
from data_pipeline.synthetic import draw_synthetic
from tests.tiny import tiny_config
from tuning.read_status import read_status
from tuning.study_layout import TABLE_FILE

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parent.parent
KILLS = 6
STAGE = {"epochs": 4, "checkpoint_every_steps": 3}
COMMANDS = {
    "stage-one": ("", "stage_one/result.json"),
    "train": ("stage_one.epochs=1", "model/report.html"),
    "search": ("stage_one.epochs=1 search.trials=2 search.finalists=1 search.seeds=1", "search/best.yaml"),
    "study": ("stage_one.epochs=1 study.only=[cross_entropy] study.seeds=[0]", TABLE_FILE),
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def jobs(moto_s3):
    """Address of the job port of a head that runs while this module's tests do."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="head-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "token-of-the-tests-of-thirty-two-characters")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.delenv("RAY_ADDRESS", raising=False)
        options = [f"--{name}={port}" for name, port in ports.items()]
        command = ["ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", *options]
        more = ["--dashboard-host=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir={folder}"]
        head = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address = f"http://127.0.0.1:{ports['dashboard-port']}"
        try:
            wait_until(lambda: answers(address), 120)
            yield address
        finally:
            below = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(60)
            for process in below:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def answers(address):
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it asks for the token
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


@pytest.fixture(scope="module")
def config_uri(moto_s3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    draw_synthetic(folder / "images", seed=2, scale=0.06)
    values = tiny_config(folder / "images", "none", stage_one={"batch_size": 16, **STAGE}).model_dump(mode="json")
    values["cluster"] |= {"max_failures": KILLS}
    open_storage(f"{moto_s3}/jobs").write("tiny.yaml", yaml.safe_dump(values).encode())
    return f"{moto_s3}/jobs/tiny.yaml"


def ray_job(address, verb, *arguments, **options):
    command = ["ray", "job", verb, "--address", address, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def submit(address, line, *options):
    return ray_job(address, "submit", "--working-dir", ".", *options, "--", *line.split())


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs_as_a_job(jobs, config_uri, command):
    settings, last_file = COMMANDS[command]
    run = f"{config_uri.rpartition('/')[0]}/{command}"
    done = submit(jobs, f"rarelens {command} {config_uri} run={run} {settings}", "--submission-id", command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert open_storage(run).exists(last_file), done.stdout
    assert "SUCCEEDED" in ray_job(jobs, "status", command).stdout.upper()
    assert read_status(run).incidents == {}


def test_without_the_token_nothing_is_submitted(jobs, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token-of-thirty-two-characters-or-so")
    refused = submit(jobs, "touch /tmp/never")
    assert refused.returncode and not Path("/tmp/never").exists()


def losses(run):
    """(cross-entropy, metric loss) by step; what a step was told again must agree."""
    found = {}
    for text in open_storage(run).read("log.jsonl").splitlines():
        line = json.loads(text)
        if line["kind"] == "step":
            pair = (line["cross_entropy"], line["metric_loss"])
            assert found.setdefault(line["step"], pair) == pair, f"step {line['step']} differs from its first time"
    return found


def processes_of(job):
    """The job's supervisor, a Ray actor, and its driver."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if " ".join(words).startswith("ray::JobSupervisor"):
            found["supervisor"] = process
        elif any(word.endswith("/rarelens") for word in words) and any(job in word for word in words):
            found["driver"] = process
    return found


def test_a_killed_job_goes_on_when_it_is_submitted_again(jobs, config_uri):
    folder = config_uri.rpartition("/")[0]
    unbroken, run = f"{folder}/stage-one", f"{folder}/killed"
    if not open_storage(unbroken).exists("stage_one/result.json"):
        assert submit(jobs, f"rarelens stage-one {config_uri} run={unbroken}").returncode == 0
    draw, killed = random.Random(0), []
    for number in range(100):
        name = f"killed-{number}"
        submit(jobs, f"rarelens stage-one {config_uri} run={run}", "--submission-id", name, "--no-wait")
        wait_until(lambda: processes_of(run).get("driver"), 120)
        moment = time.monotonic() + draw.uniform(0, 40)
        while time.monotonic() < moment and processes_of(run).get("driver"):
            time.sleep(0.1)
        there = processes_of(run)
        if len(killed) < KILLS and "driver" in there:
            kind = draw.choice(sorted(there))
            there[kind].kill()
            killed.append(kind)
        wait_until(lambda: "driver" not in processes_of(run), 300)
        if open_storage(run).exists("stage_one/result.json"):
            break
        assert killed, ray_job(jobs, "logs", name).stdout
    print(f"killed: {killed}")
    assert killed and losses(run) == losses(unbroken)
