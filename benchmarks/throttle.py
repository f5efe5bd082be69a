"""A TCP proxy that lets so many bytes a second through to its clients, or from them, all of them together.

    python benchmarks/throttle.py HOST:PORT BYTES_PER_S [down|up]

Prints the port that it listens on (loopback), then serves until it is killed. A process of its own, so that it takes
none of the measured process's Python lock.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

BLOCK_BYTES = 16 * 1024


class Budget:
    """Bytes that may pass: they grow at a constant rate, and none are saved up."""

    def __init__(self, bytes_per_s: float):
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = time.monotonic()

    def take(self, size: int) -> None:
        """Wait until `size` more bytes may pass; in the order of asking."""
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            self._free_at = begin + size / self._bytes_per_s
            ready = self._free_at
        time.sleep(max(0.0, ready - time.monotonic()))


def pump(source: socket.socket, target: socket.socket, budget: Budget | None) -> None:
    try:
        while data := source.recv(BLOCK_BYTES):
            if budget is not None:
                budget.take(len(data))
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


def main() -> None:
    host, _, port = sys.argv[1].partition(":")
    budget, uploads = Budget(float(sys.argv[2])), sys.argv[3:] == ["up"]
    up, down = (budget, None) if uploads else (None, budget)
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    while True:
        client, _ = server.accept()
        upstream = socket.create_connection((host, int(port)))
        for arguments in ((client, upstream, up), (upstream, client, down)):
            threading.Thread(target=pump, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
