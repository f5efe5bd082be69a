"""What a machine can do, as numbers with their source: the constants under `rarelens plan`.

Compute. A step's arithmetic is not enough to say how fast a network trains: depthwise convolutions and normalisation
wait for memory. The rate of a device is therefore two constants, arithmetic and memory traffic, which add up:

    seconds an image = TRAINING_FLOP_FACTOR * FLOP_forward / flop_per_s
                     + TRAFFIC_PASSES * bytes kept for backward / memory_bytes_per_s

The factor 3 is forward, gradient of the input, gradient of the weights. `TRAFFIC_PASSES` and `UTILISATION` are fitted
to the one published pair that this project could check: ResNet-50 v1.5 at 224 px on an A100 80GB with mixed precision,
2,470 images/s (NVIDIA, DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md, container 21.03).

Messages: ring algorithms in the alpha-beta model. See `trainer/messages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from cluster.config import nearest
from cluster.errors import UserError

TRAINING_FLOP_FACTOR = 3
TRAFFIC_PASSES = 10
"""How often each byte that is kept for backward goes through memory in a step: a convolution writes it, batch norm
reads it twice and writes, the activation reads and writes, and backward does about as much again."""
UTILISATION = 0.4
"""Share of the published peak that GPUs reach in the arithmetic part."""
DECODE_PX = 224
"""Side of the images that `decode_images_per_s_core` is told for; other sizes go by area."""


@dataclass(frozen=True)
class Machine:
    """A kind of machine. Rates are of one device unless the name says otherwise; FLOP count both add and multiply.

    Attributes:
        name: As in `--machine`.
        source: Where the constants are from, and whether they were measured.
        device: `cuda` or `cpu`.
        devices: Workers that a machine has room for.
        cores: Of the machine, which decode images.
        flop_per_s: Precision -> arithmetic that is sustained.
        memory_bytes_per_s: Traffic that is sustained.
        memory_bytes: Of a device.
        runtime_bytes: Taken of it before anything is trained.
        step_overhead_s: Of a step, whatever its batch: kernel launches, optimiser, Python.
        crowded_rate: Rate of a device when all devices of its machine work, as a share of its rate alone.
        decode_images_per_s_core: JPEG to augmented tensor of `DECODE_PX`, one view.
        decodes_on_devices_cores: Decoding takes the time of the cores that compute; else it runs beside the steps.
        link_bytes_per_s: Of a ring inside the machine, each way.
        network_bytes_per_s: Of the machine to others, each way.
        link_latency_s: Of a message inside the machine.
        network_latency_s: Of a message between machines.
        s3_bytes_per_s: Of the machine from and to the bucket.
        disk_bytes_per_s: Of a checkpoint's snapshot, hashing included.
        price_per_h: USD, on demand; spot is often half of it.
        images_per_s: Measured for the configured network; None = by the two constants.
    """

    name: str
    source: str
    device: str
    devices: int
    cores: int
    flop_per_s: Mapping[str, float]
    memory_bytes_per_s: float
    memory_bytes: float
    runtime_bytes: float
    step_overhead_s: float
    crowded_rate: float
    decode_images_per_s_core: float
    decodes_on_devices_cores: bool
    link_bytes_per_s: float
    network_bytes_per_s: float
    link_latency_s: float
    network_latency_s: float
    s3_bytes_per_s: float
    disk_bytes_per_s: float
    price_per_h: float
    images_per_s: float | None = None

    def image_s(self, forward_flop: float, kept_bytes: float, precision: str) -> float:
        """Seconds that forward and backward of one image take on one device whose neighbours are idle.

        Args:
            forward_flop: Of one image.
            kept_bytes: For backward, of one image, in the precision that is trained in.
            precision: `fp32`, `bf16` or `fp16`.
        """
        if self.images_per_s is not None:
            return 1 / self.images_per_s
        arithmetic_s = TRAINING_FLOP_FACTOR * forward_flop / self.flop_per_s[precision]
        return arithmetic_s + TRAFFIC_PASSES * kept_bytes / self.memory_bytes_per_s

    def decode_s(self, image_px: int) -> float:
        """Core seconds that decoding and augmenting one view of one image takes."""
        return (image_px / DECODE_PX) ** 2 / self.decode_images_per_s_core

    def rate_share(self, busy: int) -> float:
        """Rate of a device when `busy` workers run on its machine, as a share of its rate alone.

        Linear between one and all devices; more workers than devices share them.
        """
        if busy > self.devices:
            return self.crowded_rate * self.devices / busy
        if self.devices == 1:
            return 1.0
        return 1.0 - (1.0 - self.crowded_rate) * (busy - 1) / (self.devices - 1)


def machine(name: str) -> Machine:
    """A machine by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in MACHINES:
        raise UserError(f"--machine = {name!r} is not known; {nearest(name, list(MACHINES))}")
    return MACHINES[name]


