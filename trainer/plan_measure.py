"""`rarelens plan --measure`: rates of this machine, in some seconds: the configured network, the decoder."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from cluster.errors import UserError
from cluster.launch import keep_freed_memory
from data_pipeline.augment import draw_views
from data_pipeline.config import DataConfig
from data_pipeline.decode import Decoder, DecoderSettings
from data_pipeline.graph import ImageSettings
from trainer.config import TrainerConfig
from trainer.engine import AUTOCAST_DTYPES
from trainer.machine import DECODE_PX, Machine, calibrated, measured
from trainer.model import build_model
from trainer.network_size import network_size
from trainer.plan import kept_bytes

MEASURED_S = 3.0
BATCH = {"cpu": 16, "cuda": 128}
DECODED_IMAGES = 64
JPEG_QUALITY = 92


def measure(config: TrainerConfig, kind: Machine, num_classes: int) -> Machine:
    """The machine with the rates of this one.

    Args:
        config: The configuration; images are decoded at its size with its augmentation.
        kind: What is not measured is taken from it; its device is where the network runs.
        num_classes: C.

    Raises:
        UserError: The machine to plan for has GPUs and this one has none.
    """
    if kind.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"--measure: machines of kind {kind.name} have GPUs, and PyTorch sees none here; measure on such a "
            f"machine, or plan for this one with --machine=cpu"
        )
    threads = max(1, kind.cores // kind.devices)
    return measured(kind, network_rate(config, kind.device, num_classes, threads), decode_rate(config.data))


def calibrate(config: TrainerConfig, kind: Machine, num_classes: int) -> Machine:
    """The machine with constants scaled to what one network reaches here, so that others can be predicted from it.

    Args:
        config: Its network is timed, and the decoder at its size with its augmentation.
        kind: This machine by the constants of its kind.
        num_classes: C.
    """
    network, stage = network_size(config, num_classes), config.stage_one
    predicted = 1 / kind.image_s(network.forward_flop, kept_bytes(network, stage), stage.precision)
    reached = network_rate(config, kind.device, num_classes, max(1, kind.cores // kind.devices))
    return calibrated(kind, reached / predicted, decode_rate(config.data))


def network_rate(config: TrainerConfig, device: str, num_classes: int, threads: int = 1) -> float:
    """Images a second through forward and backward of the configured network on one device.

    On a CPU core seconds are counted, shared out over the threads, so that other processes hardly count.

    Args:
        config: The configuration.
        device: `cuda` or `cpu`.
        num_classes: C.
        threads: Of a worker, on a CPU.
    """
    dtype, px, batch = AUTOCAST_DTYPES[config.stage_one.precision], config.data.image_px, BATCH[device]
    threads_before = torch.get_num_threads()
    if device == "cpu":
        keep_freed_memory()  # as the workers do
        torch.set_num_threads(threads)
    model = build_model(config.model.model_copy(update={"weights": None}), num_classes, px).to(device)
    images = torch.randn(batch, 3, px, px, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(images)
        (output.logits.sum() + output.embeddings.sum()).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        if device == "cpu":
            return batch * threads / shortest_s(step, time.process_time)
        return batch / shortest_s(step)
    finally:
        torch.set_num_threads(threads_before)


def decode_rate(data: DataConfig) -> float:
    """Images of `DECODE_PX` a second and core through decoder and augmentation, other sizes taken by area.

    Core seconds are counted, of all of DALI's threads, so that other processes hardly count. Always on the CPU.
    """
    pack_px, px = data.pack_px or data.image_px, data.image_px
    drawn = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    width = pack_px * 4 // 3
    Image.fromarray(drawn).resize((width, pack_px), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=JPEG_QUALITY)
    encoded = [np.frombuffer(buffer.getvalue(), dtype=np.uint8)] * DECODED_IMAGES
    sizes = np.full(DECODED_IMAGES, width), np.full(DECODED_IMAGES, pack_px)
    views = draw_views(data.augment, px, (0, 0), np.arange(DECODED_IMAGES), 1, sizes)
    image = ImageSettings(px, data.resize_ratio, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    decoder = Decoder(DecoderSettings(image, DECODED_IMAGES, torch.device("cpu"), threads=1, augment=data.augment))

    def batch() -> None:
        decoder.submit(encoded, views)
        decoder.result()

    per_image_s = shortest_s(batch, time.process_time) / DECODED_IMAGES
    decoder.close()
    return (px / DECODE_PX) ** 2 / per_image_s


def shortest_s(function: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Of the calls that some seconds have room for, after two to warm up: what the code takes when nothing else runs.

    Args:
        function: What is timed.
        clock: In seconds.
    """
    function()
    function()
    shortest, end = float("inf"), time.perf_counter() + MEASURED_S
    while time.perf_counter() < end:
        begin = clock()
        function()
        shortest = min(shortest, clock() - begin)
    return shortest
