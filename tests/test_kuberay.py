"""`cluster/kuberay.yaml` against what KubeRay's custom resource definition says, and against our own rules."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster/kuberay.yaml").read_text()
SCHEMA = json.loads((ROOT / "tests/golden/kuberay_schema.json").read_text())


@pytest.fixture
def cluster():
    return copy.deepcopy(yaml.safe_load(TEXT))


def pods(cluster):
    """The pods' specifications: of the head, then of each group of workers."""
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def place_of(cluster, path):
    for part in path:
        cluster = cluster[part]
    return cluster


def test_the_schema_is_one_and_takes_the_file(cluster):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(cluster, SCHEMA)


WORKER = ("spec", "workerGroupSpecs", 0)
CONTAINER = (*WORKER, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("spec",),
        ("spec", "autoscalerOptions"),
        ("spec", "headGroupSpec"),
        WORKER,
        (*WORKER, "template", "spec"),
        (*WORKER, "template", "spec", "volumes", 0, "emptyDir"),
        CONTAINER,
        (*CONTAINER, "env", 1, "valueFrom", "secretKeyRef"),
        (*CONTAINER, "lifecycle", "preStop"),
    ],
    ids=lambda path: ".".join(map(str, path)) or "top",
)
def test_an_unknown_key_is_refused(cluster, path):
    place_of(cluster, path)["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="'maxReplica' was unexpected"):
        jsonschema.validate(cluster, SCHEMA)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "apiVersion", "ray.io/v1alpha1"),
        (WORKER, "maxReplicas", "4"),
        (WORKER, "rayStartParams", {"num-cpus": 0}),
        (CONTAINER, "env", [{"name": "X", "value": 1}]),
        ((*CONTAINER, "resources"), "limits", {"memory": "28 GB"}),
        ((*CONTAINER, "lifecycle", "preStop", "exec"), "command", "ray stop"),
        ((*WORKER, "template", "spec"), "terminationGracePeriodSeconds", "2m"),
        ((*WORKER, "template", "spec"), "containers", []),
        (("spec", "autoscalerOptions"), "upscalingMode", "default"),
        (("spec", "headGroupSpec"), "serviceType", "Clusterip"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_wrong_value_is_refused(cluster, path, key, value):
    place_of(cluster, path)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, SCHEMA)


@pytest.mark.parametrize(
    ("path", "key"), [(("spec",), "headGroupSpec"), (WORKER, "minReplicas"), (WORKER, "template"), (CONTAINER, "name")]
)
def test_a_missing_key_is_refused(cluster, path, key):
    del place_of(cluster, path)[key]
    with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
        jsonschema.validate(cluster, SCHEMA)


def test_gpu_pods_come_and_go_and_the_head_offers_nothing(cluster):
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    (gpu,) = spec["workerGroupSpecs"]
    assert (gpu["replicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (0, 0, 4)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, worker = (pod["containers"][0]["resources"]["limits"] for pod in pods(cluster))
    assert "nvidia.com/gpu" not in head and worker["nvidia.com/gpu"] == 1


def test_every_pod_runs_as_nobody_special_and_nothing_is_open(cluster):
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {port["containerPort"] for port in container.get("ports", [])} <= {6379, 8265}


def test_the_token_comes_from_a_secret_and_no_key_lies_in_the_file(cluster):
    containers = [pod["containers"][0] for pod in pods(cluster)] + [cluster["spec"]["autoscalerOptions"]]
    for container in containers:
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert environment["RAY_AUTH_TOKEN"].keys() == {"name", "valueFrom"}
        assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "rarelens-ray-token"
    assert {pod["serviceAccountName"] for pod in pods(cluster)} == {"rarelens-head", "rarelens-worker"}
    assert not re.search(r"AWS_(ACCESS|SECRET|SESSION)|AKIA", TEXT)


def test_shared_memory_is_memory(cluster):
    for pod in pods(cluster):
        assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
        mounts = pod["containers"][0]["volumeMounts"]
        assert {"name": pod["volumes"][0]["name"], "mountPath": "/dev/shm"} in mounts


def test_a_pod_that_ends_has_time_for_a_last_checkpoint(cluster):
    for pod in pods(cluster):
        shell, option, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, option) == ("/bin/bash", "-c") and script.endswith("ray stop")
        subprocess.run([shell, "-n", option, script], check=True)
        (waits_s,) = map(int, re.findall(r"seq (\d+)", script))
        assert "pkill -TERM" in script
        assert waits_s + 20 <= pod["terminationGracePeriodSeconds"]  # `ray stop` itself waits for 16 s


def test_ray_knows_the_command_that_drains(cluster):
    from ray.scripts.scripts import cli

    script = pods(cluster)[1]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    (reason,) = re.findall(r"--reason (\S+)", script)
    options = {option for parameter in cli.commands["drain-node"].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", script)) <= options
    (choice,) = (p for p in cli.commands["drain-node"].params if p.name == "reason")
    assert reason in choice.type.choices


def test_the_image_has_this_project_and_nothing_else(cluster):
    dockerfile = (ROOT / "cluster/Dockerfile").read_text()
    copied = {source for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for source in line.split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    modules = {f"{name}.py" for name in project["tool"]["setuptools"]["py-modules"]}
    assert copied == packages | modules | {"pyproject.toml", project["project"]["readme"]}
    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["1000"]
    assert {pod["securityContext"]["runAsUser"] for pod in pods(cluster)} == {1000}
    images = {pod["containers"][0]["image"] for pod in pods(cluster)}
    assert images == {f"REGISTRY/rarelens:{project['project']['version']}"}