def _gpu(name: str, instance: str, *, tf32: float, bf16: float, memory: float, gib: int, **rest: float) -> Machine:
    """A GPU machine from its data sheet; `tf32` and `bf16` in dense TFLOP/s, `memory` in GB/s."""
    plain = {
        "name": name,
        "source": f"not measured: data sheets of the GPU and of AWS {instance}, times {UTILISATION} of the peak",
        "device": "cuda",
        "flop_per_s": {
            "fp32": tf32 * 1e12 * UTILISATION,  # PyTorch lets convolutions use TF32
            "bf16": bf16 * 1e12 * UTILISATION,
            "fp16": bf16 * 1e12 * UTILISATION,
        },
        "memory_bytes_per_s": memory * 1e9,
        "memory_bytes": gib * 2**30,
        "runtime_bytes": 1.5 * 2**30,  # assumed: CUDA's context, cuDNN's workspaces, DALI's buffers
        "step_overhead_s": 0.02,  # assumed: some thousand kernel launches from Python at 5 us, and the optimiser
        "crowded_rate": 1.0,
        "decode_images_per_s_core": CPU.decode_images_per_s_core,  # nvJPEG, which takes part of it, is not counted on
        "decodes_on_devices_cores": False,
        "disk_bytes_per_s": 0.5e9,  # assumed: a volume's write rate and SHA-256
        "network_latency_s": 20e-6,
        "link_latency_s": 5e-6,
    }
    return Machine(**{**plain, **rest})  # type: ignore[arg-type]


# What was measured of it, how and under which load: docs/scaling.md.
CPU = Machine(
    name="cpu",
    source="rates measured on two virtual cores of an AMD EPYC, network and price assumed: docs/scaling.md",
    device="cpu",
    devices=2,
    cores=2,
    flop_per_s={"fp32": 97e9, "bf16": 54e9, "fp16": 54e9},
    memory_bytes_per_s=17e9,
    memory_bytes=12 * 2**30,
    runtime_bytes=0.6 * 2**30,
    step_overhead_s=0.01,
    crowded_rate=0.6,
    decode_images_per_s_core=780.0,
    decodes_on_devices_cores=True,
    link_bytes_per_s=1e9,
    network_bytes_per_s=1.25e9,
    link_latency_s=150e-6,
    network_latency_s=200e-6,
    s3_bytes_per_s=90e6,
    disk_bytes_per_s=0.5e9,
    price_per_h=0.10,
)

# Prices: on demand, us-east-1, as AWS listed them in 2025 after its reductions for p4 and p5. Check before you start.
L4 = _gpu(
    "l4", "g6.2xlarge", tf32=60, bf16=121, memory=300, gib=24, devices=1, cores=8, link_bytes_per_s=16e9,
    network_bytes_per_s=0.6e9, s3_bytes_per_s=300e6, price_per_h=0.98,
)  # fmt: skip
A100 = _gpu(
    "a100", "p4d.24xlarge", tf32=156, bf16=312, memory=1555, gib=40, devices=8, cores=96, link_bytes_per_s=240e9,
    network_bytes_per_s=40e9, s3_bytes_per_s=1e9, price_per_h=21.96,
)  # fmt: skip
H100 = _gpu(
    "h100", "p5.48xlarge", tf32=495, bf16=989, memory=3350, gib=80, devices=8, cores=192, link_bytes_per_s=360e9,
    network_bytes_per_s=320e9, s3_bytes_per_s=1e9, price_per_h=55.04,
)  # fmt: skip
MACHINES = {made.name: made for made in (CPU, L4, A100, H100)}


def measured(kind: Machine, images_per_s: float, decode_images_per_s_core: float) -> Machine:
    """The same machine with rates that were measured on it for one network.

    Args:
        kind: What is not measured is taken from it.
        images_per_s: Forward and backward of one worker.
        decode_images_per_s_core: At `DECODE_PX`.
    """
    return replace(
        kind,
        source=f"rates of network and decoder measured here; the rest: {kind.source}",
        images_per_s=images_per_s,
        decode_images_per_s_core=decode_images_per_s_core,
    )


def calibrated(kind: Machine, speed: float, decode_images_per_s_core: float) -> Machine:
    """The same machine, of which one network was timed: any other is taken to run as much faster or slower.

    Args:
        kind: Its constants are scaled.
        speed: Measured images a second of a worker, in units of what the constants say of the same network.
        decode_images_per_s_core: Measured at `DECODE_PX`.
    """
    threads = kind.cores // kind.devices if kind.decodes_on_devices_cores else 1
    return replace(
        kind,
        source="rates of network and decoder measured here",
        flop_per_s={precision: rate * speed for precision, rate in kind.flop_per_s.items()},
        memory_bytes_per_s=kind.memory_bytes_per_s * speed,
        decode_images_per_s_core=decode_images_per_s_core * threads,
    )
