"""How many heads a minute stage two's search makes, beside one head a Tune trial and beside a cRT on images.

    python benchmarks/search.py --json FILE            heads of 10 epochs on 4,200 x 1,280 features of 7 classes
    python benchmarks/search.py --large --json FILE    heads of 10,000 classes streamed from a memory map

All of it runs in this one call, one after the other. The backbone's row is the one that is estimated: images a second
through the backbone are measured, the minutes of 10 epochs over 4,200 images follow.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import peak_extra_bytes, record

SAMPLES, DIM, CLASSES, EPOCHS = 4200, 1280, 7, 10
LONG_TAIL = 0.45
"""Each class has this share of the images of the one before it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--heads", type=int, default=3072, help="heads of the search")
    parser.add_argument("--single", type=int, default=48, help="heads of the rival, one a Tune trial")
    parser.add_argument("--large", action="store_true", help="10,000 classes instead")
    parser.add_argument("--large-samples", type=int, default=100_000)
    arguments = parser.parse_args()
    figures = large(arguments.large_samples) if arguments.large else search(arguments.heads, arguments.single)
    for name, value in figures.items():
        print(f"{name:32} {value:,.4g}")
    record(arguments.json, figures)


def search(heads: int, single: int) -> dict[str, float]:
    import ray

    logging.disable(logging.WARNING)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    began = time.perf_counter()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    with tempfile.TemporaryDirectory(prefix="rarelens-bench-") as scratch:
        folder = Path(scratch)
        write_features(folder / "features")
        figures = {"start_to_first_result_s": 0.0}
        many = run_search(folder, "many", heads, heads_per_trial=64)
        figures["start_to_first_result_s"] = many["first_s"] - began
        figures["heads_per_minute"] = 60 * heads / many["seconds"]
        figures["search_seconds"] = many["seconds"]
        figures["tune_overhead_share"] = 1 - many["busy_s"] / (2 * many["seconds"])
        one = run_search(folder, "one", single, heads_per_trial=1)
        figures["one_head_a_trial_per_minute"] = 60 * (single - 2) / (one["last_s"] - one["first_s"])
    ray.shutdown()
    images_per_s = backbone_images_per_s()
    figures["backbone_images_per_s"] = images_per_s
    backbone_minutes = EPOCHS * SAMPLES / images_per_s / 60
    figures["ratio_one_head_a_trial"] = figures["heads_per_minute"] / figures["one_head_a_trial_per_minute"]
    figures["ratio_backbone_each_epoch"] = figures["heads_per_minute"] * backbone_minutes
    return figures


def run_search(folder: Path, name: str, heads: int, heads_per_trial: int) -> dict[str, float]:
    """One round of the search; when its first and last blocks were finished, and how long its processes worked."""
    import torch

    from trainer.heads import Head
    from tuning.block import Job
    from tuning.rounds import run_blocks
    from tuning.space import blocks_of

    job = Job(
        features_folder=str(folder / "features"),
        blocks=blocks_of(specs(heads), heads_per_trial),
        own=Head(torch.zeros(CLASSES, DIM), torch.zeros(CLASSES)),
        num_classes=CLASSES,
        select_by="balanced_accuracy",
        folds=1,
        storage_uri=str(folder / name),
    )
    finished: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            done = len(list((folder / name / "blocks").glob("*.safetensors")))
            finished.extend([time.perf_counter()] * (done - len(finished)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    run_blocks(job)
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    busy = sum(read_seconds(job))
    return {"seconds": seconds, "first_s": finished[0], "last_s": finished[-1], "busy_s": busy}


def read_seconds(job) -> list[float]:
    from tuning.block import read_block

    return [read_block(job, block).seconds for block in range(len(job.blocks))]


def specs(heads: int):
    """Specs of cRT and balanced softmax with drawn rates and decays; eleven sampling powers."""
    from trainer.heads import HeadSpec

    rng = np.random.default_rng(0)
    made = []
    for i in range(heads):
        knobs = {"lr": float(10 ** rng.uniform(-1, 1.5)), "weight_decay": float(10 ** rng.uniform(-6, -2))}
        family, power = ("crt", i % 11 / 10) if i % 2 else ("balanced_softmax", 1.0)
        made.append(HeadSpec(family, power=power, epochs=EPOCHS, **knobs))
    return sorted(made, key=lambda spec: (spec.sampling_power, spec.family))


def write_features(folder: Path) -> None:
    from trainer.features import Features, write_manifest, write_part

    centres = np.random.default_rng(0).normal(size=(CLASSES, DIM)) * 0.1
    shares = LONG_TAIL ** np.arange(CLASSES)
    rows = {"train": SAMPLES, "val": 900}
    for split, number in rows.items():
        rng = np.random.default_rng(number)
        labels = np.concatenate([np.arange(CLASSES), rng.choice(CLASSES, number - CLASSES, p=shares / shares.sum())])
        x = np.maximum(centres[labels] + rng.normal(size=(number, DIM)), 0).astype(np.float16)
        names = np.array([f"{split}{i}" for i in range(number)], dtype=object)
        write_part(folder, split, 0, Features(names, labels, names, np.arange(number), x))
    write_manifest(folder, backbone="none", checkpoint_sha256="", dim=DIM, rows=rows, parts=1)


def backbone_images_per_s(batches: int = 6) -> float:
    """Forward passes of EfficientNet-Lite0 at 128 px, both cores: what a cRT that keeps no features repeats."""
    import timm
    import torch

    torch.set_num_threads(2)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval().to(memory_format=torch.channels_last)
    images = torch.randn(64, 3, 128, 128).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        began = time.perf_counter()
        for _ in range(batches):
            model(images)
    return 64 * batches / (time.perf_counter() - began)


def large(samples: int, dim: int = 2048, classes: int = 10_000, heads: int = 2) -> dict[str, float]:
    """One epoch of some heads over features that stay in a memory map; twice as many samples, twice the time."""
    import torch

    from trainer.heads import Head, HeadSpec
    from trainer.stage_two import TrainingSet, make_heads

    torch.set_num_threads(2)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rarelens-bench-") as scratch:
        x = np.lib.format.open_memmap(f"{scratch}/x.npy", "w+", np.float16, (samples, dim))
        rng = np.random.default_rng(0)
        for start in range(0, samples, 10_000):
            x[start : start + 10_000] = rng.standard_normal((min(10_000, samples - start), dim), dtype=np.float32)
        labels = rng.permutation(np.arange(samples) % classes)
        own = Head(torch.zeros(classes, dim), torch.zeros(classes))
        wanted = [HeadSpec("crt", power=0.5, epochs=1, lr=lr) for lr in np.geomspace(1, 3, heads).tolist()]

        def train(number: int) -> None:
            counts = np.bincount(labels[:number], minlength=classes)
            # A budget below the features' size: they are read batch by batch, as a million samples would be.
            data = TrainingSet(x[:number], labels[:number], counts, memory_bytes=2**30)
            make_heads(wanted, data, own)

        for name, number in (("half", samples // 2), ("whole", samples)):
            began = time.perf_counter()
            figures[f"{name}_extra_bytes"] = peak_extra_bytes(lambda number=number: train(number))
            figures[f"{name}_seconds"] = time.perf_counter() - began
    figures["seconds_ratio"] = figures["whole_seconds"] / figures["half_seconds"]
    return figures


if __name__ == "__main__":
    main()
