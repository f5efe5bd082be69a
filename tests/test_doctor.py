"""The doctor looks at this very machine, and at one that things were taken away from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import rarelens
from cluster import doctor, probes
from cluster.config import ClusterConfig, parse_config
from cluster.doctor import Finding, examine, render
from cluster.storage import open_storage
from tests.faulty_s3 import DENIED, pass_on, proxy_to, refusal

ROOT = Path(__file__).parent.parent


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """One examination with everything in place."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "images").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = ClusterConfig(workers=1, device="cpu")
        findings = examine(str(folder / "runs" / "new"), [str(folder / "images")], cluster)
    return folder, by_name(findings)


def test_this_machine_can_run_the_project(here):
    folder, found = here
    # What depends on the machine's size, not on the installation, is left out.
    assert [f for f in found.values() if not f.ok and not f.name.startswith("disk")] == []
    assert found["torch"].what.split(".")[0] == "2"
    assert found["DALI"].what == "decodes a JPEG on the CPU"
    assert found["DeepSpeed"].what.startswith("imports, accelerator")
    for name in (
        "Python",
        "ray",
        "boto3",
        "GPU",
        "ninja",
        "C++ compiler",
        "Python headers",
        "shared memory",
        "open files",
    ):
        assert found[name].what
    assert found["storage"].what == f"{folder}/runs/new can be written, read, listed and deleted from"
    assert found[str(folder / "images")].what == "is there"
    assert found["workers"].ok


def test_the_doctor_leaves_nothing_behind(here):
    folder, _ = here
    assert [path.name for path in folder.iterdir()] == ["images"]


def fast(monkeypatch) -> None:
    """Leave out the heavy libraries, which one test has looked at."""
    monkeypatch.setattr(doctor, "_PROBE_REMEDIES", {})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_what_a_run_lacks_is_told_with_the_remedy(monkeypatch, tmp_path, moto_s3):
    fast(monkeypatch)
    (tmp_path / "file").touch()
    cores = len(os.sched_getaffinity(0))
    lacking = [str(tmp_path / "none"), f"{moto_s3}/none.safetensors"]
    found = by_name(examine(str(tmp_path / "file"), lacking, ClusterConfig(workers=cores + 1)))
    assert found["storage"] == Finding(
        "storage", False, f"{tmp_path}/file is a file where a folder is needed", "move it or choose another folder"
    )
    for path in lacking:
        assert found[path] == Finding(path, False, "does not exist", "correct the path in the configuration")
    assert found["workers"] == Finding(
        "workers", False, f"{cores + 1} on {cores} cores", f"set cluster.workers to at most {cores}, or auto"
    )


GPUS = "NVIDIA L4 (22 GiB), NVIDIA L4 (22 GiB)"


