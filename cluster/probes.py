"""Small programs that try a heavy library, each in a process of its own.

A library that crashes on this machine must not take `rarelens doctor` with it. Each program prints one line, what it
found, or ends with a message.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

TIMEOUT_S = 120.0  # the first import of torch from a cold disk

_TORCH = """
import shutil, sys, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
if not count and shutil.which("nvidia-smi"):
    sys.exit(f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU")
gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
print(names or "none: training runs on the CPU")
"""

_DALI = """
import io, sys, numpy as np
from PIL import Image
from nvidia.dali import fn, pipeline_def
jpeg = io.BytesIO()
Image.new("RGB", (16, 8), (200, 100, 50)).save(jpeg, "JPEG", quality=95)
@pipeline_def(batch_size=1, num_threads=1, device_id=None)
def graph():
    encoded = fn.external_source(source=lambda: [np.frombuffer(jpeg.getvalue(), np.uint8)])
    return fn.decoders.image(encoded, device="cpu")
pipeline = graph()
pipeline.build()
image = np.asarray(pipeline.run()[0].at(0))
if image.shape != (8, 16, 3) or np.abs(image.mean((0, 1)) - (200, 100, 50)).max() > 4:
    sys.exit("a wrong picture was decoded")
print("decodes a JPEG on the CPU")
"""

_DEEPSPEED = """
import deepspeed
print(f"imports, accelerator {deepspeed.accelerator.get_accelerator().device_name()}")
"""

_RAY_CLUSTER = """
import logging, ray
ray.init(address="auto", logging_level=logging.ERROR, log_to_driver=False)
alive, has = sum(node["Alive"] for node in ray.nodes()), ray.cluster_resources()
print(f"machines: {alive}, cores: {has.get('CPU', 0):g}, GPUs: {has.get('GPU', 0):g}")
"""

PROBES = {"GPU": _TORCH, "DALI": _DALI, "DeepSpeed": _DEEPSPEED, "Ray cluster": _RAY_CLUSTER}


def run_probe(name: str, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """Run one of `PROBES`. Returns whether it ended well, and its last line or what became of it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if shutil.which("nvidia-smi") is None:
        environment["DS_ACCELERATOR"] = "cpu"
    try:
        result = subprocess.run(
            [sys.executable, "-c", PROBES[name]],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return False, f"did not answer within {timeout_s:.0f} s"
    if result.returncode < 0:
        return False, f"crashed with signal {-result.returncode}"
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else "said nothing"
