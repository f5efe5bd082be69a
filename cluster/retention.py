"""Which checkpoints stay: those of the best epochs, and always the two newest, whatever their score.

Ray Train by itself spares the newest alone: one of the middle of an epoch, which has no score, would go when the next
one comes, and a damaged newest would cost all steps since the last of the best epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

NEWEST = 2


ReportedType = TypeVar("ReportedType", bound=tuple[str, Mapping[str, Any]])


class Reported(NamedTuple):
    """A checkpoint that Ray Train has registered: its folder's name, and what was reported with it, `step` among it."""

    name: str
    metrics: Mapping[str, Any]


def score(metrics: Mapping[str, Any], by: str) -> float:
    """The metric `by`; minus infinity where it is missing or not a number."""
    value = metrics.get(by, -math.inf)
    return value if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def best_first(reported: Sequence[ReportedType], by: str) -> list[ReportedType]:
    """(name, metrics) by the metric `by`, of equal ones the earlier step first; those without it at the end."""
    return sorted(reported, key=lambda item: (-score(item[1], by), item[1]["step"]))


def to_delete(reported: Sequence[Reported], best: int, by: str, newest: int = NEWEST) -> set[str]:
    """Names of the checkpoints that need not stay.

    Args:
        reported: In the order in which they were registered. Of a name that comes twice the later one counts.
        best: How many stay for their score; of equal ones the earlier. Those without a score are none of them.
        by: Metric that is the score; more is better.
        newest: How many stay because they were registered last.
    """
    latest: dict[str, Reported] = {}
    for item in reported:
        latest.pop(item.name, None)
        latest[item.name] = item
    # Where steps go back, those from there on were not whole, and the run has gone on from one before them.
    alive: list[Reported] = []
    for item in latest.values():
        alive = [other for other in alive if other.metrics["step"] <= item.metrics["step"]] + [item]
    scored = best_first([item for item in alive if score(item.metrics, by) > -math.inf], by)
    kept = {name for name, _ in scored[:best]} | {item.name for item in alive[max(0, len(alive) - newest) :]}
    return latest.keys() - kept


def retention(best: int, by: str) -> Any:
    """What has Ray Train's controller delete by `to_delete`; for `RunConfig(callbacks=...)`, without `num_to_keep`."""
    from ray.train.v2._internal.execution.callback import ControllerCallback

    class Retention(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            keep_by_our_rule(best, by)

    return Retention()


def keep_by_our_rule(best: int, by: str) -> None:
    """Replace, in this process, what Ray Train does after each checkpoint: write its list, delete the old ones.

    Ray Train has no setting for a rule of one's own. Without this, and without `num_to_keep`, all stay: so it is with
    a version of Ray that keeps its books in another way.
    """
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import delete_fs_path

    name = "_save_state_and_delete_old_checkpoints"
    write_list = getattr(CheckpointManager, name, None)
    if write_list is None:
        return

    def save_state_and_delete_old_checkpoints(manager: Any) -> None:
        gone = []
        with suppress(AttributeError, KeyError, TypeError):  # other books
            gone = _strike_off(manager, best, by)
        # The list first, as Ray does it: a folder that nobody lists is an orphan, a listed one that is gone is a loss.
        write_list(manager)
        for checkpoint in gone:
            with suppress(OSError):  # what cannot be deleted now is an orphan of the next start
                delete_fs_path(fs=checkpoint.filesystem, fs_path=checkpoint.path)

    setattr(CheckpointManager, name, save_state_and_delete_old_checkpoints)


def _strike_off(manager: Any, best: int, by: str) -> list[Any]:
    """Take what need not stay off the list of Ray Train's `CheckpointManager` -> those checkpoints, to be deleted."""
    index = manager._checkpoint_to_report_index
    results = sorted(manager._checkpoint_results, key=lambda result: index[result.checkpoint])
    by_name = {PurePosixPath(result.checkpoint.path).name: result for result in results}  # saved again: one folder
    names = [PurePosixPath(result.checkpoint.path).name for result in results]
    gone = to_delete([Reported(n, r.metrics) for n, r in zip(names, results, strict=True)], best, by)
    kept = sorted((r for n, r in by_name.items() if n not in gone), key=lambda result: index[result.checkpoint])
    manager._checkpoint_results = kept
    manager._checkpoint_to_report_index = {result.checkpoint: index[result.checkpoint] for result in kept}
    return [by_name[name].checkpoint for name in gone]
