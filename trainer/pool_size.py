"""What a pool takes of a device's memory, asked before it is allocated: the kernel that kills a run names no setting.

Shapes: N rows of a batch over all ranks and views, M rows of the cross-batch memory, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.errors import UserError

POOL_COPIES = 3
"""Arrays of N + M rows that a step holds at once: the pool, its gradient, and the memory (its next state replaces it
when the gradient is gone)."""


def check_pool_fits(rows: int, dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Refuse a pool that cannot be held, before anything of it is allocated.

    A lower bound: activations, and other processes that share the device's memory, come on top.

    Args:
        rows: N + M.
        dim: D.
        dtype: Of the pool, float32 whatever the network's precision.
        device: Where the pool is.

    Raises:
        UserError: It needs more than there is.
    """
    needed, available = POOL_COPIES * rows * dim * dtype.itemsize, available_bytes(device)
    if needed > available:
        raise UserError(
            f"a pool of {rows:,} rows x {dim} needs {needed / 2**30:,.1f} GiB of {torch.device(device)} memory and "
            f"{available / 2**30:,.1f} GiB are free; lower stage_one.memory.rows or stage_one.batch_size"
        )


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """A step that a GPU's memory does not hold is the configuration's mistake: a restart would not mend it.

    Raises:
        UserError: PyTorch ran out of the GPU's memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"a step does not fit into the GPU's memory ({str(error).partition('. GPU')[0]}); set "
            f"stage_one.micro_batch_size (the pool stays that of the whole batch), model.checkpoint_activations: true, "
            f"or a smaller stage_one.batch_size"
        ) from error


def available_bytes(device: torch.device | str, root: Path = Path("/")) -> int:
    """Memory that can be allocated on a device now, in bytes.

    Args:
        device: On a CPU: what the kernel can give without swapping, or what the container's limit leaves of it.
        root: Where `proc` and `sys` are.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator has taken and holds empty is there for it, too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024  # "kB" is KiB there
    group = root / "sys/fs/cgroup"
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").is_file() else "max"
    if limit != "max":
        available = min(available, int(limit) - int((group / "memory.current").read_text()))
    return available
