"""The part of `pool.py` for a GPU: a million pool rows, beside three bare matrix products at the measured rate."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.common import quiet_time
from benchmarks.pool import LOSSES, inputs, step
from trainer import pairwise_choice

DEVICE = "cuda"
RATE_SIZE = 8192  # of the square product that shows what the matrix units do
KINDS = {"bfloat16": torch.bfloat16, "tf32": torch.float32}


def gpu_figures(num_anchors: int, num_rows: int, dim: int, rounds: int = 10) -> dict[str, float | str]:
    """Time and extra memory of forward + backward, for bfloat16 and for float32 multiplied as TF32.

    "Products at the rate": the seconds that 3 * 2 * B * N * D operations take at the rate measured with a large square
    product. "Products": three products B x N x D run one after the other, the pool in parts, since B x N does not fit.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    figures: dict[str, float | str] = {"gpu": torch.cuda.get_device_name(), "gpu_rows": num_rows}
    for kind, dtype in KINDS.items():
        rate = matrix_rate(dtype)
        at_rate = 3 * 2 * num_anchors * num_rows * dim / rate
        figures |= {f"gpu_matrix_tflops_{kind}": rate / 1e12, f"gpu_seconds_products_at_rate_{kind}": at_rate}
        data = inputs(num_anchors, num_rows, dim, DEVICE, dtype)
        for loss in LOSSES:
            run = step("ours", loss, data)
            first = extra_bytes(run)  # compiles, and times both paths to choose one
            data[0].grad = data[2].grad = None
            extra = extra_bytes(run)
            seconds = quiet_time({"ours": synchronised(run), "products": products(data[0], data[2])}, rounds)
            name = f"{loss}_{kind}"
            figures |= {f"gpu_extra_bytes_{name}": extra, f"gpu_extra_bytes_first_step_{name}": first}
            figures[f"gpu_seconds_{name}"] = seconds.best("ours")
            figures[f"gpu_time_ratio_{name}"] = seconds.best("ours") / at_rate
            figures[f"gpu_products_ratio_{name}"] = seconds.ratio("ours", "products")
            print(
                f"{name:20}{1e3 * seconds.best('ours'):8.2f} ms, {figures[f'gpu_time_ratio_{name}']:.2f} x products at "
                f"{rate / 1e12:.0f} TFLOP/s, {extra / 1e6:.0f} MB extra"
            )
    figures["gpu_paths"] = "; ".join(pairwise_choice.chosen_paths())
    return figures


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product, the best of several."""
    left, right = torch.randn(2, RATE_SIZE, RATE_SIZE, device=DEVICE).to(dtype)
    out = torch.empty_like(left)
    best = min(seconds_of(lambda: torch.mm(left, right, out=out)) for _ in range(10))
    return 2 * RATE_SIZE**3 / best


def seconds_of(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def extra_bytes(function: Callable[[], object]) -> int:
    """Peak of what PyTorch's CUDA allocator handed out during the call, over what it held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        function()
        torch.cuda.synchronize()

    return run


def products(anchors: torch.Tensor, pool: torch.Tensor, width: int = 65_536) -> Callable[[], None]:
    anchors, pool = anchors.detach(), pool.detach()
    grad_anchors, grad_pool = torch.zeros_like(anchors), torch.empty_like(pool)
    similarity = torch.empty(len(anchors), width, dtype=pool.dtype, device=pool.device)

    def run() -> None:
        for start in range(0, len(pool), width):
            block = pool[start : start + width]
            part = similarity[:, : len(block)]
            torch.mm(anchors, block.T, out=part)
            grad_anchors.addmm_(part, block)
            torch.mm(part.T, anchors, out=grad_pool[start : start + width])

    return synchronised(run)
