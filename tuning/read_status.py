"""How a run is doing, read from its run folder alone: without Ray, and without a mirror of what lies in a bucket."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from cluster.checkpoint import MANIFEST_FILE
from cluster.config import flatten
from cluster.errors import UserError
from cluster.lock import LOCK_FILE, WATCH_FOR_S, holder
from cluster.owner import Owner
from cluster.plain import read_yaml
from cluster.run import CONFIG_FILE, LOG_FILE, parse_log, without_repeats
from cluster.storage import Storage, open_storage
from tuning.config import Config
from tuning.cross_validation import RESULT_FILE
from tuning.settings import trained_epochs
from tuning.status import Checkpoint, Incident, Process, Status, Training
from tuning.study_layout import CELLS, CELLS_FILE, PREDICTIONS, ROWS_FILE, search_name

TRAININGS = {"stage one": "stage_one", "baseline": "baseline", "fine-tuning": "fine_tuned"}
"""Steps that train, and the folders of their checkpoints, by which the log names them too."""
FOLDERS = (*TRAININGS.values(), "features", "stage_two", "search", "model", PREDICTIONS)
INCIDENTS = ("hang", "lost", "warning", "skipped", "error")
RECENT_LINES = 20
"""Over so many lines of the log the time that a step takes is averaged."""
TRIAL_STATES = {"ERROR": "failed", "RUNNING": "running"}


def read_status(uri: str, watch_for_s: float = WATCH_FOR_S) -> Status:
    """Look into a run folder; of a bucket only small files are read, and nothing is kept.

    Args:
        uri: Run folder, a path or s3:// URI.
        watch_for_s: How long a process of another machine is watched before it passes for dead.

    Raises:
        UserError: There is no run.
    """
    folder = _Folder.open(uri)
    if folder.storage.exists(CELLS_FILE):
        return _study(folder.storage, watch_for_s)
    begun = [n for n in range(folder.config["folds"]) if folder.storage.exists(f"folds/{n}/{CONFIG_FILE}")]
    if begun:
        return _cross_validation(folder, begun[-1], watch_for_s)
    steps = folder.steps()
    done = max((number for number, (_, is_done) in enumerate(steps, 1) if is_done), default=0)
    step = steps[done][0] if done < len(steps) else "done"
    training = folder.training(step)
    lines = [line for line in without_repeats(folder.log) if line.get("kind") in INCIDENTS]
    held = holder(folder.storage, watch_for_s)
    return Status(
        run=folder.storage.uri,
        step=step,
        steps_done=done,
        steps=len(steps),
        process=held and Process(str(held[0]), held[1]),
        training=training,
        checkpoint=folder.checkpoint(training.name) if training else None,
        trials=folder.trials(),
        heads=folder.heads(),
        restarts=folder.restarts(),
        incidents=dict(Counter(line["kind"] for line in lines)),
        last_incident=folder.incident(lines[-1]) if lines else None,
        log_ago_s=folder.ago_s(folder.log[-1].get("at")) if folder.log else None,
    )


def _study(storage: Storage, watch_for_s: float) -> Status:
    """Of a study: its cells, and what the one that runs is doing, else the last one that was begun."""
    names = json.loads(storage.read(CELLS_FILE))
    searches = {search_name(name.rpartition("-seed")[0]) for name in names}
    begun = [name for name in (*sorted(searches), *names) if storage.exists(f"{CELLS}/{name}/{CONFIG_FILE}")]
    done = [name for name in names if storage.exists(f"{CELLS}/{name}/{ROWS_FILE}")]
    locked = [name for name in begun if storage.exists(f"{CELLS}/{name}/{LOCK_FILE}")]
    running = [name for name in locked if _may_live(storage, f"{CELLS}/{name}/{LOCK_FILE}")]
    shown = (running or locked or done or begun)[-1]
    status = read_status(f"{storage.uri}/{CELLS}/{shown}", watch_for_s)
    return replace(
        status,
        run=storage.uri,
        step="done" if len(done) == len(names) else f"{shown}: {status.step}",
        cells={"done": len(done), "running": len(running), "of": len(names)},
    )


def _may_live(storage: Storage, lock: str) -> bool:
    """Whether the owner of a cell's lock lives, as far as this machine sees: none of another one is watched for."""
    with suppress(UserError):  # released just now
        return Owner.read(storage.read(lock)).lives is not False
    return False


