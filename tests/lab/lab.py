"""The lab's hosts, S3 server and Ray cluster, as test_lab.py uses them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUCKET = "s3://lab"
JOBS = "http://10.77.0.1:8265"
S3 = {
    "AWS_ENDPOINT_URL": "http://10.77.0.250:9000",
    "AWS_ACCESS_KEY_ID": "lab",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-lab",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
OWN_CACHE = {"XDG_CACHE_HOME": "~/own-cache"}  # of each host; ~/.cache is shared by all


def hosts(*arguments: str, check: bool = True, timeout_s: float = 120) -> str:
    """Run `hosts.sh` and return what it said."""
    environment = {**os.environ, "LAB_VENV": str(Path(sys.executable).parent.parent)}
    done = subprocess.run(
        ["bash", str(HERE / "hosts.sh"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=timeout_s,
    )
    assert done.returncode == 0 or not check, f"hosts.sh {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def on(host: str, command: str, check: bool = True, timeout_s: float = 120) -> str:
    """Run a command on a host as a login shell, in the project's folder."""
    return hosts("in", host, f"cd {ROOT} && {command}", check=check, timeout_s=timeout_s)


def python(host: str, code: str, check: bool = True) -> str:
    """Run Python code on a host."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        return on(host, f"python {file.name}", check=check)


@contextmanager
def lab(number: int = 3) -> Iterator[None]:
    """Hosts h1..hN and `op` with one Ray token, and an S3 server beside the switch."""
    hosts("down", check=False)
    hosts("up", str(number))
    moto = Path(sys.executable).parent / "moto_server"
    server = subprocess.Popen(
        ["ip", "netns", "exec", "sw", str(moto), "-H", "10.77.0.250", "-p", "9000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for host in [*(f"h{n + 1}" for n in range(number)), "op"]:
            _provide(host)
        code = "import boto3; boto3.client('s3').create_bucket(Bucket='lab'); print('made')"
        within(30, lambda: "made" in python("op", code, check=False))
        yield
    finally:
        server.kill()
        hosts("down", check=False)


def power_on(host: str) -> None:
    """Power for a host, whose Ray is not started."""
    hosts("on", host)
    _provide(host)


def rejoined(number: int = 3) -> float:
    """Wait until all hosts are in the cluster, and say for how long.

    The head's autoscaler starts Ray by ssh on a host that it has lost, and stops first what runs there: a `ray start`
    of one's own beside it is killed.
    """
    return within(300, lambda: alive() == number, every_s=1)


def _provide(host: str) -> None:
    """Ray's token and the way to the S3 server, for every process of a host."""
    exports = "".join(f"export {name}={value}\\n" for name, value in (S3 | OWN_CACHE).items())
    on(host, f"printf '{exports}' | tee -a ~/.bash_profile >> ~/.bashrc")
    on(host, "mkdir -p ~/.ray && printf lab-token-of-thirty-two-characters > ~/.ray/auth_token && chmod 600 ~/.ray/*")


def ray_up() -> None:
    """A real `ray up` from `op`, over ssh; returns when all three hosts are in the cluster."""
    said = on("op", f"ray up -y --no-config-cache {HERE / 'cluster.yaml'}", timeout_s=240)
    assert "10.77.0.1" in said, said
    within(120, lambda: alive() == 3)


def alive() -> int:
    """Hosts in the cluster, as its head sees them."""
    code = """
import ray
ray.init(address="auto", logging_level="ERROR")
print("alive", sum(node["Alive"] for node in ray.nodes()))
"""
    counts = [line.split()[1] for line in python("h1", code, check=False).splitlines() if line.startswith("alive ")]
    return int(counts[-1]) if counts else 0


def keys(prefix: str) -> list[str]:
    """Names of the objects in the lab's bucket."""
    code = f"""
import boto3
for page in boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix="{prefix}"):
    for item in page.get("Contents", []):
        print("key", item["Key"])
"""
    return [line[4:] for line in python("op", code, check=False).splitlines() if line.startswith("key ")]


def finished_trials(run: str, epochs: int) -> dict[str, str]:
    """When the settings and the scores of each trial that was trained to the end were written, by object.

    A trial that runs again writes its settings again, whatever comes of it.
    """
    prefix = f"{run.removeprefix(f'{BUCKET}/')}/search/trials/"
    code = f"""
import boto3, json
s3 = boto3.client("s3")
pages = s3.get_paginator("list_objects_v2").paginate(Bucket="lab", Prefix="{prefix}")
written = {{item["Key"]: item["LastModified"] for page in pages for item in page.get("Contents", [])}}
for key in written:
    folder, _, name = key.rpartition("/")
    if name == "scores.json" and json.load(s3.get_object(Bucket="lab", Key=key)["Body"])[-1]["epochs"] == {epochs}:
        for one in (key, folder + "/choices.json"):
            print("finished", one, written[one].isoformat())
"""
    lines = (line.split() for line in python("op", code, check=False).splitlines())
    return {line[1]: line[2] for line in lines if line[:1] == ["finished"]}


def ray_processes(host: str) -> dict[int, str]:
    """Of a host, what is no zombie: number -> `raylet`, or `worker` for a training process."""
    said = on(host, "ps -eo pid=,stat=,args=")
    found = re.findall(r"^ *(\d+) [^Z\s]\S* +(?:\S+/(raylet)|ray::RayTrain(Worker))\b", said, re.MULTILINE)
    return {int(pid): raylet or worker.lower() for pid, raylet, worker in found}


def submit(name: str, command: str) -> None:
    """`ray job submit` from `op`, without waiting."""
    on("op", f"ray job submit --address {JOBS} --submission-id {name} --no-wait --working-dir {ROOT} -- {command}")


def job_status(name: str) -> str:
    """PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED, or what was said instead."""
    said = on("op", f"ray job status --address {JOBS} {name}", check=False)
    for status in ("SUCCEEDED", "FAILED", "STOPPED", "RUNNING", "PENDING"):
        if status in said.upper():
            return status
    return said


def status(run: str) -> dict[str, Any]:
    """What `rarelens status RUN --json` says, from a host that has never seen the run."""
    said = on("op", f"rarelens status {run} --json", check=False)
    start = said.find("{")
    return json.loads(said[start : said.rfind("}") + 1]) if start >= 0 else {}


def epoch_of(run: str) -> int:
    """Of the newest checkpoint in the bucket: the log there lags by half a minute."""
    prefix = f"{run.removeprefix(f'{BUCKET}/')}/stage_one/"
    names = {key.removeprefix(prefix).split("/")[0] for key in keys(prefix) if key.endswith("/manifest.json")}
    return max((int(name.removeprefix("epoch-")) for name in names if name.startswith("epoch-")), default=0)


def within(seconds: float, condition: Callable[[], bool], every_s: float = 0.5) -> float:
    """Wait until a condition holds; how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds:.0f} s"
        time.sleep(every_s)
    return time.monotonic() - began
