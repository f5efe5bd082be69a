"""One worker in the calling process, without Ray Train: for trials of a search, each of which trains on its own.

`SoloWorker` is a `cluster.launch.Worker`, so that the functions which `run_workers` runs on many workers run here on
one. It keeps its checkpoints itself, in a folder or bucket of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.checkpoint import MANIFEST_FILE, newest_whole
from cluster.launch import keep_freed_memory
from cluster.snapshots import remove_dead_snapshots
from cluster.storage import Storage
from cluster.worker import Worker

CHECKPOINTS = "checkpoints"


class SoloWorker(Worker):
    """Rank 0 of 1.

    Args:
        device: `cuda` or `cpu`.
        storage: Where its checkpoints go, below `checkpoints/`.
        on_report: Called with the metrics and the local folder of each checkpoint before it is kept: where this is cut
            short, the trial goes on from the checkpoint before, and comes by here again.
        on_kept: Called once it is kept.
    """

    def __init__(
        self,
        device: str,
        storage: Storage,
        on_report: Callable[[dict[str, Any], Path], None],
        on_kept: Callable[[], None] = lambda: None,
    ):
        super().__init__(rank=0, world=1, device=device)
        self._storage, self._on_report, self._on_kept = storage, on_report, on_kept
        remove_dead_snapshots()

    def tell(self, message: dict[str, Any]) -> None:
        """Nobody listens: a trial says what it has to say by its score."""

    @contextmanager
    def checkpoint(self) -> Iterator[Path | None]:
        """The newest whole checkpoint as a local folder, or None where there is none."""
        with self.snapshot() as scratch:
            for name in sorted(self._names(), reverse=True):
                folder = scratch / name
                for stored in self._storage.list(f"{CHECKPOINTS}/{name}/"):
                    self._storage.download(stored.path, folder / stored.path.removeprefix(f"{CHECKPOINTS}/{name}/"))
                whole = newest_whole([folder])
                if whole is not None:
                    yield whole
                    return
            yield None

    def report(self, metrics: dict[str, float], folder: Path, name: str) -> None:
        """Keep `folder` as the newest checkpoint, its manifest last, and drop the ones before it."""
        self._on_report(metrics, folder)
        name = f"{int(metrics['step']):08d}-{name}"  # so that the order of names is that of time
        older = self._names() - {name}
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST_FILE):
            self._storage.upload(path, f"{CHECKPOINTS}/{name}/{path.relative_to(folder).as_posix()}")
        for stored in [stored for gone in older for stored in self._storage.list(f"{CHECKPOINTS}/{gone}/")]:
            self._storage.delete(stored.path)
        self._on_kept()

    def _names(self) -> set[str]:
        return {stored.path.split("/")[1] for stored in self._storage.list(f"{CHECKPOINTS}/")}


@contextmanager
def solo_process_group(device: str) -> Iterator[None]:
    """A process group of this process alone, without a port, so that code written for many ranks runs as it is."""
    import torch.distributed as dist

    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    # ninja, for DeepSpeed
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        keep_freed_memory()
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