def _cross_validation(folder: _Folder, fold: int, watch_for_s: float) -> Status:
    """Of a run with folds: what the newest of them is doing, until all are put together."""
    status = read_status(f"{folder.storage.uri}/folds/{fold}", watch_for_s)
    step = f"fold {fold} of 0 to {folder.config['folds'] - 1}: {status.step}"
    ended = folder.storage.exists(RESULT_FILE)
    return replace(status, run=folder.storage.uri, step="done" if ended else step)


class _Folder:
    """The run folder as it is now: its files, its configuration (key path -> value), its log."""

    def __init__(self, storage: Storage, config: dict[str, Any]):
        self.storage, self.config, self.now_s = storage, config, time.time()
        self.files = {stored.path for name in FOLDERS for stored in storage.list(f"{name}/")}
        self.log = parse_log(storage.read(LOG_FILE)) if storage.exists(LOG_FILE) else []

    @classmethod
    def open(cls, uri: str) -> _Folder:
        storage = open_storage(uri.rstrip("/"))
        if not storage.exists(CONFIG_FILE):
            raise UserError(
                f"no run at {storage.uri}: it holds no {CONFIG_FILE}; check the path, or start one with "
                f"`rarelens train CONFIG run={uri}`"
            )
        pinned = read_yaml(storage.read(CONFIG_FILE), f"{storage.uri}/{CONFIG_FILE}")
        if not isinstance(pinned, dict):
            raise UserError(f"{storage.uri}/{CONFIG_FILE} is damaged, it is no mapping; give another run")
        return cls(storage, flatten(Config().model_dump(mode="json")) | flatten(pinned))

    def ago_s(self, at: float | None) -> float | None:
        return None if at is None else round(max(0.0, self.now_s - at), 1)

    def steps(self) -> list[tuple[str, bool]]:
        """Name of each step, and whether it is done; a folder that only searches has a step of its own."""
        packed = ("pack", self._dataset() is not None or any("stage" in line for line in self.log))
        searches = any(path.startswith("search/") for path in self.files)
        trains = any(path.startswith("stage_one/") for path in self.files) or any("stage" in line for line in self.log)
        if searches and not trains:
            return [packed, ("search", "search/best.yaml" in self.files)]
        results = {"stage one": "stage_one/result.json"}
        if self.config["evaluation.baseline"]:
            results["baseline"] = "baseline/result.json"
        results |= {"features": "features/stage_one/features.json", "stage two": "stage_two/winner.json"}
        if self.config["fine_tune.epochs"]:
            results["fine-tuning"] = "fine_tuned/choice.json"
        if Path(self.storage.uri).parent.name == CELLS:  # of a study
            results["predictions"] = ROWS_FILE
        else:
            results |= {"evaluation": "model/metrics.json", "report": "model/report.html"}
        return [packed, *((name, file in self.files) for name, file in results.items())]

    def training(self, step: str) -> Training | None:
        logged = [name for name in TRAININGS.values() if self._lines(name, "step", "epoch")]
        name = TRAININGS.get(step, logged[-1] if logged else "")
        if name not in logged:
            return None
        section = "fine_tune" if name == "fine_tuned" else "stage_one"
        epochs, last = self.config[f"{section}.epochs"], self._lines(name, "step", "epoch")[-1]
        steps_said = self._lines(name, "step")
        validated = list({line["epoch"]: line for line in self._lines(name, "epoch")}.values())
        select_by = self.config["stage_two.select_by" if name == "fine_tuned" else "stage_one.select_by"]
        best: dict[str, Any] = max(validated, key=lambda line: line[select_by], default={})
        steps_per_epoch = self._steps_per_epoch(validated)
        steps = epochs * steps_per_epoch if steps_per_epoch else None
        step_s = [line["step_s"] for line in steps_said[-RECENT_LINES:] if "step_s" in line]
        ended = f"{name}/result.json" in self.files
        said = steps_said[-1] if steps_said else {}
        return Training(
            name=name,
            epoch=last["epoch"] + 1,
            epochs=epochs,
            step=last["step"],
            steps=steps,
            loss=said.get("loss"),
            images_per_s=said.get("images_per_s"),
            left_s=round((steps - last["step"]) * mean(step_s), 1) if steps and step_s and not ended else None,
            best_epoch=best["epoch"] + 1 if best else None,
            best_balanced_accuracy=best.get("balanced_accuracy"),
        )

    def checkpoint(self, name: str) -> Checkpoint | None:
        """The one of the highest step that every rank has finished; when, by its file or, in a bucket, by the log."""
        found = []
        for path in (path for path in self.files if re.fullmatch(rf"{name}/[^/]+/{MANIFEST_FILE}", path)):
            with suppress(UserError, ValueError, KeyError, TypeError):  # deleted meanwhile, or damaged
                manifest = json.loads(self.storage.read(path))
                others = (f"{Path(path).parent}/manifest-rank{rank}.json" for rank in range(1, manifest["world"]))
                if all(other in self.files for other in others):
                    found.append((manifest["extra"]["step"], path))
        if not found:
            return None
        step, path = max(found)
        local = self.storage.local_path(path)
        said = [line.get("at") for line in self._lines(name, "step", "epoch") if line["step"] <= step]
        at = local.stat().st_mtime if local is not None and local.exists() else said[-1] if said else None
        return Checkpoint(str(Path(path).parent), self.ago_s(at))

    def trials(self) -> dict[str, int] | None:
        """Ended ones by their own folders; what runs and what failed by Tune's newest state of each round."""
        newest: dict[str, str] = {}
        for path in sorted(self.files):
            if found := re.fullmatch(r"search/tune/([^/]+)/(?:attempt-\d+/)?experiment_state-[^/]+\.json", path):
                newest[found[1]] = path
        if not any(path.startswith("search/") for path in self.files):
            return None
        states: Counter[str] = Counter()
        for path in newest.values():
            with suppress(UserError, ValueError, KeyError):  # replaced meanwhile
                trials = json.loads(self.storage.read(path))["trial_data"]
                states.update(json.loads(trial)["status"] for trial, _ in trials)
        again = self.config["search.finalists"] * (self.config["search.seeds"] - 1)
        begun = (re.fullmatch(r"(search/trials/[^/]+)/choices\.json", path) for path in self.files)
        done = sum(self._has_ended(found[1]) for found in begun if found)
        counts = {word: states[state] for state, word in TRIAL_STATES.items()}
        return {"done": done, **counts, "of": self.config["search.trials"] + again}

    def _has_ended(self, trial: str) -> bool:
        """Whether a trial was trained to the end, or fell behind and was stopped."""
        if f"{trial}/stopped.json" in self.files:
            return True
        with suppress(UserError, ValueError, LookupError, TypeError, AttributeError):  # not judged yet, or damaged
            choices, said = (json.loads(self.storage.read(f"{trial}/{name}.json")) for name in ("choices", "scores"))
            return bool(said[-1]["epochs"] == trained_epochs(self.config["stage_one.epochs"], choices))
        return False

    def heads(self) -> dict[str, int] | None:
        """By the finished blocks of the search that has most of them."""
        of = self.config["stage_two.heads"]
        if "stage_two/winner.json" in self.files:
            return {"done": of, "of": of}
        found = (re.fullmatch(r"stage_two/(heads-[^/]+)/blocks/\d+\.safetensors", path) for path in self.files)
        blocks = Counter(match[1] for match in found if match)
        if not blocks:
            return None
        return {"done": min(max(blocks.values()) * self.config["stage_two.heads_per_trial"], of), "of": of}

    def restarts(self) -> int:
        starts = Counter(line.get("stage") for line in self.log if line.get("kind") == "start")
        return sum(number - 1 for number in starts.values())

    def incident(self, line: dict[str, Any]) -> Incident:
        text = line.get("text") or f"step {line.get('step')} was left out: {line.get('reason')}"
        return Incident(line["kind"], text, self.ago_s(line.get("at")))

    def _lines(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line.get("stage") == name and line.get("kind") in kinds]

    def _dataset(self) -> dict[str, Any] | None:
        """`dataset.json`, where it is found: a relative path to it means the driver's working directory."""
        with suppress(UserError, ValueError):
            place = open_storage(self.config["data.packed"] or f"{self.storage.uri}/dataset")
            return json.loads(place.read("dataset.json"))
        return None

    def _steps_per_epoch(self, validated: Sequence[dict[str, Any]]) -> int | None:
        if validated:
            return validated[-1]["step"] // (validated[-1]["epoch"] + 1)
        dataset = self._dataset()
        if dataset is None:
            return None
        images = sum(shard["samples"] for shard in dataset["shards"] if shard["split"] == "train")
        return max(1, images // self.config["stage_one.batch_size"])
