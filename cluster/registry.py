"""Ray Train's list of a run's checkpoints, put right before Ray Train reads it.

Ray Train goes on from what this one file lists. It writes it in place, and its controller dies of a torn one, as of a
listed folder that is gone; where there is none, it begins anew in silence. But the folders' manifests say all of it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from cluster.checkpoint import CheckpointError, files_by_folder, stored_manifest
from cluster.retention import Reported
from cluster.storage import Storage

LIST_FILE = "checkpoint_manager_snapshot.json"

log = logging.getLogger(__name__)


def mend_registry(storage: Storage, warn: Callable[[str], None] = log.warning) -> int:
    """Make the list agree with the folders: what is gone leaves it, what is whole and not listed joins it.

    Whole as far as names and sizes tell: contents are checked when a checkpoint is loaded.

    Args:
        storage: Ray Train's folder of the run, in which the checkpoints' folders lie.
        warn: Told once where something was lost; not of checkpoints whose run was killed before it listed them.

    Returns:
        The newest step that is listed now; 0 = none.

    Raises:
        UserError: The storage does not answer.
    """
    folders = files_by_folder(storage)
    text = storage.read(LIST_FILE) if storage.exists(LIST_FILE) else None
    listed = _parse(text) if text is not None else None
    known = listed or []
    there = [item for item in known if item.name in folders]
    found = []
    for name in folders.keys() - {item.name for item in known}:
        try:
            manifest = stored_manifest(storage, name, folders[name])
        except CheckpointError:
            continue  # part of a killed save
        step = manifest.metrics.get("step", manifest.extra.get("step"))
        if isinstance(step, int):
            found.append(Reported(name, {**manifest.metrics, "step": step}))
    is_right = listed is not None and len(there) == len(known) and _is_of_this_ray(text)
    if found or not (is_right or text is None):
        found.sort(key=lambda item: item.metrics["step"])
        there = _merge(there, found)
        storage.write(LIST_FILE, json.dumps(_in_rays_words(there)).encode())
    lost = [item.name for item in known if item.name not in folders]
    if lost:
        warn(f"checkpoints that were listed are gone from {storage.uri}: {', '.join(lost)}")
    elif listed is None and (text is not None or found):
        state = "missing" if text is None else "damaged"
        names = ", ".join(item.name for item in there) or "no checkpoint"
        warn(f"the list of checkpoints {storage.uri}/{LIST_FILE} is {state}; it was made anew of {names}")
    return max((item.metrics["step"] for item in there), default=0)


def _merge(listed: list[Reported], found: list[Reported]) -> list[Reported]:
    """`found`, in order of their steps, put into the order in which the others were registered."""
    merged = list(listed)
    for item in found:
        places = [i for i, other in enumerate(merged) if other.metrics["step"] <= item.metrics["step"]]
        merged.insert(places[-1] + 1 if places else 0, item)
    return merged


def _parse(text: bytes) -> list[Reported] | None:
    """The listed checkpoints in the order in which they were registered; None = the list is damaged."""
    try:
        state = json.loads(text)
        results, indices = state["checkpoint_results"], state["checkpoint_report_indices"]
        numbered = sorted(zip(indices, results, strict=True), key=lambda pair: pair[0])
        listed = [Reported(str(result["checkpoint_dir_name"]), dict(result["metrics"])) for _, result in numbered]
        if not all(isinstance(item.metrics["step"], int) for item in listed):
            return None
        if state["latest_checkpoint_result"] is None and listed:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return listed


def _is_of_this_ray(text: bytes | None) -> bool:
    """Another version may have other words for it."""
    import ray

    return text is not None and json.loads(text).get("ray_version") == ray.__version__


def _in_rays_words(listed: list[Reported]) -> dict[str, Any]:
    """The list as Ray Train writes and reads it."""
    import ray

    results = [{"version": 0, "checkpoint_dir_name": item.name, "metrics": dict(item.metrics)} for item in listed]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1] if results else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
