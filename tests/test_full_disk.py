"""A local disk with no room for a checkpoint: one error that says where, and the checkpoint before stays."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from pathlib import Path
from cluster.errors import UserError
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from tests.tiny import tiny_config

def train(rank, world, folder):
    config = tiny_config(Path(folder) / "images", "run", stage_one={"epochs": 1, "batch_size": 32})
    try:
        loop(rank, world, config, Path(folder))
    except UserError as error:
        return str(error)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    draw_synthetic(folder / "images", seed=1, scale=0.06)
    config = tiny_config(folder / "images", "run")
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    print(run_gloo(train, 1, str(folder))[0])
"""


@pytest.fixture
def disk():
    """Where the disk is mounted. A short path: multiprocessing's sockets lie on it, and theirs may have 108 bytes."""
    with TemporaryDirectory(prefix="disk-") as folder:
        yield folder


def test_a_full_disk_is_one_error(disk, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # A disk of 100 kB, of this process's alone; gloo's own files and the checkpoint go there.
    mounted = f"mount -t tmpfs -o size=100k tmpfs {disk} && TMPDIR={disk} PYTHONPATH={ROOT} exec {sys.executable} "
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.fail("this kernel does not let us mount a disk of our own")
    command = ["unshare", "-rm", "sh", "-c", f"{mounted} {tmp_path / 'script.py'} {tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    assert said.startswith(f"no room for checkpoint epoch-0000 below {disk} on "), said + done.stderr
    assert said.endswith("; free some, or set TMPDIR to another disk; no checkpoint is kept"), said
