"""Threads or processes, one a core, that read images.

Pillow decodes, resizes and encodes without Python's lock, but headers, hash and moments hold it: 0.27 ms of the 0.64 ms
that a JPEG of 224 px takes. Threads therefore gain nothing beyond two or three cores, up to which they are ahead (by
an eighth on two), and large work on more cores goes to processes. These are spawned, not forked, since whoever packs
may run threads.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from cluster.errors import UserError

AHEAD_PER_WORKER = 2
"""Tasks under way or done and not yet fetched: with the size of a task this bounds the memory."""
WORTH_A_PROCESS = 400
"""Images for which a process, half a second to start, pays."""
MAX_THREADS = 2
"""Cores up to which threads are as fast."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class ImageWorkers:
    """A pool of threads or, for large work on many cores, of processes; to be closed, best by `with`."""

    def __init__(self, num_images: int, cores: int | None = None):
        """Nothing is started before the first task.

        Args:
            num_images: How many images there are to read.
            cores: None = those that this process may use.
        """
        cores = cores or len(os.sched_getaffinity(0))
        processes = min(cores, num_images // WORTH_A_PROCESS)
        self.processes = processes if processes > MAX_THREADS else 0
        """0 = threads do it."""
        self.workers = self.processes or min(cores, MAX_THREADS)
        self._pool: Executor | None = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks, never more than a few tasks ahead of whoever takes them.

        Args:
            function: Of a module, so that it can be sent.
            tasks: Small to pickle, and so should be the results.

        Raises:
            UserError: A process was killed from outside, as the system does when memory runs out.
        """
        pool = self._started()
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > AHEAD_PER_WORKER * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "a process that reads images ended: killed, by the system if memory ran out, or started from a script "
                "without `if __name__ == '__main__':`; what is packed is kept, and packing again goes on from there"
            ) from None
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Stop the workers, without waiting for tasks that have not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> ImageWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Executor:
        if self._pool is None and self.processes:
            self._pool = ProcessPoolExecutor(self.processes, get_context("spawn"), initializer=_begin)
        elif self._pool is None:
            self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="images")
        return self._pool


def _begin() -> None:
    """Leave Ctrl-C to the parent, and go when it goes: the pool's own pipes do not tell when it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
