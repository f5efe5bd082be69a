import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.errors import UserError
from data_pipeline import workers
from data_pipeline.workers import AHEAD_PER_WORKER, ImageWorkers
from tests.raw import SMALL_SHARDS, digests, pack_quietly, table

ROOT = Path(__file__).parents[1]


def slowly(number):
    """Even numbers take longer than odd ones."""
    time.sleep(0.02 * (number % 2 == 0))
    return number, os.getpid()


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def pool():
    with ImageWorkers(10**6, cores=3) as made:
        yield made


def test_results_come_in_order_from_several_processes(pool):
    found = list(pool.map(slowly, range(20)))
    assert [number for number, _ in found] == list(range(20))
    assert len({process for _, process in found}) > 1 and os.getpid() not in {process for _, process in found}


def test_no_more_tasks_are_taken_than_a_few_ahead(pool):
    taken = 0

    def tasks():
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    for done, _ in enumerate(pool.map(slowly, tasks())):
        assert taken <= done + 1 + AHEAD_PER_WORKER * 3


@pytest.mark.parametrize("num_images, cores", [(10**6, 1), (10**6, 2), (2 * workers.WORTH_A_PROCESS, 8)])
def test_small_work_and_few_cores_are_left_to_threads(num_images, cores):
    with ImageWorkers(num_images, cores=cores) as few:
        found = list(few.map(slowly, range(20)))
    assert found == [(number, os.getpid()) for number in range(20)]
    assert few.workers == min(cores, workers.MAX_THREADS)


def test_a_process_that_is_killed_is_told():
    with ImageWorkers(10**6, cores=3) as pool, pytest.raises(UserError) as error:
        list(pool.map(die, range(4)))
    assert str(error.value) == (
        "a process that reads images ended: killed, by the system if memory ran out, or started from a script without "
        "`if __name__ == '__main__':`; what is packed is kept, and packing again goes on from there"
    )


@pytest.mark.parametrize("pack_px", [None, 16])
def test_several_processes_pack_the_same_bytes_as_one(tmp_path, monkeypatch, pack_px):
    source = table(tmp_path / "raw")
    data = SMALL_SHARDS.model_copy(update={"pack_px": pack_px})
    pack_quietly(source, data, tmp_path / "one")
    monkeypatch.setattr(workers, "WORTH_A_PROCESS", 20)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    pack_quietly(source, data, tmp_path / "three")
    assert digests(tmp_path / "three") == digests(tmp_path / "one")


PACK = """
import os, sys
from data_pipeline import workers
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.pack import pack
workers.WORTH_A_PROCESS = 20
os.sched_getaffinity = lambda _: {0, 1, 2}
source = SourceConfig(path=sys.argv[1], labels="labels.csv", group_column="group")
pack(source, DataConfig(shard_mib=0.05, tail_budget_mib=0.04, pack_px=16), sys.argv[2], 0, progress=False)
"""


def children(process):
    """Processes that it has started and that are not zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == process and state != "Z":
                found.append(int(entry.name))
    return found


def gone(process, deadline):
    """Whether it has ended; a zombie that nobody has asked about has."""
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("sign", ["packing/notes-*", "train/*.tar"])
def test_killed_from_outside_no_process_stays_behind_and_the_next_run_goes_on(tmp_path, monkeypatch, sign):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    source, destination = table(tmp_path / "raw"), tmp_path / "killed"
    packing = subprocess.Popen([sys.executable, "-c", PACK, source.path, str(destination)], stderr=subprocess.DEVNULL)
    while packing.poll() is None and not list(destination.glob(sign)):
        time.sleep(0.002)
    family = children(packing.pid)
    packing.kill()
    packing.wait()
    assert len(family) >= 2
    deadline = time.monotonic() + 30
    assert all(gone(process, deadline) for process in family)
    pack_quietly(source, SMALL_SHARDS.model_copy(update={"pack_px": 16}), destination)
    pack_quietly(source, SMALL_SHARDS.model_copy(update={"pack_px": 16}), tmp_path / "straight")
    assert digests(destination) == digests(tmp_path / "straight")


def test_ctrl_c_in_a_terminal_is_one_line_whoever_it_meets(tmp_path):
    """It goes to the whole group of processes; only the command itself answers."""
    source, destination = table(tmp_path / "raw"), tmp_path / "d"
    start = "import os, sys; from data_pipeline import workers; workers.WORTH_A_PROCESS = 20; "
    start += "os.sched_getaffinity = lambda _: {0, 1, 2}; import rarelens; rarelens.main()"
    arguments = ["pack", str(source.path), str(destination), "--labels", "labels.csv", "data.shard_mib=0.05"]
    packing = subprocess.Popen(
        [sys.executable, "-c", start, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while packing.poll() is None and not list(destination.glob("packing/notes-*")):
        time.sleep(0.002)
    os.killpg(packing.pid, signal.SIGINT)
    said = packing.communicate(timeout=60)[1]
    assert packing.returncode == 130 and "Traceback" not in said
    assert said.strip().endswith("stopped; the same command goes on from here")
    assert not (destination / "dataset.json").exists()
