"""An HTTP server that stands before the S3 server of the tests and spoils what passes through, as planned."""

from __future__ import annotations

import http.client
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Fault = Callable[["Handler"], None]


class Proxy(ThreadingHTTPServer):
    """Passes requests on to `upstream`; while `faults` lasts, its first element answers instead, else `rule`."""

    daemon_threads = True

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.rule: Fault = pass_on
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Cut connections are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_one(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers.get("Range")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        (self.server.faults.pop(0) if self.server.faults else self.server.rule)(self)

    @property
    def is_whole_shard(self) -> bool:
        return self.command == "GET" and self.path.endswith(".tar") and not self.headers.get("Range")

    @property
    def is_part_of_shard(self) -> bool:
        return self.command == "GET" and self.path.endswith(".tar") and bool(self.headers.get("Range"))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_one

    def ask(self) -> tuple[http.client.HTTPResponse, bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream)
        headers = {k: v for k, v in self.headers.items() if k not in ("Expect", "Connection")}
        upstream.request(self.command, self.path, self.body, headers)
        answer = upstream.getresponse()
        return answer, answer.read()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """End the connection by RST instead of FIN: what the other side reads next is ECONNRESET."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # on, 0 seconds
        os.close(self.connection.detach())  # now: the files of this handler would keep it open

    def log_message(self, *_: object) -> None:
        pass


def pass_on(handler: Handler) -> None:
    answer, body = handler.ask()
    handler.answer(
        answer.status, [h for h in answer.getheaders() if h[0] not in ("Connection", "Server", "Date")], body
    )


def half_a_body(handler: Handler, before_it: Callable[[], object] = lambda: None) -> None:
    """Half of an answer, which was whole before `before_it` was called."""
    _answer_half(handler, before_it)
    handler.cut()


def half_a_body_and_reset(handler: Handler) -> None:
    """Half of an answer, then the connection is reset."""
    _answer_half(handler)
    handler.reset()


def no_answer(handler: Handler) -> None:
    handler.cut()


def reset(handler: Handler) -> None:
    """The connection is reset before a word of an answer."""
    handler.reset()


class Frozen:
    """No request is answered, none is cut off, until it thaws: then all are."""

    def __init__(self) -> None:
        self._thawed = threading.Event()

    def __call__(self, handler: Handler) -> None:
        self._thawed.wait()
        handler.cut()

    def thaw(self) -> None:
        self._thawed.set()


def lost_answer(handler: Handler) -> None:
    """The request is carried out, but nobody hears of it."""
    handler.ask()
    handler.cut()


DENIED: dict[str, Callable[[Handler], bool]] = {
    "written": lambda asked: asked.command == "PUT",
    "read": lambda asked: asked.command == "GET" and "list-type" not in asked.path,
    "listed": lambda asked: asked.command == "GET" and "list-type" in asked.path,
    "deleted": lambda asked: asked.command == "DELETE",
}
"""Requests of which each permission has to do, by what could not be done without it."""


def refusal(status: int, code: str) -> Fault:
    def refuse(handler: Handler) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        handler.answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    return refuse


def _answer_half(handler: Handler, before_it: Callable[[], object] = lambda: None) -> None:
    answer, body = handler.ask()
    before_it()
    handler.answer(answer.status, [h for h in answer.getheaders() if h[0] != "Connection"], body[: len(body) // 2])


@contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
