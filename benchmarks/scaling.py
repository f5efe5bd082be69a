"""The prediction of `rarelens plan` beside the real loop, with 1, 2 and 4 gloo workers on this machine.

    tests/sealed.sh python benchmarks/scaling.py --json scaling.json

Measured first, each constant on its own: what a step in memory costs for each image and whatever their number, the
network's rate with a second process beside it, the decoder's core seconds, gloo's latency and bandwidth between two
processes. The prediction is made of these before the loop runs. The loop is stage one's (`train_on_worker`:
loader, network, pool, engine), from a drawn dataset in a folder, a thread a worker. More workers than cores share them.
Rates are in core seconds and the loop's is the best that was seen: both are least distorted by a machine's other load.

    predicted_images_per_s_W, measured_images_per_s_W    the best of the log's lines after the first epoch
    ratio_W                                              measured / predicted
    load_W                                               load average of the last minute, this loop's own included
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.common import record
from cluster.launch import keep_freed_memory
from data_pipeline.pack import pack
from data_pipeline.synthetic import draw_synthetic
from tests.gloo import run_gloo
from tests.loop import loop
from tests.tiny import tiny_config
from trainer.machine import CPU, Machine
from trainer.network_size import network_size
from trainer.plan import predict
from trainer.plan_measure import decode_rate, network_rate
from trainer.plan_report import data_size
from tuning.config import Config

SMALL_NUMBERS, LARGE_NUMBERS = 16, 4_000_000
EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--image-px", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record(args.json, measure(args, Path(folder)))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The constants, then each number of workers: prediction, loop."""
    draw_synthetic(folder / "images", seed=1, scale=0.1)
    config = config_of(args, folder, "packed")
    pack(config.source, config.data, str(folder / "dataset"), config.seed, progress=False)
    data = data_size(config.model_copy(update={"run": str(folder)}), None, None)
    machine = constants(config, data.num_classes)
    figures: dict[str, Any] = {
        "images_per_s_core": machine.images_per_s,
        "crowded_rate": machine.crowded_rate,
        "decode_images_per_s_core": machine.decode_images_per_s_core,
        "link_latency_s": machine.link_latency_s,
        "link_bytes_per_s": machine.link_bytes_per_s,
        "step_overhead_s": machine.step_overhead_s,
    }
    for name, value in figures.items():
        print(f"{name:26} {value:,.6g}", flush=True)
    network = network_size(config, data.num_classes)
    for workers in args.workers:
        expected = predict(config, data, network, machine, workers, machines=1)
        told = run_gloo(one_loop, workers, args, str(folder))[0]
        rates = [line["images_per_s"] for line in told if line["kind"] == "step"]
        found = max(rates[len(rates) // EPOCHS :])
        figures |= {
            f"predicted_images_per_s_{workers}": expected.images_per_s,
            f"measured_images_per_s_{workers}": found,
            f"ratio_{workers}": found / expected.images_per_s,
            f"load_{workers}": os.getloadavg()[0],
        }
        print(
            f"{workers} workers: predicted {expected.images_per_s:6.1f}, measured {found:6.1f} images/s "
            f"({found / expected.images_per_s:.2f}), load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    return figures


def config_of(args: argparse.Namespace, folder: Path, run: str) -> Config:
    return tiny_config(
        folder / "images",
        run,
        data={"image_px": args.image_px},
        model={"backbone": args.backbone, "hidden_dim": 512, "embedding_dim": 128},
        stage_one={"epochs": EPOCHS, "batch_size": args.batch_size, "views": 1, "log_every_steps": 2},
    )


def one_loop(rank: int, world: int, args: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    keep_freed_memory()
    return loop(rank, world, config_of(args, Path(folder), f"run-{world}"), Path(folder))


def constants(config: Config, num_classes: int) -> Machine:
    """The CPU's machine with what is measured now."""
    (alone,) = run_gloo(rate_of, 1, config, num_classes)
    together = statistics.fmean(run_gloo(rate_of, 2, config, num_classes))
    latency_s, bytes_per_s = run_gloo(link, 2)[0]
    # More workers have fewer images each: what a step costs whatever their number is told apart by two numbers of them.
    many = config.stage_one.batch_size
    few = many // 4
    (many_s,), (few_s,) = (run_gloo(engine_step_s, 1, config, num_classes, size) for size in (many, few))
    image_s = (many_s - few_s) / (many - few)
    return replace(
        CPU,
        images_per_s=1 / image_s,
        crowded_rate=min(1.0, together / alone),
        decode_images_per_s_core=decode_rate(config.data),
        link_latency_s=latency_s,
        link_bytes_per_s=bytes_per_s,
        step_overhead_s=max(0.0, many_s - many * image_s),
    )


def rate_of(rank: int, world: int, config: Config, num_classes: int) -> float:
    """Images a second of forward and backward on one thread, the ranks at the same time."""
    dist.barrier()
    return network_rate(config, "cpu", num_classes)


def engine_step_s(rank: int, world: int, config: Config, num_classes: int, size: int) -> float:
    """Core seconds of a whole step on `size` images in memory: forward, losses, backward, optimiser."""
    import numpy as np

    from data_pipeline.loader import Batch
    from tests.engines import prepare
    from trainer.engine import Engine
    from trainer.losses import build_classification_loss, build_metric_loss
    from trainer.model import build_model
    from trainer.objective import Objective
    from trainer.plan_measure import shortest_s
    from trainer.stage_one import forward_backward

    prepare(rank, world)
    keep_freed_memory()
    stage, px = config.stage_one, config.data.image_px
    counts = torch.full((num_classes,), 10)
    model = build_model(config.model, num_classes, px)
    metric_loss = build_metric_loss(stage.loss, num_classes, config.model.embedding_dim, counts)
    objective = Objective(stage, build_classification_loss(stage.classification, counts), metric_loss)
    engine = Engine(model, stage, world, "cpu", metric_loss)
    images = torch.randn(size, 3, px, px).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.arange(size) % num_classes, np.arange(size), [""] * size, 0, 0, None, np.arange(size))

    def step() -> None:
        forward_backward(engine, objective, batch, 0.5)
        engine.step(1e-3)

    return shortest_s(step, time.process_time)


def link(rank: int, world: int) -> tuple[float, float]:
    """Latency and bandwidth of gloo between two processes, of a small and a large all-reduce.

    All-reduce takes 2 (W - 1) (alpha + n / (W beta)) = 2 alpha + n / beta for two.
    """
    small, large = torch.zeros(SMALL_NUMBERS), torch.zeros(LARGE_NUMBERS)
    small_s = middle_s(lambda: dist.all_reduce(small), 200)
    large_s = middle_s(lambda: dist.all_reduce(large), 10)
    return small_s / 2, LARGE_NUMBERS * 4 / max(large_s - small_s, 1e-9)


def middle_s(function: Callable[[], object], calls: int) -> float:
    """Seconds of a call, the median: ranks wait for one another, also in a run."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
