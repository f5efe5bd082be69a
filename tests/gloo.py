"""Run a function on W real processes that talk through gloo on loopback.

The processes are forked from a server that has imported torch and timm and done nothing else: the first call in a
session costs that import, later ones a tenth of a second a process. (Forking pytest itself would copy its threads.)
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TIMEOUT_S = 120


def run_gloo(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Call `function(rank, world, *args)` on each rank of a process group; return the results in rank order.

    `function` is a module-level function; arguments and results are pickled. A rank that raises fails the call with its
    traceback, and the others, which may be waiting for it, are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "numpy", "timm"])
    with TemporaryDirectory(prefix="rarelens-gloo-") as folder:
        workers, results = {}, {}
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            payload = pickle.dumps((function, args))
            process = context.Process(target=_worker, args=(rank, world, folder, sender, payload), daemon=True)
            process.start()
            sender.close()
            workers[receiver] = (rank, process)
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while len(results) < world:
                waiting: list[Any] = [r for r, (rank, _) in workers.items() if rank not in results]
                ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise AssertionError(f"ranks {sorted(set(range(world)) - set(results))} not done in {TIMEOUT_S} s")
                # The rank at fault speaks before those that lose their peer by it: all that is there is shown.
                reports = {workers[receiver][0]: _receive(receiver) for receiver in ready}
                failures = [
                    f"rank {rank} failed:\n{text}" for rank, (succeeded, text) in reports.items() if not succeeded
                ]
                if failures:
                    raise AssertionError("\n".join(failures))
                results |= {rank: value for rank, (_, value) in reports.items()}
        finally:
            for receiver, (_, process) in workers.items():
                if len(results) < world:
                    process.kill()
                process.join(10)
                receiver.close()
    return [results[rank] for rank in range(world)]


def _receive(receiver: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(receiver.recv_bytes())
    except EOFError:
        return False, "it died without a word"


def _worker(rank: int, world: int, folder: str, sender: Connection, payload: bytes) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(payload)
        dist.init_process_group(
            "gloo",
            init_method=(Path(folder) / "rendezvous").as_uri(),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )
        message = (True, function(rank, world, *args))
    except Exception:
        message = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    if message[0]:
        dist.destroy_process_group()
