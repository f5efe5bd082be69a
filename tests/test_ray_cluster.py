"""`ray_cluster.yaml` by Ray's own code: its validation, and its AWS provider against an EC2 of moto's on loopback.

`ray up` itself is not run: it would go on to open ssh to an address that the mock made up.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import jsonschema
import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
GPU_MACHINE = {"CPU": 8, "GPU": 1}


@pytest.fixture
def cluster():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def validated(cluster: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_takes_the_file_as_it_is(cluster):
    prepared = validated(cluster)
    # What the defaults of Ray fill in must not change what the file says.
    for key, value in cluster.items():
        if key not in ("available_node_types", "setup_commands", "head_setup_commands", "worker_setup_commands"):
            assert prepared[key] == value, key
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == cluster["setup_commands"]
    assert prepared["docker"] == {}


@pytest.mark.parametrize(
    ("path", "key"), [((), "max_worker"), (("available_node_types", "gpu_spot"), "maxworkers"), (("docker",), "imag")]
)
def test_ray_refuses_an_unknown_key(cluster, path, key):
    place = cluster
    for part in path:
        place = place.setdefault(part, {})
    place[key] = 1
    with pytest.raises((jsonschema.ValidationError, ValueError), match=key):
        validated(cluster)


def test_ray_refuses_a_head_that_is_no_node_type(cluster):
    with pytest.raises(ValueError, match="head_node_type"):
        validated(cluster | {"head_node_type": "haed"})


def test_gpu_machines_start_at_none_on_spot_and_on_demand(cluster):
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head" and set(kinds) == {"head", "gpu_spot", "gpu_on_demand"}
    for name in ("gpu_spot", "gpu_on_demand"):
        assert kinds[name]["min_workers"] == 0 and kinds[name]["max_workers"] == cluster["max_workers"] > 0
    spot, on_demand = kinds["gpu_spot"]["node_config"], kinds["gpu_on_demand"]["node_config"]
    assert spot == on_demand | {"InstanceMarketOptions": {"MarketType": "spot"}}
    assert "nvidia-driver-gpu" in spot["ImageId"] and "gpu" not in kinds["head"]["node_config"]["ImageId"]


@pytest.mark.parametrize(
    ("availability", "wanted", "launched"),
    [
        ({}, 2, {"gpu_spot": 2}),
        ({"gpu_spot": 0.0}, 2, {"gpu_on_demand": 2}),  # a spot launch has just failed
        ({}, 9, {"gpu_spot": 4}),  # never above max_workers
        ({"gpu_spot": 0.5}, 3, {"gpu_on_demand": 3}),
        ({}, 0, {}),
    ],
)
def test_rays_autoscaler_asks_for_spot_first_and_on_demand_where_there_is_none(cluster, availability, wanted, launched):
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    for name, resources in {"head": {"CPU": 8}, "gpu_spot": GPU_MACHINE, "gpu_on_demand": GPU_MACHINE}.items():
        cluster["available_node_types"][name]["resources"] = resources  # `ray up` asks AWS for them
    config = AutoscalingConfig(validated(cluster), skip_content_hash=True)
    worker = ResourceRequestUtil.make({"CPU": 8, "GPU": 1})
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=cluster["max_workers"],
        resource_requests=ResourceRequestUtil.group_by_count([worker] * wanted),
        recoverable_resource_availabilities=availability,
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == launched


def test_nothing_is_open_but_ssh_and_no_key_lies_on_a_disk(cluster):
    assert "IpPermissions" not in cluster["provider"]["security_group"]
    starts = [cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert re.findall(r"--dashboard-host=(\S+)", " ".join(starts)) == ["127.0.0.1"]
    assert "/home/ubuntu/.ray/auth_token" in cluster["file_mounts"]
    for kind in cluster["available_node_types"].values():
        assert kind["node_config"]["IamInstanceProfile"]["Name"] in ("rarelens-head", "rarelens-worker")
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
    assert not re.search(r"AWS_(ACCESS|SECRET|SESSION)|AKIA|aws_access_key", (ROOT / "ray_cluster.yaml").read_text())


def test_every_machine_installs_this_project_and_nothing_else(cluster):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
    sent = {local for remote, local in cluster["file_mounts"].items() if remote == f"/home/ubuntu/rarelens/{local}"}
    assert sent == packages | modules | {"pyproject.toml", project["project"]["readme"]}
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert installs == ["~/venv/bin/pip install --quiet --editable ~/rarelens"]


def test_commands_are_shell(cluster):
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for command in cluster[key]:
            subprocess.run(["bash", "-n", "-c", command], check=True)


def stand_ins(home, **tools):
    """The environment of a machine whose tools note how they were called, and then run the shell given."""
    folder = home / "venv/bin"
    folder.mkdir(parents=True)
    for tool, shell in tools.items():
        note = 'echo "$(basename "$0") $*; $RAY_AUTH_MODE" >> "$HOME/called"'
        (folder / tool).write_text(f"#!/bin/sh\n{note}\n{shell}\n")
        (folder / tool).chmod(0o755)
    return {"HOME": str(home), "PATH": f"{folder}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_is_started_with_files_locked_and_shared_memory_enough_and_with_the_token(cluster, tmp_path, kind):
    """By stand-ins for `sudo` and `ray`, which note how they were called."""
    environment = stand_ins(tmp_path, sudo="", ray="", nohup="")
    for command in cluster[f"{kind}_start_ray_commands"]:
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    stop, limits, memory, start, *spot = (tmp_path / "called").read_text().splitlines()
    assert len(spot) == (kind == "worker") and all("spot/instance-action" in call for call in spot)
    assert stop.startswith("ray stop;")
    assert re.fullmatch(r"sudo prlimit --pid \d+ --nofile=65536:65536 --memlock=unlimited:unlimited; ", limits)
    assert memory == "sudo mount -o remount,size=60% /dev/shm; "
    assert start.startswith("ray start --head " if kind == "head" else "ray start --address=10.0.0.1:6379 ")
    assert start.endswith("; token")


class Metadata(BaseHTTPRequestHandler):
    """EC2's metadata service, version 2: 404 until the server's `taken` is set, and 401 without a token."""

    def do_PUT(self):
        assert self.path == "/latest/api/token" and int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self.answer(200, b"the-token")

    def do_GET(self):
        known = self.headers["X-aws-ec2-metadata-token"] == "the-token"
        found = self.path == "/latest/meta-data/spot/instance-action" and self.server.taken.is_set()
        self.answer(200 if known and found else 404 if known else 401, b'{"action": "terminate"}')
        self.server.asked.append(known)

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *given):
        pass


@pytest.fixture
def metadata():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.taken, server.asked = threading.Event(), []
    threading.Thread(target=server.serve_forever).start()
    yield server
    server.shutdown()
    server.server_close()


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_spot_notice_is_sigterm_to_the_training_processes_and_then_ray_leaves(cluster, metadata, tmp_path):
    """The shell as it stands, against a metadata service on loopback; the workers are gone at the third look."""
    raylet, worker = 'echo "7 raylet --node_id=ab12 --x"', '[ "$(grep -c ^pgrep "$HOME/called")" -lt 4 ]'
    environment = stand_ins(tmp_path, ray="", pkill="", pgrep=f'case "$*" in *raylet*) {raylet};; *) {worker};; esac')
    environment |= {"SPOT_METADATA": f"http://127.0.0.1:{metadata.server_port}", "SPOT_EVERY_S": "0.05"}
    (watch,) = [command for command in cluster["worker_start_ray_commands"] if "spot" in command]
    called, starts = tmp_path / "called", []
    try:
        for _ in range(2):  # the commands run again on a machine that is there already
            starts.append(subprocess.Popen(["bash", "-c", watch], env=environment, start_new_session=True))
            assert starts[-1].wait(20) == 0
        until(lambda: len(metadata.asked) > 5)
        assert all(metadata.asked) and not called.exists()
        metadata.taken.set()
        until(lambda: called.exists() and "ray stop" in called.read_text())
        asked = len(metadata.asked)
        time.sleep(0.5)
        assert len(metadata.asked) == asked, "there was one loop, and it has ended"
    finally:
        for start in starts:
            with suppress(ProcessLookupError):
                os.killpg(start.pid, signal.SIGKILL)
    assert called.read_text().splitlines() == [
        "pgrep -a raylet; token",
        "ray drain-node --address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION --reason-message the spot "
        "machine is taken away --deadline-remaining-seconds 110 --node-id ab12; token",
        "pkill -TERM -f ^ray::RayTrainWorker; token",
        *["pgrep -f ^ray::RayTrainWorker; token"] * 3,
        "ray stop; token",
    ]


# ---- Ray's AWS provider against moto


@pytest.fixture
def account(moto_s3, monkeypatch, tmp_path):
    """An account with the two instance profiles that the file asks for."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the ssh key that it makes into ~/.ssh
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    iam = boto3.client("iam")
    trust = {
        "Statement": {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
    }
    names = ("rarelens-head", "rarelens-worker")
    for name in names:
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps({"Version": "2012-10-17", **trust}))
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    yield boto3.client("ec2")
    for name in names:
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
        iam.delete_instance_profile(InstanceProfileName=name)
        iam.delete_role(RoleName=name)


