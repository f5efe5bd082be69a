"""Secrets that a run is given, and the search for them in everything that it leaves."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import pyarrow.parquet as pq

SECRETS = {
    "AWS_ACCESS_KEY_ID": "PLANTEDKEYIDOFTHETESTS",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/of/the/tests",
    "AWS_SESSION_TOKEN": "planted//session+token==of/the/tests",
    "RAY_AUTH_TOKEN": "planted-ray-token-of-the-tests-0123456789abcdef",
    "HF_TOKEN": "hf_plantedTokenOfTheTests",
}


class CommandLines:
    """All command lines that `ps` shows while a block runs."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(file.read_bytes())
                except OSError:  # it has ended
                    continue


def files_below(folder: Path) -> Iterable[tuple[str, bytes]]:
    """Name and content of every file."""
    return [(str(path), path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]


def leaks(outputs: Iterable[tuple[str, bytes]]) -> list[tuple[str, str]]:
    """(output, name of the secret that it holds), also where it is quoted or in a compressed table."""
    found = []
    for where, data in outputs:
        text = str(pq.read_table(io.BytesIO(data)).to_pylist()).encode() if where.endswith(".parquet") else b""
        for name, secret in SECRETS.items():
            if any(form.encode() in data + text for form in (secret, quote(secret, safe=""))):
                found.append((where, name))
    return found