@pytest.mark.parametrize(
    "gpus, settings, ok, what, remedy",
    [
        (None, {"workers": 4, "cpus_per_worker": 0.5}, True, "4 on 2 cores, of which each takes 0.5", "at most 4"),
        (None, {"workers": 5, "cpus_per_worker": 0.5}, False, "5 on 2 cores, of which each takes 0.5", "at most 4"),
        (None, {"workers": 2, "cpus_per_worker": 2}, False, "2 on 2 cores, of which each takes 2", "at most 1"),
        (None, {"workers": [2, 8]}, True, "2 on 2 cores", "at most 2"),
        (None, {"workers": [3, 8]}, False, "3 on 2 cores", "at most 2"),
        (None, {"device": "cuda"}, False, "auto with cluster.device = cuda, and no GPU is seen", "device=cpu"),
        (GPUS, {"device": "cuda", "workers": 2}, True, "2 on 2 GPUs", "at most 2"),
        (GPUS, {"workers": 3}, False, "3 on 2 GPUs", "at most 2"),
        (GPUS, {"workers": 3, "device": "cpu"}, False, "3 on 2 cores", "at most 2"),
        (GPUS, {}, True, "auto on 2 GPUs", "at most 2"),
    ],
)
def test_workers_are_held_against_what_they_run_on(monkeypatch, gpus, settings, ok, what, remedy):
    """As Ray gives them room: a GPU each, or their share of the cores."""
    fast(monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(doctor, "_PROBE_REMEDIES", {"GPU": "mend it"})
    monkeypatch.setitem(probes.PROBES, "GPU", f"print({gpus or 'none: training runs on the CPU'!r})")
    found = by_name(examine(cluster=parse_config(ClusterConfig, settings, "test")))["workers"]
    assert (found.ok, found.what) == (ok, what) and remedy in found.remedy


class TestCommand:
    """`rarelens doctor`: what is looked at, by what the configuration says."""

    @pytest.fixture
    def asked(self, monkeypatch):
        """What the doctor was told to look at; it finds what `findings` holds."""
        looked: dict = {"findings": [Finding("disk", True, "enough")]}

        def examine(**needs):
            looked["needs"] = needs
            return looked["findings"]

        monkeypatch.setattr(doctor, "examine", examine)
        return looked

    def doctor(self, *arguments):
        return CliRunner().invoke(rarelens.app, ["doctor", *map(str, arguments)], catch_exceptions=False)

    def test_its_status_is_that_of_the_findings(self, asked):
        done = self.doctor()
        assert done.exit_code == 0 and asked["needs"] == {} and "everything is there" in done.output
        asked["findings"] = [*asked["findings"], Finding("ninja", False, "none found", "pip install ninja")]
        done = self.doctor()
        assert done.exit_code == 1 and "pip install ninja" in done.output

    def test_a_configuration_says_what_is_needed_and_settings_are_laid_over_it(self, asked, tmp_path):
        values = {"run": "s3://bucket/x", "source": {"path": "pictures"}, "model": {"weights": "start.safetensors"}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        assert self.doctor(tmp_path / "run.yaml").exit_code == 0
        expected = {"storage_uri": "s3://bucket/x", "paths": ["pictures", "start.safetensors"], "extras": []}
        assert asked["needs"] == {**expected, "cluster": ClusterConfig()}
        laid_over = ("model.weights=timm", "source.path=shards-{000..009}.tar", "tracking.mlflow=true", "run=here")
        self.doctor(tmp_path / "run.yaml", *laid_over, "cluster.workers=[2, 8]", "cluster.device=cuda")
        expected = {"storage_uri": "here", "paths": [], "extras": ["mlflow"]}
        assert asked["needs"] == {**expected, "cluster": ClusterConfig(workers=(2, 8), device="cuda")}

    def test_what_is_packed_already_is_looked_for_where_no_source_is(self, asked, tmp_path):
        (tmp_path / "run.yaml").write_text("data: {packed: s3://bucket/packed}")
        self.doctor(tmp_path / "run.yaml")
        assert asked["needs"]["paths"] == ["s3://bucket/packed/dataset.json"]
        self.doctor(tmp_path / "run.yaml", "source.path=pictures")
        assert asked["needs"]["paths"] == ["pictures"]

    def test_a_configuration_may_lie_in_a_bucket(self, asked, moto_s3):
        open_storage(f"{moto_s3}/configs").write("run.yaml", b"source: {path: pictures}")
        self.doctor(f"{moto_s3}/configs/run.yaml", "run=here")
        assert asked["needs"]["paths"] == ["pictures"] and asked["needs"]["storage_uri"] == "here"


def test_a_bucket_is_tried(monkeypatch, moto_s3):
    fast(monkeypatch)
    found = by_name(examine(f"{moto_s3}/doctor", cluster=ClusterConfig()))
    assert found["storage"].ok and found["workers"].ok
    found = by_name(examine("s3://no-such-bucket/x"))
    assert not found["storage"].ok
    assert found["storage"].what.startswith("bucket 'no-such-bucket' of s3://no-such-bucket/x/probe-")
    assert found["storage"].remedy == "make it first or correct the name"
    assert open_storage(f"{moto_s3}/doctor").list() == []


@pytest.mark.parametrize("denied", DENIED)
def test_a_bucket_that_refuses_one_operation_is_found(monkeypatch, moto_s3, denied):
    fast(monkeypatch)
    refuse = refusal(403, "AccessDenied")
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert by_name(examine(f"{moto_s3}/doctor"))["storage"].ok
        proxy.rule = lambda asked: (refuse if DENIED[denied](asked) else pass_on)(asked)
        found = by_name(examine(f"{moto_s3}/doctor"))["storage"]
    assert not found.ok and "is denied (AccessDenied)" in found.what
    assert "s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket" in found.remedy


def test_a_weight_file_and_a_folder_in_a_bucket_are_found(monkeypatch, moto_s3):
    fast(monkeypatch)
    open_storage(f"{moto_s3}/things").write("weights.safetensors", b"x")
    found = by_name(examine(paths=[f"{moto_s3}/things/weights.safetensors", f"{moto_s3}/things", f"{moto_s3}/thing"]))
    assert [found[f"{moto_s3}/{name}"].ok for name in ("things/weights.safetensors", "things", "thing")] == [
        True,
        True,
        False,
    ]


def test_what_the_machine_lacks_is_told_with_the_remedy(monkeypatch):
    fast(monkeypatch)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(doctor, "FREE_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "SHARED_MEMORY_MIB", 1e9)
    found = by_name(examine())
    assert found["C++ compiler"] == Finding("C++ compiler", False, "none found", "apt-get install g++")
    assert found["ninja"] == Finding("ninja", False, "none found", "pip install ninja")
    assert not found["disk for temporary files"].ok
    assert not found["shared memory"].ok and "--shm-size" in found["shared memory"].remedy


def installed(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """Metadata as pip leaves them."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def test_packages_are_held_against_the_projects_own_bounds(tmp_path):
    """In a Python that sees five packages: of the bounds that it is given, the extra's do not count."""
    installed(
        tmp_path, "rarelens", "1.0", ("aa>=2", "bb>=2,!=3.0", "cc", "nvidia-dali-cuda999>=2", 'dd; extra == "test"')
    )
    installed(tmp_path, "aa", "2.0")
    installed(tmp_path, "bb", "3.0")
    installed(tmp_path, "nvidia_dali_cuda120", "2.4")
    script = (
        "import dataclasses, json, sys; sys.path.insert(0, sys.argv[1]); from cluster.doctor import _packages\n"
        "print(json.dumps([dataclasses.asdict(finding) for finding in _packages(sys.argv[2:])]))"
    )

    def found(*extras: str) -> list[Finding]:
        command = [sys.executable, "-c", script, str(tmp_path), *extras]
        output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return [Finding(**values) for values in json.loads(output)]

    assert found("test")[-1] == Finding("dd", False, "not installed", "pip install 'dd'")
    assert found() == [
        Finding("aa", True, "2.0", "pip install 'aa>=2'"),
        Finding("bb", False, "3.0, but !=3.0,>=2 is needed", "pip install 'bb!=3.0,>=2'"),
        Finding("cc", False, "not installed", "pip install 'cc'"),
        Finding("nvidia-dali-cuda999", True, "2.4", "pip install 'nvidia-dali-cuda999>=2'"),
    ]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("print('chatter'); print('fine')", (True, "fine")),
        ("import sys; sys.exit('no such thing')", (False, "no such thing")),
        ("import nothing_of_that_name", (False, "ModuleNotFoundError: No module named 'nothing_of_that_name'")),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", (False, "crashed with signal 4")),
        ("import time; time.sleep(60)", (False, "did not answer within 2 s")),
        ("pass", (True, "said nothing")),
    ],
)
def test_a_library_that_fails_or_crashes_is_a_finding(monkeypatch, code, outcome):
    monkeypatch.setitem(probes.PROBES, "GPU", code)
    assert probes.run_probe("GPU", timeout_s=2) == outcome


def test_an_unforeseen_failure_is_a_finding(monkeypatch):
    fast(monkeypatch)

    def broken():
        raise KeyError("x")

    monkeypatch.setattr(doctor, "_python", broken)
    assert by_name(examine())["Python"].what == "could not be looked at: KeyError: 'x'"


def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    fast(monkeypatch)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    found = by_name(examine(cluster=ClusterConfig(workers=1000)))
    assert not found["Ray cluster"].ok and "127.0.0.1:9 cannot be reached: " in found["Ray cluster"].what
    assert "ray up ray_cluster.yaml" in found["Ray cluster"].remedy
    assert "workers" not in found  # a cluster may grow


def test_a_running_cluster_is_counted(monkeypatch, ray_session):
    import ray

    fast(monkeypatch)
    address = ray.get_runtime_context().gcs_address
    monkeypatch.setenv("RAY_ADDRESS", address)
    found = by_name(examine())["Ray cluster"]
    assert found == Finding("Ray cluster", True, f"{address}: machines: 1, cores: 2, GPUs: 0", found.remedy)


def test_the_table_shows_what_is_missing_and_its_remedy(capsys):
    findings = [Finding("disk", True, "enough"), Finding("ninja [x]", False, "none found", "pip install ninja")]
    render(findings)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["ok disk enough", "MISSING ninja [x] none found", "pip install ninja", "1 of 2 need mending"]
    render(findings[:1])
    assert capsys.readouterr().out.endswith("everything is there\n")
