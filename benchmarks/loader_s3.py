"""The S3 part of `loader.py`: a real S3 server process (moto) on loopback, free and behind a throttle.

`s3_second_epoch_ratio`: images a second out of a bucket once an epoch has been read, over those from a local folder.
`s3_first_epoch_wait_share`: share of the first epoch, from making the loader on, that a simulated step waits for data.
The step takes a fixed number of images a second; the store gives twice the bytes that these need.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.loader import BATCH, Setting, best, compete, data_config, make_loader, median_ratio, rarelens_batches
from cluster.storage import open_storage
from data_pipeline.dataset import Dataset, open_dataset

BUCKET = "benchmark"
BANDWIDTH_FACTOR = 2.0
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def measure_s3(setting: Setting, folder: str, rounds: int, seconds: float, images_per_s: float) -> dict[str, float]:
    """Both figures; the bucket gets a copy of the dataset.

    Args:
        setting: What is measured.
        folder: For caches.
        rounds: Of the second epoch's comparison.
        seconds: Of a round.
        images_per_s: What the simulated step takes.
    """
    with s3_server() as address:
        os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{address}")
        bucket = upload(setting.dataset)
        return {
            **second_epoch(setting, bucket, f"{folder}/cache-second", rounds, seconds),
            **first_epoch(setting, bucket, f"{folder}/cache-first", address, images_per_s),
        }


@contextmanager
def s3_server() -> Iterator[str]:
    """Address of a server that runs as a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@contextmanager
def throttled(address: str, bytes_per_s: float, direction: str = "down") -> Iterator[str]:
    """Address at which the same server answers, slower; `up`: what is sent to it goes slower."""
    command = [sys.executable, str(Path(__file__).parent / "throttle.py"), address, str(bytes_per_s), direction]
    proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert proxy.stdout is not None
        yield f"127.0.0.1:{int(proxy.stdout.readline())}"
    finally:
        proxy.kill()
        proxy.wait()


def upload(dataset: Dataset) -> str:
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    storage = open_storage(f"s3://{BUCKET}/packed")
    for stored in dataset.storage.list():
        local = dataset.storage.local_path(stored.path)
        assert local is not None
        storage.upload(local, stored.path)
    return storage.uri


def second_epoch(setting: Setting, bucket: str, cache: str, rounds: int, seconds: float) -> dict[str, float]:
    dataset, data = open_dataset(bucket), data_config(setting, cache_dir=cache)
    warm = rarelens_batches(setting, dataset, data)
    for _ in range(make_steps(setting)):
        next(warm)
    warm.close()  # type: ignore[attr-defined]
    found = compete(
        {"s3": lambda: rarelens_batches(setting, dataset, data), "local": lambda: rarelens_batches(setting)},
        rounds,
        seconds,
    )
    return {
        "s3_second_epoch_images_per_s": best(found["s3"]),
        "s3_second_epoch_ratio": best(found["s3"]) / best(found["local"]),
        "s3_second_epoch_median_ratio": median_ratio(found["s3"], found["local"]),
    }


def make_steps(setting: Setting) -> int:
    return max(1, len(setting.dataset.index("train")) // BATCH)


def first_epoch(setting: Setting, bucket: str, cache: str, address: str, images_per_s: float) -> dict[str, float]:
    index = setting.dataset.index("train")
    classes = [index.length[index.label == label].mean() for label in np.unique(index.label)]
    needed = images_per_s * float(np.mean(classes))  # balanced sampling: every class alike
    found: dict[str, float] = {"s3_step_images_per_s": images_per_s, "s3_store_bytes_per_s": BANDWIDTH_FACTOR * needed}
    with throttled(address, BANDWIDTH_FACTOR * needed) as slow:
        os.environ["AWS_ENDPOINT_URL"] = f"http://{slow}"
        dataset = open_dataset(bucket)
        dataset.index("train")
        begin = time.perf_counter()
        loader = make_loader(setting, dataset, data_config(setting, cache_dir=cache))
        working_s, waited_after_first = 0.0, 0.0
        for batch in loader.epoch(0):
            if not working_s:
                found["s3_first_batch_s"] = time.perf_counter() - begin
                waited_after_first = -loader.wait_s
            step_s = len(batch.labels) / images_per_s
            time.sleep(step_s)
            working_s += step_s
        passed = time.perf_counter() - begin
        found["s3_first_epoch_wait_share"] = 1 - working_s / passed
        found["s3_first_epoch_wait_share_after_first_batch"] = (waited_after_first + loader.wait_s) / passed
        found["s3_first_epoch_s"] = passed
        loader.close()
        os.environ["AWS_ENDPOINT_URL"] = f"http://{address}"
    shutil.rmtree(cache, ignore_errors=True)
    return found
