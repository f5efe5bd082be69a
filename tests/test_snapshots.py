"""Folders on local disk that killed processes leave: removed by the next, and nobody else's."""

import os
import subprocess
import sys
import tempfile
import time

import pytest

from cluster.snapshots import CONVERTED_PREFIX, SNAPSHOT_PREFIX, make_snapshot, remove_dead_snapshots
from cluster.worker import Worker


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def aged(folder, seconds):
    (folder / "weights.bin").write_bytes(b"0")
    then = time.time() - seconds
    os.utime(folder, (then, then))
    return folder


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_old_ones_of_dead_processes_go_and_no_others(scratch):
    dead = dead_process()
    names = {
        "old and dead": (f"{SNAPSHOT_PREFIX}{dead}-a", 120),
        "young": (f"{SNAPSHOT_PREFIX}{dead}-b", 5),
        "living": (f"{SNAPSHOT_PREFIX}{os.getpid()}-c", 120),
        "no process": (f"{SNAPSHOT_PREFIX}me-d", 120),
        "somebody else's": (f"other-{dead}-e", 120),
        "old conversion": (f"{CONVERTED_PREFIX}aa", 100_000),
        "conversion at work": (f"{CONVERTED_PREFIX}bb", 3600),
    }
    folders = {}
    for case, (name, age) in names.items():
        (scratch / name).mkdir()
        folders[case] = aged(scratch / name, age)
    remove_dead_snapshots()
    assert {case for case, folder in folders.items() if not folder.exists()} == {"old and dead", "old conversion"}


def test_a_snapshot_names_its_process(scratch):
    folder = aged(make_snapshot(), 120)
    remove_dead_snapshots()
    assert folder.exists() and folder.name.startswith(f"{SNAPSHOT_PREFIX}{os.getpid()}-")


def test_of_a_worker_without_ray_train_it_goes_with_the_block(scratch):
    """And is named like the others: what a kill leaves is found."""
    with pytest.raises(ValueError), Worker(0, 1, "cpu").snapshot() as folder:
        assert folder.is_dir() and folder.name.startswith(f"{SNAPSHOT_PREFIX}{os.getpid()}-")
        raise ValueError
    assert not list(scratch.iterdir())
