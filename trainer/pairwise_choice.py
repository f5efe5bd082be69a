"""Triton or PyTorch: on a GPU the faster of the two, by one timing for each kind of input."""

from __future__ import annotations

import importlib.util
import math
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

MAX_DIM = 256  # a block of anchors and one of the pool, both of wider rows, do not fit on the chip together

# Two timings of the same code differ by as much: Triton's path has to be faster by more.
MIN_GAIN = 1.05

Path = Callable[[Tensor, Tensor], object]

_chosen: dict[tuple[object, ...], bool] = {}


def use_triton(name: str, anchors: Tensor, pool: Tensor, torch_path: Path, triton_path: Path) -> bool:
    """Whether a function takes Triton's path for this kind of input.

    False on the CPU, for other types than float32 and bfloat16, for D over `MAX_DIM` and without Triton. Else both
    paths are timed, forward and backward, on the input itself, and the choice is kept for inputs of the same types and
    of about the same size. A path of Triton's that fails is warned of, and PyTorch's taken.

    Args:
        name: Of the function.
        anchors: [B, D].
        pool: [N, D].
        torch_path: (anchors, pool) -> what the gradient is taken of, or anything where there is none.
        triton_path: Likewise.
    """
    if not is_supported(pool) or not len(anchors):
        return False
    sizes = (len(anchors).bit_length(), len(pool).bit_length(), pool.shape[1])
    needs = (torch.is_grad_enabled(), anchors.requires_grad, pool.requires_grad)
    key = (name, pool.device, pool.dtype, tf32_allowed(), *sizes, *needs)
    if key not in _chosen:
        _chosen[key] = is_faster(lambda: _step(triton_path, anchors, pool), lambda: _step(torch_path, anchors, pool))
    return _chosen[key]


def chosen_paths() -> list[str]:
    """What was chosen so far in this process, a line for each kind of input."""
    return [f"{' '.join(map(str, key))}: {'Triton' if triton else 'PyTorch'}" for key, triton in _chosen.items()]


def is_supported(pool: Tensor) -> bool:
    """Whether there are kernels for this pool."""
    return (
        pool.is_cuda
        and pool.dtype in (torch.float32, torch.bfloat16)
        and pool.shape[1] <= MAX_DIM
        and len(pool) > 0
        and importlib.util.find_spec("triton") is not None
    )


def tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 on a GPU are made in TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def is_faster(candidate: Callable[[], object], other: Callable[[], object]) -> bool:
    """Whether a candidate runs and is clearly faster than the other, by the best of three runs each."""
    try:
        seconds = _seconds(candidate)
    except Exception as error:  # whatever a compiler may raise
        warnings.warn(f"the Triton kernels do not run here, PyTorch's path is taken: {error}", stacklevel=2)
        return False
    return MIN_GAIN * seconds <= _seconds(other)


def _seconds(function: Callable[[], object]) -> float:
    best = math.inf
    for run in range(4):
        _synchronize()
        begin = time.perf_counter()
        function()
        _synchronize()
        if run:  # the first compiles
            best = min(best, time.perf_counter() - begin)
    return best


def _step(path: Path, anchors: Tensor, pool: Tensor) -> None:
    """Forward, and backward where it will be asked for, apart from the caller's graph."""
    anchors, pool = (x.detach().requires_grad_(x.requires_grad) for x in (anchors, pool))
    out = path(anchors, pool)
    if isinstance(out, Tensor) and out.requires_grad:
        out.sum().backward()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
