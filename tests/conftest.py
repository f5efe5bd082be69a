"""What many tests share: an S3 server and Ray, each started once a session, both on loopback only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A suite that a shell starts in the background ignores Ctrl-C, and so would the processes that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TURNS = 6  # `make test-turn` runs a sixth of the long tests
BUCKET = "rarelens-tests"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-the-tests",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # boto3 would ask the machine's cloud for a role
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turn", type=int, help="of the long tests only a share, another one with each number")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests whose turn it is: every TURNS-th file of them, all of them after TURNS numbers."""
    turn = config.getoption("--turn")
    if turn is None:
        return
    files = sorted({item.path for item in items if item.get_closest_marker("long")})
    now = {path for place, path in enumerate(files) if place % TURNS == turn % TURNS}
    left_out = [item for item in items if item.get_closest_marker("long") and item.path not in now]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[str]:
    """`s3://bucket` on a server process (moto) on loopback; this process and its children find it by environment."""
    import boto3

    command = [sys.executable, str(Path(__file__).with_name("s3_server.py"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    port = int(server.stdout.readline())
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in S3_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="session")
def ray_session(moto_s3: str) -> Iterator[None]:
    """Ray on this machine with two cores. After the S3 server, so that Ray's workers find it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MALLOC_ARENA_MAX", "1")  # as `cluster.launch.start_ray`
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # ninja, for DeepSpeed
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()
