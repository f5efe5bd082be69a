"""Plugs are pulled on three real hosts: training and a search go on from the bucket, and `rarelens status` tells of it.

One cluster by one `ray up` serves all of it, in order. Each figure that is printed goes to docs/reliability.md.
"""

import os
import re
import time
from collections import Counter

import numpy as np
import pytest
import yaml

from data_pipeline.synthetic import draw_synthetic
from tests.lab import lab
from tests.tiny import tiny_config

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
RUN = f"{lab.BUCKET}/runs/training"
KILLS = 6
STAGE = {"epochs": 3000, "batch_size": 16, "log_every_steps": 10, "keep_checkpoints": 1}  # 10 steps an epoch


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    if os.geteuid():
        pytest.fail("the lab needs root: it makes network name spaces")
    folder = tmp_path_factory.mktemp("lab")
    draw_synthetic(folder / "images", seed=2, scale=0.06)
    values = tiny_config(folder / "images", RUN).model_dump(mode="json")
    values["stage_one"] |= STAGE
    values["data"]["packed"] = f"{lab.BUCKET}/dataset"
    values["cluster"] |= {"workers": 2, "cpus_per_worker": 1.0, "max_failures": 20}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    with lab.lab():
        lab.python("op", f"import boto3; boto3.client('s3').upload_file('{folder}/tiny.yaml', 'lab', 'tiny.yaml')")
        table = "--labels labels.csv --group-column group"
        lab.on("op", f"rarelens pack {folder / 'images'} {lab.BUCKET}/dataset {table}")
        lab.ray_up()
        yield


def hosts_of_workers():
    count = "pgrep -fc ray::RayTrainWorker"
    return [host for host in ("h1", "h2", "h3") if lab.on(host, count, check=False).split()[:1] not in ([], ["0"])]


def goes_on(run, after, limit_s=240):
    """Seconds until the run has saved an epoch beyond `after`."""
    return lab.within(limit_s, lambda: lab.epoch_of(run) > after, every_s=1)


def test_a_job_trains_on_two_hosts():
    lab.submit("first", f"rarelens stage-one {lab.BUCKET}/tiny.yaml")
    seconds = lab.within(240, lambda: lab.epoch_of(RUN) > 3, every_s=1)
    print(f"\nsubmitted to the fourth epoch: {seconds:.0f} s, on {hosts_of_workers()}")
    assert len(hosts_of_workers()) == 2


def test_a_link_is_cut_and_a_spare_host_takes_over():
    lost = next(h for h in hosts_of_workers() if h != "h1")
    epoch = lab.epoch_of(RUN)
    lab.hosts("unplug", lost)
    cut = time.monotonic()
    lab.within(240, lambda: lab.alive() == 2, every_s=1)
    noticed = time.monotonic() - cut
    goes_on(RUN, epoch + 2)
    went_on = time.monotonic() - cut
    print(f"\nlink of {lost} cut: Ray noticed after {noticed:.0f} s, the run went on after {went_on:.0f} s")
    others = {"h1", "h2", "h3"} - {lost}  # what is left on the host that was cut off counts no more
    assert others <= set(hosts_of_workers()) and lab.job_status("first") == "RUNNING"
    lab.hosts("plug", lost)
    print(f"link back: {lost} is in the cluster again after {lab.rejoined():.0f} s")


def test_killed_workers_cost_seconds():
    waits = []
    for _ in range(KILLS):
        host, epoch = next(h for h in hosts_of_workers() if h != "h1"), lab.epoch_of(RUN)
        lab.on(host, "pkill -9 -f ray::RayTrainWorker", check=False)
        waits.append(goes_on(RUN, epoch + 1))  # the one after it may have been on its way to the bucket
    p50, p95 = np.percentile(waits, [50, 95])
    print(f"\nfrom SIGKILL of a worker to the next epoch saved but one: p50 {p50:.0f} s, p95 {p95:.0f} s of {KILLS}")


def test_power_is_lost_and_a_spare_host_takes_over():
    lost = next(h for h in hosts_of_workers() if h != "h1")
    epoch = lab.epoch_of(RUN)
    lab.hosts("unplug", lost)  # without it the kernel, which stays, would say good-bye for the dead processes
    lab.hosts("off", lost)
    seconds = goes_on(RUN, epoch + 2)
    print(f"\npower of {lost} lost: the run went on after {seconds:.0f} s")
    assert lab.job_status("first") == "RUNNING" and lab.alive() == 2
    lab.hosts("plug", lost)
    lab.power_on(lost)
    print(f"power back: {lost} is in the cluster again after {lab.rejoined():.0f} s")


