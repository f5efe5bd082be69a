"""What this very machine has: cores, GPUs and memory, as `trainer/machine.py` describes machines."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

import torch

from trainer.machine import CPU, L4, MACHINES, Machine
from trainer.pool_size import available_bytes

MAX_CPU_WORKERS = 8
"""More workers than this gain little on one machine: further cores go to each worker's own threads."""
CPU_WORKER_BYTES = 1.5 * 2**30
"""A worker's imports, a small network and its batch; seen are .6 to 1.4 GiB."""


@dataclass(frozen=True)
class ThisMachine:
    """This machine, with a device a worker.

    Attributes:
        machine: Its constants: those of its kind until they are measured.
        host_bytes: Memory of the machine, as far as it is free.
        known: Whether the constants are of this kind of GPU; those of CPUs are of one kind of core.
    """

    machine: Machine
    host_bytes: float
    known: bool = True


def this_machine() -> ThisMachine:
    """Look at this machine."""
    cores, host_bytes = len(os.sched_getaffinity(0)), float(available_bytes("cpu"))
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return gpu_machine(gpu.name, gpu.total_memory, torch.cuda.device_count(), cores, host_bytes)
    return cpu_machine(cores, host_bytes)


def gpu_machine(name: str, gpu_bytes: float, gpus: int, cores: int, host_bytes: float) -> ThisMachine:
    """A machine with GPUs: its kind by the GPU's name, else an L4, the slowest that is known."""
    kind = next((k for k in MACHINES.values() if k.device == "cuda" and re.search(rf"\b{k.name}\b", name, re.I)), None)
    made = replace(kind or L4, name=name, devices=gpus, cores=cores, memory_bytes=float(gpu_bytes))
    return ThisMachine(made, host_bytes, known=kind is not None)


def cpu_machine(cores: int, host_bytes: float) -> ThisMachine:
    """A machine without GPUs: a worker a core, as far as the memory reaches, and no more than `MAX_CPU_WORKERS`."""
    workers = max(1, min(cores, MAX_CPU_WORKERS, int(host_bytes // CPU_WORKER_BYTES)))
    threads = max(1, cores // workers)
    made = replace(
        CPU,
        name=f"{cores} cores",
        devices=workers,
        cores=cores,
        flop_per_s={precision: rate * threads for precision, rate in CPU.flop_per_s.items()},
        memory_bytes_per_s=CPU.memory_bytes_per_s * threads,
        decode_images_per_s_core=CPU.decode_images_per_s_core * threads,
        memory_bytes=host_bytes / workers,
    )
    return ThisMachine(made, host_bytes)
