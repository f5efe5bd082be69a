"""Runs of the command line that a test starts as processes of their own and ends as it likes."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent


def start_driver(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """`rarelens ARGUMENTS...`, with a Ray of its own; `options` are subprocess's."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)  # not a guest of the test session's Ray
    return subprocess.Popen(
        [sys.executable, str(ROOT / "rarelens.py"), *map(str, arguments)],
        text=True,
        cwd=ROOT,
        env=environment,
        **options,
    )


def kill_driver(process: subprocess.Popen[str]) -> None:
    """And what it leaves on a machine without a cluster: Ray's own processes would end by themselves, in time."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
