"""Locks of real builds: PyTorch's own lock file, taken by processes that live or are killed."""

import os
import subprocess
import sys

import pytest

from cluster.build_cache import build_folder, default_folder, remove_stale_locks, stale_locks
from cluster.doctor import _builds
from tests.engines import prepare, stage, tiny_model
from tests.gloo import run_gloo
from trainer.engine import Engine

HOLD = (
    "import sys; from torch.utils.file_baton import FileBaton\n"
    "assert FileBaton(sys.argv[1]).try_acquire(); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "builds" / "py311_cpu" / "cpu_adam").mkdir(parents=True)
    return tmp_path / "builds"


@pytest.fixture
def builder(folder):
    """A process that holds PyTorch's lock, as one that builds does."""
    lock = folder / "py311_cpu" / "cpu_adam" / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield lock, process
    process.kill()
    process.wait()


def test_a_lock_is_stale_when_its_builder_is_dead(folder, builder):
    lock, process = builder
    assert stale_locks(folder) == [] == remove_stale_locks(folder) and lock.exists()
    assert next(iter(_builds())).ok
    process.kill()
    process.wait()
    assert stale_locks(folder) == [lock]
    (told,) = [finding for finding in _builds() if not finding.ok]
    assert told.what == f"{lock} was left by a build that was killed: the next one waits for it"
    assert told.remedy == f"rm {lock}"
    assert remove_stale_locks(folder) == [lock] and not lock.exists()
    assert all(finding.ok for finding in _builds())


def test_an_engine_does_not_wait_for_the_dead(folder, builder):
    lock, process = builder
    process.kill()
    process.wait()
    run_gloo(made_engine, 1, str(folder))
    assert not lock.exists()


def made_engine(rank, world, builds):
    os.environ["TORCH_EXTENSIONS_DIR"] = builds  # the server that forks this may have begun with another one
    prepare(rank, world)
    Engine(tiny_model(), stage(), world, "cpu")


def test_each_environment_and_machine_builds_in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = build_folder()
    assert ours.is_relative_to(tmp_path) and ours != default_folder()
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    theirs = build_folder()
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert len({ours, theirs, build_folder()}) == 3
