"""What stage one's loop adds to a step: it beside bare forward + backward + optimiser of the same network.

    python benchmarks/step.py --json step.json

The images are in memory for both. "Loop" is `train_epoch` as a run calls it: network under DeepSpeed, cross-entropy and
supervised contrastive loss over the pool of all workers, their mean over workers, the gradient's norm, seeding, log.
"Bare" is PyTorch: the same network, the same two losses of the worker's own images, AdamW; no other process is asked.
With two workers, one core each, "DDP" is "bare" with torch's DistributedDataParallel, which sends the gradients and
nothing else. Rivals run in alternating rounds of a few steps; the shares are the middle of those within a round.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.functional import cross_entropy

from benchmarks.common import Times, quiet_time, record
from cluster.launch import keep_freed_memory
from cluster.worker import Worker
from data_pipeline.loader import Batch
from trainer.config import TrainerConfig
from trainer.losses.base import Pool
from trainer.losses.supervised_contrastive import supervised_contrastive
from trainer.model import build_model

NUM_CLASSES = 16
FIRST_BATCHES = 4  # different ones, in turn


def main() -> None:
    args = arguments()
    figures: dict[str, Any] = {}
    for world in args.workers:
        times = run(world, args)
        loop, bare = times.best("loop") / args.steps, times.best("bare") / args.steps
        figures |= {f"loop_step_s_{world}": loop, f"bare_step_s_{world}": bare}
        shares = {"overhead_share" if world == 1 else f"overhead_share_{world}_workers_no_messages": "bare"}
        if world > 1:
            shares[f"overhead_share_{world}_workers"] = "ddp"
        for key, rival in shares.items():
            figures[key] = times.median_ratio("loop", rival) - 1
            figures[f"{key}_best"] = times.ratio("loop", rival) - 1
            print(f"{world} worker(s): loop {loop * 1e3:7.1f} ms a step, over {rival}: {figures[key]:+.1%}")
    figures |= {"backbone": args.backbone, "image_px": args.image_px, "batch_size": args.batch_size}
    record(args.json, figures)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--backbone", default="test_resnet", help="timm network; the smaller, the harder for the loop")
    parser.add_argument("--image-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=64, help="of all workers")
    parser.add_argument("--steps", type=int, default=10, help="in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    return parser.parse_args()


def run(world: int, args: argparse.Namespace) -> Times:
    """The rounds' times on rank 0 of so many workers."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(on_rank, (world, args, folder), nprocs=world)
        return Times(torch.load(Path(folder) / "times.pt", weights_only=True))


def on_rank(rank: int, world: int, args: argparse.Namespace, folder: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
    keep_freed_memory()  # as in a run
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    rivals = {"loop": loop(rank, world, args), "bare": bare(rank, world, args)}
    if world > 1:
        rivals["ddp"] = bare(rank, world, args, distributed=True)
    times = quiet_time({name: together(rival) for name, rival in rivals.items()}, args.rounds, warm_up=2)
    if rank == 0:
        torch.save(times.seconds, Path(folder) / "times.pt")
    dist.barrier()
    dist.destroy_process_group()


def together(rival: Callable[[], None]) -> Callable[[], None]:
    """All ranks begin and end a round at one time."""

    def in_step() -> None:
        dist.barrier()
        rival()
        dist.barrier()

    return in_step


def settings(args: argparse.Namespace) -> TrainerConfig:
    return TrainerConfig.model_validate(
        {
            "data": {"image_px": args.image_px},
            "model": {"backbone": args.backbone, "hidden_dim": 128, "embedding_dim": 64},
            "stage_one": {"batch_size": args.batch_size, "views": 1, "epochs": 10**6},
        }
    )


def batches(rank: int, world: int, args: argparse.Namespace) -> list[Batch]:
    """This rank's share of each batch, channels last as the loader gives them."""
    generator = torch.Generator().manual_seed(0)
    positions = np.arange(args.batch_size)[rank::world]
    made = []
    for step in range(FIRST_BATCHES):
        images = torch.randn(args.batch_size, 3, args.image_px, args.image_px, generator=generator)[positions]
        labels = torch.randint(NUM_CLASSES, (args.batch_size,), generator=generator)[positions]
        images = images.to(memory_format=torch.channels_last)
        made.append(Batch(images, labels, positions, [""] * len(labels), step, 0, None, positions))
    return made


def loop(rank: int, world: int, args: argparse.Namespace) -> Callable[[], None]:
    """A run's own steps."""
    from trainer.stage_checkpoint import CheckpointClock
    from trainer.stage_one import train_epoch
    from trainer.step_log import StepLog
    from trainer.trainee import build_trainee

    class InMemory:
        """Stands for the loader."""

        steps_per_epoch, wait_s = args.steps, 0.0

        def __init__(self) -> None:
            self.batches = batches(rank, world, args)

        def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
            for step in range(args.steps):
                batch = self.batches[step % FIRST_BATCHES]
                batch.step, batch.epoch = step, epoch
                yield batch

    config, loader = settings(args), InMemory()
    worker = Worker(rank, world, "cpu")  # a silent one: Ray's messages take no time that the loop waits for
    counts = np.full(NUM_CLASSES, args.batch_size)
    trainee = build_trainee(worker, config, counts, loader, torch.device("cpu"))  # type: ignore[arg-type]
    classes = tuple(str(number) for number in range(NUM_CLASSES))
    log = StepLog(worker, trainee.told, loader, config.stage_one, classes)  # type: ignore[arg-type]
    trainee.engine.train()
    epoch = iter(range(10**6))
    clock = CheckpointClock(worker, config.stage_one.model_copy(update={"checkpoint_every_minutes": None}))
    return lambda: train_epoch(worker, trainee, config, next(epoch), log, clock)


def bare(rank: int, world: int, args: argparse.Namespace, distributed: bool = False) -> Callable[[], None]:
    """What nobody can do without."""
    config, own = settings(args), batches(rank, world, args)
    torch.manual_seed(config.seed)
    model: Any = build_model(config.model, NUM_CLASSES, args.image_px)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.stage_one.optimiser.lr)
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    temperature = config.stage_one.loss.temperature

    def steps() -> None:
        for step in range(args.steps):
            batch = own[step % FIRST_BATCHES]
            output = model(batch.images)
            pool = Pool(output.embeddings, batch.labels, 0)
            metric = supervised_contrastive(output.embeddings, batch.labels, pool, temperature)
            loss = cross_entropy(output.logits, batch.labels) + metric.total / max(metric.count, 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return steps


if __name__ == "__main__":
    main()
