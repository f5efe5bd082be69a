"""The run folder: where everything that a run makes lies, in a folder or in a bucket."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import yaml

from cluster.config import flatten
from cluster.errors import UserError
from cluster.storage import Storage, open_storage

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
TIMINGS_FILE = "timings.json"
PUBLISH_LOG_EVERY_S = 30.0

# Settings that say where and how fast a run is carried out, not what comes out of it.
FREE_TO_CHANGE = ("run", "cluster.", "data.decode_threads", "data.cache_dir", "data.cache_gib", "data.decode")


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
        self.work = local if local is not None else _mirror(self.uri)
        self._log_published_s = 0.0

    def path(self, name: str) -> Path:
        """Local path of an output; its parents are made."""
        path = self.work / name
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
        return json.loads(self.storage.read(name)) if self.storage.exists(name) else None

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
        """Append one line to the run's log; on a bucket it is published every half minute and by `close`."""
        with open(self.path(LOG_FILE), "a") as file:
            file.write(json.dumps(line) + "\n")
        if not self.is_local and time.monotonic() - self._log_published_s > PUBLISH_LOG_EVERY_S:
            self.publish(LOG_FILE)
            self._log_published_s = time.monotonic()

    def read_log(self) -> list[dict[str, Any]]:
        """Every logged line; of a step that was repeated after a restart, the last one."""
        path = self.path(LOG_FILE)
        if not path.exists() and self.storage.exists(LOG_FILE):
            self.fetch(LOG_FILE)
        if not path.exists():
            return []
        lines: dict[tuple[Any, ...], dict[str, Any]] = {}
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
                continue
            lines[(line.get("stage"), line.get("kind"), line.get("step"))] = line
        return list(lines.values())

    def close(self) -> None:
        """Publish what is not published yet."""
        if not self.is_local and (self.work / LOG_FILE).exists():
            self.publish(LOG_FILE)

    def pin_config(self, config: dict[str, Any], must_exist: bool = False) -> None:
        """Keep the configuration with the run, or check that it is the one that the run was started with.

        Args:
            config: The whole configuration, as plain values.
            must_exist: `--resume`: refuse to start a new run.

        Raises:
            UserError: There is nothing to resume, or a setting that changes the result differs.
        """
        if not self.storage.exists(CONFIG_FILE):
            if must_exist:
                raise UserError(
                    f"nothing to resume: {self.uri} holds no {CONFIG_FILE}; leave --resume out to start a run"
                )
            if self.is_local:
                self.work.mkdir(parents=True, exist_ok=True)
            self.storage.write(CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())
            return
        before = flatten(yaml.safe_load(self.storage.read(CONFIG_FILE)))
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


def _mirror(uri: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    mirror = cache / "rarelens" / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    mirror.mkdir(parents=True, exist_ok=True)
    return mirror
