"""Stage one on paper: speed, traffic, memory, checkpoints, time and cost for any number of workers.

A pure function of the configuration, the sizes of data and network, and a machine's constants. The global batch stays
as configured (strong scaling). Where workers have parts of different size, the largest sets the pace. What is hidden in
a real run is counted in full: messages do not overlap with backward, and no step is faster than its decoding.

W workers, B images a step over all of them, V views, S canonical streams, P trained numbers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.stream import WINDOW_SHARDS
from trainer.config import StageOneConfig, TrainerConfig
from trainer.machine import TRAINING_FLOP_FACTOR, Machine
from trainer.messages import FLOAT_BYTES, INT64_BYTES, Messages, Ring, step_messages
from trainer.network_size import NetworkSize
from trainer.pool_size import POOL_COPIES

TABLE_WORKERS = (1, 2, 4, 8, 16, 64, 256, 1024)
START_S = 20.0
"""Ray's worker group and the workers' imports, seen on two cores (8 s and 5 s), with some room."""
OPTIMISER_SLOTS = {"adamw": 2, "lamb": 2, "sgd": 1, "deepspeed": 2}
"""Numbers that an optimiser keeps of each trained one; DeepSpeed's own are taken for Adams."""
BUCKET_NUMBERS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`; at ZeRO 1 and 2 a buffer of that size is allocated in each step."""


@dataclass(frozen=True)
class DataSize:
    """Of the packed dataset."""

    train_images: int
    val_images: int
    num_classes: int
    body_bytes: float
    tail_bytes: float
    val_bytes: float


@dataclass(frozen=True)
class Memory:
    """Of one device, in bytes."""

    weights: float
    gradients: float
    optimiser: float
    moving_average: float
    activations: float
    pool: float
    message_buffers: float
    runtime: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Prediction:
    """Of one number of workers. `_s` are seconds, `_h` hours, `_usd` US dollars; images are counted without views.

    `s3_*` are of all machines together; `snapshot_s` stops the step loop, `upload_s` does not.
    """

    workers: int
    machines: int
    images_per_worker: int
    images_per_s: float
    step_s: float
    compute_s: float
    decode_s: float
    messages: Messages
    steps_per_epoch: int
    epoch_s: float
    validation_s: float
    s3_first_epoch_bytes: float
    s3_later_epoch_bytes: float
    s3_bytes_per_s: float
    memory: Memory
    checkpoint_bytes: float
    snapshot_s: float
    upload_s: float
    wall_h: float
    cost_usd: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values, the memory's total among them."""
        values = asdict(self)
        values["memory"]["total"] = self.memory.total
        return values


def predict(
    config: TrainerConfig,
    data: DataSize,
    network: NetworkSize,
    machine: Machine,
    workers: int,
    machines: int | None = None,
) -> Prediction:
    """What stage one costs on so many workers.

    Args:
        config: The configuration; its `cluster.workers` is not looked at.
        data: Of the packed dataset.
        network: Of the configured network.
        machine: Of which there are as many as are needed.
        workers: W.
        machines: How many there are, if the workers are to share fewer than they need; None = as many as needed.
    """
    stage = config.stage_one
    machines = machines or math.ceil(workers / machine.devices)
    busy = math.ceil(workers / machines)
    images = images_of_largest_worker(stage.batch_size, config.data.streams, workers)
    image_s = machine.image_s(network.forward_flop, kept_bytes(network, stage), stage.precision)
    share = machine.rate_share(busy)
    messages = step_messages(stage, ring_of(machine, workers, machines), images, network.dim, network.parameters)
    compute_s = images * stage.views * image_s / share
    decode_s = images * stage.views * machine.decode_s(config.data.image_px) * busy / machine.cores
    if machine.decodes_on_devices_cores:  # one core a worker, which does the one after the other
        decode_s = images * stage.views * machine.decode_s(config.data.image_px) / share
        step_s = compute_s + decode_s + messages.step_s + machine.step_overhead_s / min(share, 1.0)
    else:
        step_s = max(compute_s + messages.step_s + machine.step_overhead_s, decode_s)
    steps = max(1, data.train_images // stage.batch_size)
    first_bytes, later_bytes = s3_epoch_bytes(config, data, machines)
    slowest_link_s = first_bytes / machines / machine.s3_bytes_per_s
    first_epoch_s = max(steps * step_s, slowest_link_s)
    validation_s = math.ceil(data.val_images / workers) * image_s / TRAINING_FLOP_FACTOR / share
    checkpoint, largest_rank, largest_machine = checkpoint_sizes(stage, network, workers, min(busy, workers))
    snapshot_s = largest_rank / machine.disk_bytes_per_s
    upload_s = largest_machine / machine.s3_bytes_per_s
    later_s = (stage.epochs - 1) * max(steps * step_s, later_bytes / machines / machine.s3_bytes_per_s)
    once_s = START_S + first_epoch_s + later_s + stage.epochs * (validation_s + snapshot_s) + upload_s
    wall_h = once_s * (2 if config.evaluation.baseline else 1) / 3600
    memory = device_memory(config, network, machine, workers, images)
    return Prediction(
        workers=workers,
        machines=machines,
        images_per_worker=images,
        images_per_s=stage.batch_size / step_s,
        step_s=step_s,
        compute_s=compute_s,
        decode_s=decode_s,
        messages=messages,
        steps_per_epoch=steps,
        epoch_s=steps * step_s,
        validation_s=validation_s,
        s3_first_epoch_bytes=first_bytes,
        s3_later_epoch_bytes=later_bytes,
        s3_bytes_per_s=first_bytes / first_epoch_s,
        memory=memory,
        checkpoint_bytes=checkpoint,
        snapshot_s=snapshot_s,
        upload_s=upload_s,
        wall_h=wall_h,
        cost_usd=wall_h * machines * machine.price_per_h,
        notes=_notes(config, machine, workers, memory, slowest_link_s > steps * step_s),
    )


def images_of_largest_worker(batch_size: int, streams: int, workers: int) -> int:
    """Images a step of the worker that has most; with more workers than streams, as if there were enough streams."""
    if workers > streams:
        return math.ceil(batch_size / workers)
    return math.ceil(streams / workers) * (batch_size // streams)


def kept_bytes(network: NetworkSize, stage: StageOneConfig) -> float:
    """What backward keeps of an image: half under mixed precision, where nearly all of it is in 16 bits."""
    return network.kept_bytes / (1 if stage.precision == "fp32" else 2)


def ring_of(machine: Machine, workers: int, machines: int) -> Ring:
    """The ring over all workers: inside a machine, or as fast as the network between machines.

    Over several machines each machine's network carries the ring's bytes once: NCCL lays as many rings as it needs.
    """
    if machines == 1:
        return Ring(workers, machine.link_bytes_per_s, machine.link_latency_s)
    return Ring(workers, min(machine.link_bytes_per_s, machine.network_bytes_per_s), machine.network_latency_s)


def s3_epoch_bytes(config: TrainerConfig, data: DataSize, machines: int) -> tuple[float, float]:
    """Bytes that all machines read from the bucket in the first epoch, and on average in each later one.

    The tail and, over all machines, val are read once. Each machine reads its part of the body and, since shards are
    shuffled in windows, up to a window more. Parts change with the epoch: after e epochs a machine's cache holds
    1 - (1 - 1/M)^e of the body, as far as it is large enough.
    """
    first_of_body = min(machines * data.body_bytes, data.body_bytes + machines * WINDOW_SHARDS * _shard(config))
    if not data.body_bytes:
        first_of_body = 0.0
    first = machines * data.tail_bytes + first_of_body + data.val_bytes
    epochs = config.stage_one.epochs
    if epochs == 1:
        return first, 0.0
    room = min(1.0, config.data.cache_gib * 2**30 / max(data.body_bytes, 1))
    unread = [max((1 - 1 / machines) ** epoch, 1 - room) for epoch in range(1, epochs)]
    return first, first_of_body * sum(unread) / (epochs - 1)


def device_memory(config: TrainerConfig, network: NetworkSize, machine: Machine, workers: int, images: int) -> Memory:
    """What training takes of a device. The engine keeps weights and gradients in float32 whatever the precision.

    Args:
        config: The configuration.
        network: Of the configured network.
        machine: Its runtime takes memory too.
        workers: W.
        images: Of this worker in a step, views not counted.
    """
    stage, whole = config.stage_one, network.parameters * FLOAT_BYTES
    part = whole / workers
    passed = min(images * stage.views, stage.micro_batch_size or images * stage.views)
    rows = workers * images * stage.views + stage.memory.rows if stage.loss.name != "none" else 0
    sharded = stage.zero_stage > 0
    bucket = stage.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET_NUMBERS) * FLOAT_BYTES
    return Memory(
        weights=(part if stage.zero_stage == 3 else whole) + network.buffer_bytes,
        gradients=part if stage.zero_stage >= 2 else whole,
        # ZeRO's optimiser has its part of the weights once more.
        optimiser=(OPTIMISER_SLOTS[stage.optimiser.name] + sharded) * (part if sharded else whole),
        moving_average=whole - network.of_loss * FLOAT_BYTES + network.buffer_bytes if stage.ema_decay else 0.0,
        activations=passed * kept_bytes(network, stage),
        pool=POOL_COPIES * rows * network.dim * FLOAT_BYTES,
        message_buffers=bucket if sharded else min(whole, bucket) * (workers > 1),
        runtime=machine.runtime_bytes,
    )


def checkpoint_sizes(
    stage: StageOneConfig, network: NetworkSize, workers: int, workers_of_machine: int
) -> tuple[float, float, float]:
    """Bytes of a whole checkpoint, of what rank 0 writes of it, and of what its machine uploads.

    Rank 0 writes the network twice: for later steps and for DeepSpeed. The optimiser's states lie with the latter; with
    ZeRO every rank writes its part of them and of the float32 weights.
    """
    model = (network.parameters - network.of_loss) * FLOAT_BYTES + network.buffer_bytes
    whole = network.parameters * FLOAT_BYTES
    slots = OPTIMISER_SLOTS[stage.optimiser.name] * whole
    of_memory = stage.memory.rows * (network.dim * FLOAT_BYTES + INT64_BYTES)
    for_later, for_engine = model + of_memory, whole + network.buffer_bytes
    if stage.zero_stage == 0:
        total = for_later + for_engine + slots
        return total, total, total
    of_rank_0 = for_later + (for_engine if stage.zero_stage < 3 else network.buffer_bytes)
    part = (slots + whole) / workers
    return of_rank_0 + workers * part, of_rank_0 + part, of_rank_0 + workers_of_machine * part


def _shard(config: TrainerConfig) -> float:
    return config.data.shard_mib * 2**20


def _notes(
    config: TrainerConfig, machine: Machine, workers: int, memory: Memory, waits_for_bucket: bool
) -> tuple[str, ...]:
    """What is wrong with this number of workers, each with its remedy."""
    batch, streams, notes = config.stage_one.batch_size, config.data.streams, []
    if workers > batch:
        notes.append(f"{workers - batch} of the workers have no image: raise stage_one.batch_size to {workers} or more")
    elif workers > streams:
        notes.append(f"more than data.streams = {streams}: set data.streams={workers}")
    elif streams % workers:
        notes.append(f"data.streams = {streams} is no multiple of {workers}: parts differ, some workers wait")
    if memory.total > machine.memory_bytes:
        notes.append("does not fit: set stage_one.micro_batch_size, zero_stage or model.checkpoint_activations")
    if waits_for_bucket:
        notes.append("the first epoch waits for the bucket")
    return tuple(notes)
