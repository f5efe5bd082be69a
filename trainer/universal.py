"""Checkpoints of another number of workers: what ZeRO 1 and 2 have split is put together by DeepSpeed's own converter.

At ZeRO 0 every rank holds everything and nothing is to be done. ZeRO 3 splits the weights themselves; its checkpoints
need the number of workers that wrote them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from trainer.engine import CHECKPOINT_TAG, convert_to_universal

CONVERTIBLE_ZERO_STAGES = (1, 2)


@contextmanager
def universal_checkpoint(folder: Path, mark: str) -> Iterator[Path]:
    """A verified checkpoint in DeepSpeed's universal format, on this machine's disk. Every rank takes part.

    Args:
        folder: The checkpoint, whole.
        mark: Its own, to be found by all ranks of a machine: the first of them converts.
    """
    converted = Path(tempfile.gettempdir()) / f"rarelens-universal-{mark}"
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        if first_here:
            shutil.rmtree(converted, ignore_errors=True)
            converted.mkdir(mode=0o700)  # of nobody else: what is in it will be unpickled
            (converted / CHECKPOINT_TAG).mkdir()
            convert_to_universal(folder / CHECKPOINT_TAG, converted / CHECKPOINT_TAG)
        dist.barrier()
        yield converted
        dist.barrier()
    finally:
        if first_here:
            shutil.rmtree(converted, ignore_errors=True)
