"""Saves of a checkpoint that are killed after each of their file-system calls; a program of its own, see `main`.

Two ranks write their shares as `trainer.stage_checkpoint` does, and a worker uploads them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from cluster.checkpoint import newest_whole, write_manifest
from cluster.worker import RayWorker

PREVIOUS, NEW = "epoch-0000", "epoch-0001"
WORLD = 2
KILLED = 9  # of kill_after.c
MAX_CALLS = 2000


def write_share(folder: Path, rank: int, seed: int, save: str) -> None:
    """What one rank puts into its snapshot, and last its manifest."""
    tensors = {"weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(seed)), "bias": torch.zeros(8)}
    (folder / "engine").mkdir(parents=True)
    torch.save({"step": seed, "state": tensors}, folder / "engine" / f"zero_pp_rank_{rank}_optim_states.pt")
    save_file(tensors, folder / f"buffers-rank{rank}.safetensors")
    if rank == 0:
        torch.save({"module": tensors}, folder / "engine" / "mp_rank_00_model_states.pt")
        save_file(tensors, folder / "weights.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": seed, "world": WORLD}))
    write_manifest(folder, rank, WORLD, {"step": seed, "save": save})


def save(storage: Path, scratch: Path, name: str, seed: int, order: tuple[int, ...] = (0, 1)) -> None:
    """One whole save: both shares on local disk, then their uploads in `order` of the ranks."""
    for rank in range(WORLD):
        write_share(scratch / str(rank), rank, seed, f"save-{seed}")
    for rank in order:
        worker = RayWorker(rank, WORLD, "cpu", None, str(storage), None)  # type: ignore[arg-type]
        with suppress(RuntimeError):  # after the last file it asks Ray Train, which does not run here, for the place
            worker._upload(SimpleNamespace(path=str(scratch / str(rank))), name)


def digest(folder: Path) -> str:
    """Of all names and bytes below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(path).encode() + path.read_bytes() for path in files)).hexdigest()


def kill_all(root: Path, order: tuple[int, ...], halved: bool) -> list[dict]:
    """What was found after a kill at the first, second, ... call of one save, until one was not killed."""
    storage, scratch = root / "storage", root / "scratch"
    calls = ctypes.CDLL(None)
    whole, found = digest(storage / PREVIOUS), []
    for call in range(1, MAX_CALLS):
        child = os.fork()
        if not child:
            calls.arm(ctypes.c_long(call), int(halved))
            save(storage, scratch, NEW, seed=1, order=order)
            calls.arm(ctypes.c_long(0), 0)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        warnings: list[str] = []
        newest = newest_whole([storage / NEW, storage / PREVIOUS], warnings.append)
        kept = digest(storage / PREVIOUS) == whole
        found.append({"status": status, "newest": newest and newest.name, "warnings": warnings, "kept": kept})
        shutil.rmtree(scratch, ignore_errors=True)
        if call % 10 == 0 and (storage / NEW).exists():  # the run goes on and saves again over what lies there
            save(storage, scratch, NEW, seed=2, order=order)
            again = newest_whole([storage / NEW], warnings.append)
            found[-1]["again"] = again and again.name
            shutil.rmtree(scratch)
        shutil.rmtree(storage / NEW, ignore_errors=True)
        if status != KILLED:
            break
    return found


def main(root: Path) -> None:
    """`LD_PRELOAD=kill_after.so python -m tests.torn_saves ROOT`: writes ROOT/found.json."""
    torch.set_num_threads(1)
    save(root / "storage", root / "scratch", PREVIOUS, seed=0)
    shutil.rmtree(root / "scratch")
    cases = {"0 then 1": ((0, 1), False), "1 then 0, writes cut in half": ((1, 0), True)}
    (root / "found.json").write_text(json.dumps({name: kill_all(root, *case) for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
