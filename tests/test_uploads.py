"""Checkpoints on their way to a bucket: behind the steps, one at a time, and what follows where one does not arrive."""

import os
import time

import pytest

from cluster.checkpoint import write_manifest
from cluster.config import ClusterConfig
from cluster.errors import UserError
from cluster.launch import run_workers
from cluster.worker import Worker
from tests.faulty_s3 import Frozen, pass_on, proxy_to, refusal

CLUSTER = ClusterConfig(workers=2, device="cpu", cpus_per_worker=0.5, max_failures=3)

TOGETHER_WITHIN_S = 60


@pytest.fixture
def proxy(ray_session, moto_s3, monkeypatch):
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def spoil(proxy, fault, name):
    """Let a fault answer each upload of a file."""

    def rule(handler):
        (fault if handler.command == "PUT" and handler.path.endswith(name) else pass_on)(handler)

    proxy.rule = rule


def save(worker: Worker, step: int) -> None:
    with worker.snapshot() as folder:
        write_manifest(folder, worker.rank, worker.world, {"step": step})
        worker.tell({"begins": step, "uploading": worker.uploading})
        worker.report({"step": step}, folder, f"step-{step}")


def save_three(worker: Worker) -> None:
    """Steps go on while the first one's upload lasts."""
    save(worker, 1)
    goes_on = 0
    while worker.rank == 1 and worker.uploading:
        goes_on += 1
        worker.tell({"goes on": goes_on})
        worker.beat("step")
        time.sleep(0.01)
    for step in (2, 3):
        save(worker, step)


def test_steps_go_on_while_a_checkpoint_is_uploaded_and_no_second_one_begins(proxy, moto_s3, tmp_path):
    frozen, told = Frozen(), []
    spoil(proxy, frozen, "step-1/manifest-rank1.json")

    def on_message(message):
        told.append(message)
        if message.get("goes on") == 100:
            assert not any("step-2/" in path for _, path, _ in proxy.seen)
            proxy.rule = pass_on
            frozen.thaw()

    uri = f"{moto_s3}/{tmp_path.name}/run"
    run_workers(save_three, {}, name="n", run_uri=uri, cluster=CLUSTER, keep=(3, "step"), on_message=on_message)
    begun = [message for message in told if "begins" in message]
    assert sorted(message["begins"] for message in begun) == [1, 1, 2, 2, 3, 3]
    assert not any(message["uploading"] for message in begun)
    files = [path.partition("?")[0] for command, path, _ in proxy.seen if command == "PUT" and "/step-" in path]
    last = {step: max(i for i, path in enumerate(files) if f"/step-{step}/" in path) for step in (1, 2, 3)}
    first = {step: files.index(next(path for path in files if f"/step-{step}/" in path)) for step in (1, 2, 3)}
    assert last[1] < first[2] and last[2] < first[3], files


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "AccessDenied", "is denied"),
        pytest.param(507, "QuotaExceeded", "has no space left", marks=pytest.mark.long),
    ],
)
def test_one_rank_whose_upload_fails_ends_all_ranks_with_its_error(proxy, moto_s3, tmp_path, status, code, said):
    """And not by the half hour that a barrier waits."""
    failed_at = []

    def fails(handler):
        failed_at.append(time.monotonic())
        refusal(status, code)(handler)

    spoil(proxy, fails, "manifest-rank1.json")
    uri = f"{moto_s3}/{tmp_path.name}/run"
    with pytest.raises(UserError, match=rf"^checkpoint step-1 could not be kept: .*{said}") as error:
        run_workers(save_three, {}, name="n", run_uri=uri, cluster=CLUSTER, keep=(3, "step"))
    assert failed_at and time.monotonic() - failed_at[0] < TOGETHER_WITHIN_S, "every worker has ended"
    assert f"{uri}/n/step-1/manifest-rank1.json" in str(error.value)
    assert not [path for command, path, _ in proxy.seen if command == "PUT" and "/step-2/" in path]