def test_without_a_spare_the_run_waits_and_goes_on_when_power_is_back():
    working = hosts_of_workers()
    lost = next(h for h in working if h != "h1")
    spare = next(h for h in ("h2", "h3") if h != lost)
    off = [lost] if spare in working else [lost, spare]
    for host in off:
        lab.hosts("off", host)
    began, epoch = time.monotonic(), lab.epoch_of(RUN)
    lab.within(240, lambda: lab.alive() == 3 - len(off), every_s=1)
    time.sleep(20)
    assert lab.job_status("first") == "RUNNING", "it waits"
    for host in off:
        lab.power_on(host)
    power = time.monotonic()
    goes_on(RUN, epoch + 2)
    went_on = time.monotonic() - power
    print(f"\n{off} without power for {power - began:.0f} s; after it was back: {went_on:.0f} s to go on")
    lab.rejoined()


def test_the_head_is_lost_and_the_same_job_goes_on_from_the_bucket():
    """Not survived by the job itself: its driver was there. What it had done is in the bucket.

    Ray and the workers of the other hosts live when the head is back, under a head that they do not know.
    """
    epoch = lab.epoch_of(RUN)
    before = {(host, pid): name for host in ("h2", "h3") for pid, name in lab.ray_processes(host).items()}
    lab.hosts("off", "h1")
    lost, seen = time.monotonic(), []
    lab.power_on("h1")

    def look():
        """How many of those processes live, where that has changed: seconds since the loss, raylets, workers."""
        now = {(host, pid) for host in ("h2", "h3") for pid in lab.ray_processes(host)}
        left = Counter(name for process, name in before.items() if process in now)
        counts = left["raylet"], left["worker"]
        if not seen or seen[-1][1:] != counts:
            seen.append((round(time.monotonic() - lost), *counts))
        return counts

    assert look()[0] == 2, "h2 and h3 have lost nothing but their head"
    began = time.monotonic()
    lab.ray_up()
    look()
    lab.submit("second", f"rarelens stage-one {lab.BUCKET}/tiny.yaml --resume")
    lab.within(240, lambda: look()[1] == 0, every_s=1)  # until then a new epoch may be of theirs
    goes_on(RUN, max(epoch, lab.epoch_of(RUN)))
    look()
    print(f"\nhead lost: {time.monotonic() - began:.0f} s from `ray up` to a new epoch")
    for seconds, raylets, workers in seen:
        print(f"{seconds} s after the loss: {raylets} raylets and {workers} workers of before are left on h2 and h3")
    assert all(lab.ray_processes(host) for host in ("h2", "h3")), "`ray up` has started Ray there anew"


def test_status_tells_what_happened():
    print("\n" + lab.on("op", f"rarelens status {RUN}"))
    said = lab.status(RUN)
    assert said["step"] == "stage one" and said["process"]["lives"] and "h1" in said["process"]["owner"]
    assert said["restarts"] >= KILLS + 3, "each kill, the link, the power, the head"
    # Of a host that is cut off the driver's watch tells within a minute, or Ray after 40 s: whichever is first.
    assert said["incidents"].get("hang", 0) + said["incidents"].get("lost", 0) >= 1
    assert re.search(r"has not answered for|rank \d+.* (died|failed): ", said["last_incident"]["text"])
    assert said["training"]["step"] and said["training"]["loss"] and said["training"]["images_per_s"]
    assert said["checkpoint"]["path"].startswith("stage_one/")
    lab.on("op", f"ray job stop --address {lab.JOBS} second", check=False)


def test_a_search_goes_on_after_a_host_was_lost():
    run = f"{lab.BUCKET}/runs/search"
    epochs = 6
    more = f"run={run} stage_one.epochs={epochs} search.trials=6 search.cpus_per_trial=1"
    lab.submit("search", f"rarelens search {lab.BUCKET}/tiny.yaml {more}")

    def scored():
        return sum(key.endswith("scores.json") for key in lab.keys("runs/search/search/"))

    lab.within(300, lambda: scored() >= 2 and lab.finished_trials(run, epochs) != {}, every_s=2)
    finished = lab.finished_trials(run, epochs)
    time.sleep(5)  # in which Tune, too, has heard of them
    lab.hosts("off", "h3")
    lab.power_on("h3")
    began = time.monotonic()
    lab.within(700, lambda: lab.job_status("search") in ("SUCCEEDED", "FAILED"), every_s=3)
    print(f"\nsearch over {time.monotonic() - began:.0f} s after a host was lost: {lab.job_status('search')}")
    assert lab.job_status("search") == "SUCCEEDED", lab.on(
        "op", f"ray job logs --address {lab.JOBS} search", check=False
    )
    after = lab.finished_trials(run, epochs)
    print(f"{len(finished) // 2} trials had been finished before, {len(after) // 2} in all")
    assert {name: after.get(name) for name in finished} == finished, "a finished trial ran again"