def test_ray_starts_and_ends_the_machines_that_the_file_describes(cluster, account, monkeypatch):
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    monkeypatch.chdir(ROOT)
    ready = bootstrap_aws(validated(cluster))

    (group,) = account.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["rarelens"]}])[
        "SecurityGroups"
    ]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"]]
    assert [(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in from_outside] == [(22, 22, "tcp")]
    from_groups = [pair["GroupId"] for rule in group["IpPermissions"] for pair in rule["UserIdGroupPairs"]]
    assert from_groups == [group["GroupId"]]
    (key,) = Path(os.environ["HOME"], ".ssh").iterdir()
    assert key.stat().st_mode & 0o077 == 0

    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for kind, node_type in ready["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: "worker", TAG_RAY_USER_NODE_TYPE: kind, TAG_RAY_NODE_NAME: f"ray-{kind}"}
        made = provider.create_node(node_type["node_config"], tags, 1)
        (node,) = provider.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: kind})
        assert list(made) == [node]
        (instance,) = account.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"]
        wanted = cluster["available_node_types"][kind]["node_config"]
        assert instance["InstanceType"] == wanted["InstanceType"]
        assert instance["ImageId"] == wanted["ImageId"]
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"/{wanted['IamInstanceProfile']['Name']}")
        assert (instance.get("InstanceLifecycle") == "spot") == (kind == "gpu_spot")
        assert [g["GroupId"] for g in instance["SecurityGroups"]] == [group["GroupId"]]
    assert len(provider.non_terminated_nodes({})) == 3
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []


# ---- what a job takes along


def test_a_jobs_working_directory_is_the_code_and_nothing_else(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    names = [name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")]
    top = {name.split("/")[0] for name in names}
    assert {"rarelens.py", "pyproject.toml", "cluster", "data_pipeline", "trainer", "tuning", "configs"} <= top
    assert not top & {".git", ".venv", ".ci", "tests", "docs", "benchmarks", "runs", "demo"}
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert package.stat().st_size < 2 * 2**20
