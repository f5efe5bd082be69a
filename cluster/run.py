"""The run folder: where everything that a run makes lies, in a folder or in a bucket."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from cluster.config import flatten
from cluster.errors import UserError
from cluster.folder import disk_errors
from cluster.lock import RunLock
from cluster.plain import read_json, read_yaml
from cluster.storage import Storage, open_storage
from cluster.worker import RunStopped

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
TIMINGS_FILE = "timings.json"
PUBLISH_LOG_EVERY_S = 30.0
OURS = ("rarelens.py", "tuning", "trainer", "data_pipeline", "cluster")
REPEATED_KINDS = ("step", "epoch", "skipped")
"""Lines of the log that a restart writes once more; of the others each counts."""

# Settings that say where and how fast a run is carried out, not what comes out of it.
FREE_TO_CHANGE = (
    "run",
    "cluster.",
    "data.decode_threads",
    "data.cache_dir",
    "data.cache_gib",
    "data.decode",
    "stage_one.checkpoint_every",
    "report.",
    "tracking.",
    "study.",  # its cells keep their own configurations
)


class RunFolder:
    """Outputs of one run under one path or URI.

    Steps write below `work` and then `publish`; on a local run folder that is the same place. For a bucket `work` is
    a mirror on local disk, and `fetch` brings back what another machine, or this one before, has published.
    """

    def __init__(self, uri: str):
        # Workers may have another working directory: from here on the path is absolute.
        self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).resolve())
        self.storage: Storage = open_storage(self.uri)
        local = self.storage.local_path("")
        self.is_local = local is not None
        self.work = local if local is not None else mirror(self.uri)
        self._log_published_s = 0.0
        self._log_taken_up = False

    def path(self, name: str) -> Path:
        """Local path of an output; its parents are made."""
        path = self.work / name
        with disk_errors(self.work):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, name: str) -> None:
        """Copy a file or a folder from `work` to the bucket; nothing to do for a local run folder."""
        if self.is_local:
            return
        path = self.work / name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            self.storage.upload(file, file.relative_to(self.work).as_posix())

    def fetch(self, name: str) -> Path:
        """Local path of a published file or folder, downloaded where the run folder is a bucket."""
        if not self.is_local:
            for stored in self.storage.list(name):
                if stored.path == name or stored.path.startswith(f"{name}/"):
                    self.storage.download(stored.path, self.path(stored.path))
        return self.work / name

    def read_json(self, name: str) -> Any | None:
        """A published JSON file, or None where there is none."""
        if not self.storage.exists(name):
            return None
        return read_json(self.storage.read(name), f"{self.uri}/{name}", "delete it, and it is made again")

    def need_json(self, name: str, command: str) -> Any:
        """A published JSON file that an earlier step has written.

        Raises:
            UserError: It is not there; the message names the command that writes it.
        """
        value = self.read_json(name)
        if value is None:
            raise UserError(f"{self.uri}/{name} does not exist; run `{command}` first")
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        data = json.dumps(value, indent=2, allow_nan=True).encode()
        self.storage.write(name, data)

    def add_seconds(self, step: str, seconds: float) -> None:
        """Count time that a step took into `timings.json`; a step that found its work done took none."""
        if seconds >= 1:
            timings = self.read_json(TIMINGS_FILE) or {}
            self.write_json(TIMINGS_FILE, {**timings, step: round(timings.get(step, 0.0) + seconds, 1)})

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to the run's log, with the time `at`, in seconds since the epoch.

        On a bucket the log is published every half minute and by `close`.
        """
        self._take_up_log()
        with disk_errors(self.work), open(self.path(LOG_FILE), "a") as file:
            file.write(json.dumps({**line, "at": round(time.time(), 1)}) + "\n")
        if not self.is_local and time.monotonic() - self._log_published_s > PUBLISH_LOG_EVERY_S:
            self.publish(LOG_FILE)
            self._log_published_s = time.monotonic()

    def read_log(self) -> list[dict[str, Any]]:
        """Every logged line; of a step that was repeated after a restart, the last one."""
        self._take_up_log()
        path = self.path(LOG_FILE)
        return without_repeats(parse_log(path.read_bytes())) if path.exists() else []

    def _take_up_log(self) -> None:
        """Go on with the published log, unless the mirror holds it already, perhaps with lines that came after."""
        if self._log_taken_up:
            return
        self._log_taken_up = True
        path = self.path(LOG_FILE)
        if self.is_local or not self.storage.exists(LOG_FILE):
            return
        published = self.storage.read(LOG_FILE)
        with disk_errors(self.work):
            if not path.exists() or not path.read_bytes().startswith(published):
                path.write_bytes(published)

    def close(self) -> None:
        """Publish what is not published yet."""
        if not self.is_local and (self.work / LOG_FILE).exists():
            self.publish(LOG_FILE)

    def pin_config(
        self, config: dict[str, Any], must_exist: bool = False, defaults: dict[str, Any] | None = None
    ) -> None:
        """Keep the configuration with the run, or check that it is the one that the run was started with.

        Args:
            config: The whole configuration, as plain values.
            defaults: The configuration without any setting. A run of an earlier version, which lacks a key, has it.
            must_exist: `--resume`: refuse to start a new run.

        Raises:
            UserError: There is nothing to resume, or a setting that changes the result differs.
        """
        if not self.storage.exists(CONFIG_FILE):
            if must_exist:
                raise UserError(
                    f"nothing to resume: {self.uri} holds no {CONFIG_FILE}; leave --resume out to start a run"
                )
            with disk_errors(self.work):
                if self.is_local:
                    self.work.mkdir(parents=True, exist_ok=True)
                else:  # of a run of the same name that was deleted from the bucket
                    (self.work / LOG_FILE).unlink(missing_ok=True)
            self.storage.write(CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())
            return
        pinned = read_yaml(self.storage.read(CONFIG_FILE), f"{self.uri}/{CONFIG_FILE}")
        if not isinstance(pinned, dict):
            raise UserError(f"{self.uri}/{CONFIG_FILE} is damaged, it is no mapping; give another run=...")
        before = flatten(defaults or {}) | flatten(pinned)
        now = flatten(config)
        changed = [
            f"{key} = {now.get(key)!r}, was {before.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
        ]
        if changed:
            raise UserError(
                f"run folder {self.uri} was started with another configuration ({'; '.join(changed)}); "
                "give another run=... or put the old values back"
            )


