"""Folders on local disk in which a checkpoint waits for its upload; those of processes that were killed are removed."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

SNAPSHOT_PREFIX = "rarelens-snapshot-"
CONVERTED_PREFIX = "rarelens-universal-"
"""Of `trainer.universal`: many processes use one, for minutes."""
OLD_S = 60.0
CONVERTED_OLD_S = 86_400.0


def make_snapshot() -> Path:
    """An empty folder that names this process."""
    return Path(tempfile.mkdtemp(prefix=f"{SNAPSHOT_PREFIX}{os.getpid()}-"))


def remove_dead_snapshots() -> None:
    """Snapshots of processes that were killed before they were uploaded, and conversions of killed restarts."""
    for folder in Path(tempfile.gettempdir()).glob("rarelens-*"):
        of_process = re.fullmatch(rf"{SNAPSHOT_PREFIX}(\d+)-.*", folder.name)
        if of_process:
            is_dead = not Path(f"/proc/{of_process[1]}").exists() and _age_s(folder) > OLD_S
        else:
            is_dead = folder.name.startswith(CONVERTED_PREFIX) and _age_s(folder) > CONVERTED_OLD_S
        if is_dead:
            shutil.rmtree(folder, ignore_errors=True)


def _age_s(folder: Path) -> float:
    with suppress(OSError):
        return time.time() - folder.stat().st_mtime
    return 0.0
