"""The rules: pure functions of a few numbers, each the value of one setting."""

from __future__ import annotations

import math

from trainer.machine import Machine
from trainer.network_size import NetworkSize
from trainer.plan import device_memory, images_of_largest_worker
from tuning.config import Config

SMALL_NETWORK, LARGE_NETWORK = "tf_efficientnet_lite0", "resnet50"
"""Of .4 and 4.1 GFLOP an image at 224 px; the second is the network with which the method was published."""
SIDES_PX = (64, 96, 128, 160, 224, 288)
EPOCHS = {True: (8, 40), False: (30, 120)}
"""From trained weights or from random ones: the fewest that give a result worth having, the most that are worth it."""
PACK_ROOM = 1.25
"""Short side of packed images in units of `image_px`: crops keep .4 to 1 of the area, so hardly any detail is lost."""
CENTRE_ROOM = 1.143
"""Of evaluation's resize, whose centre is then cut out (256 / 224)."""
STREAMS = 8
BATCH, LEAST_BATCH, MOST_BATCH, STEPS_PER_EPOCH = 64, 16, 512, 20
LR = {True: 1e-3, False: 3e-3}
"""AdamW at `BATCH`, from trained weights or random ones: those of configs/ham10000.yaml and configs/quickstart.yaml."""
IMAGES_FOR_BATCH_NORM = 16
TAIL_MIB, TAIL_STEP_MIB, TAIL_SHARE = 1024, 64, 1 / 8


def sides_px(short_px: int) -> list[int]:
    """Sides of the network's images: never enlarged, since that adds no detail, except to the smallest side.

    Args:
        short_px: Median short side of the images.
    """
    return [px for px in SIDES_PX if px <= short_px] or [SIDES_PX[0]]


def pack_px(short_px: int, image_px: int) -> int | None:
    """Short side of packed images; None = as they are, where shrinking would save little."""
    wanted = 8 * math.ceil(PACK_ROOM * image_px / 8)
    return wanted if short_px >= PACK_ROOM * wanted else None


def resize_ratio(short_px: int, image_px: int) -> float:
    """Evaluation cuts the centre out where there is room for it, else it takes the whole image."""
    return CENTRE_ROOM if short_px >= CENTRE_ROOM * image_px else 1.0


def streams(workers: int) -> int:
    """Canonical streams: the default, or the next multiple of the workers, so that all have parts of one size."""
    return workers * math.ceil(STREAMS / workers)


def batch_size(train_images: int, workers: int, on_gpu: bool) -> int:
    """64, on GPUs 64 each; halved until an epoch has 20 steps; then the next multiple of the streams."""
    batch = min(MOST_BATCH, BATCH * workers) if on_gpu else BATCH
    while batch > LEAST_BATCH and train_images < STEPS_PER_EPOCH * batch:
        batch //= 2
    return streams(workers) * math.ceil(batch / streams(workers))


def learning_rate(batch: int, pretrained: bool) -> float:
    """AdamW's, in proportion to the square root of the batch, to two digits."""
    return float(f"{LR[pretrained] * math.sqrt(batch / BATCH):.1e}")


def tail_budget_mib(host_bytes: float, workers: int) -> int:
    """The default, or what lets all workers together hold their tails in an eighth of the free memory."""
    steps = int(host_bytes * TAIL_SHARE / workers / 2**20 / TAIL_STEP_MIB)
    return min(TAIL_MIB, TAIL_STEP_MIB * max(1, steps))


def max_damaged(unusable: int, read: int, images: int) -> int:
    """What was found, scaled up where not all images were looked at."""
    return math.ceil(unusable * max(1.0, images / max(1, read)))


def sync_batch_norm(batch: int, workers: int) -> bool:
    """Where a worker alone has too few images for batch norm's statistics."""
    return workers > 1 and batch // workers < IMAGES_FOR_BATCH_NORM


def micro_batch_size(config: Config, network: NetworkSize, machine: Machine) -> int | None:
    """Images of a forward pass, by halves, that fit the device; None = all of the worker's at once."""
    stage, workers = config.stage_one, machine.devices
    images = images_of_largest_worker(stage.batch_size, config.data.streams, workers)
    part = whole = images * stage.views
    while part > 1:
        cut = config.model_copy(update={"stage_one": stage.model_copy(update={"micro_batch_size": part})})
        if device_memory(cut, network, machine, workers, images).total <= machine.memory_bytes:
            break
        part //= 2
    return None if part == whole else part