@contextmanager
def alone_in(run: RunFolder) -> Iterator[None]:
    """The run folder for this process alone; its log is published, with what ends the run before it is done.

    Of a user's mistake the log has the text; of any other exception its type and place alone: the text may be secret.

    Raises:
        RunInUse: Another process has it.
    """
    with RunLock(run.storage) as lock:
        try:
            yield
            run.close()
        except BaseException as error:
            if lock.lost is None:  # else another process writes there now
                with suppress(OSError, UserError):  # the storage may be what failed
                    if isinstance(error, Exception) and not isinstance(error, RunStopped):
                        run.log({"kind": "error", "text": _said_of(error)})
                    run.close()
            raise


def _said_of(error: Exception) -> str:
    """What the log says of an exception: a user's mistake in full, else its type and our last line on its way."""
    if isinstance(error, UserError):
        return str(error)
    project, where = Path(__file__).parents[1], ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(project) and file.relative_to(project).parts[0] in OURS:
            where = f"{file.relative_to(project).as_posix()}:{line}"
    return f"{type(error).__name__} at {where}, a mistake of the program; its traceback is where the run was started"


def parse_log(data: bytes) -> list[dict[str, Any]]:
    """Every line of a `log.jsonl`, in order; one that is torn, of a run that was killed while it wrote, is left out."""
    lines = []
    for text in data.splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines


def without_repeats(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log; of a step that was repeated after a restart, the last one."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, line in enumerate(log):
        key = (line.get("stage"), line.get("kind"), line.get("step"))
        lines[key if line.get("kind") in REPEATED_KINDS else (number,)] = line
    return list(lines.values())


def mirror(uri: str) -> Path:
    """This machine's folder for copies of what lies at an s3:// URI, in the user's cache; made if needed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    mirror = cache / "rarelens" / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    with disk_errors(mirror):
        mirror.mkdir(parents=True, exist_ok=True)
    return mirror
