"""Two finished runs on one test set: paired differences of every figure, and what differs in their configurations.

All that is needed lies in the run folders: `config.yaml`, `model/` (metrics, predictions, description), `evidence/`.

Shapes: N test samples, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.config import flatten
from cluster.errors import UserError
from cluster.plain import read_yaml
from cluster.run import CONFIG_FILE, RunFolder
from trainer.evaluate import METRICS_FILE, MODEL_FOLDER, PREDICTIONS_FILE
from trainer.export import DESCRIPTION_FILE
from trainer.gather import EVIDENCE_FILE
from trainer.metrics import class_tiers, per_class_recall
from trainer.result_table import HeldOutSet, Judged, difference, recall_differences, recall_intervals, result_rows

FREE_OF_RESULT = ("run",)
"""Settings of which it goes without saying that they differ."""
ABSENT = "(not set)"
NAMED = 3


@dataclass(frozen=True)
class Side:
    """One of the runs: what its folder says."""

    name: str
    uri: str
    config: Mapping[str, Any]
    """Flat: `a.b.c` -> value."""
    described: str
    """The row of the result table that is the model."""
    fingerprint: str
    """Of the packed dataset."""
    test_reads: int
    train_counts: Mapping[str, int]
    """class -> training images."""
    keys: np.ndarray
    labels: np.ndarray
    """Class names, object [N], as `keys` and `groups`; all sorted by key."""
    groups: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    """class -> float32 [N]."""


@dataclass(frozen=True)
class Comparison:
    """B against A; a figure's entry has `value` and `interval`, None where there is none."""

    a: Side
    b: Side
    classes: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    """Of A and of B, as `trainer.result_table.result_rows` gives them."""
    figures: Mapping[str, Mapping[str, Any]]
    """B less A, paired."""
    recall: Sequence[Sequence[float]]
    """[2, C], of A and of B; NaN for a class without test images."""
    recall_intervals: Sequence[Sequence[Sequence[float | None]]]
    """[2, C, 2]."""
    recall_differences: Sequence[Sequence[float | None]]
    """[C, 2]: paired intervals of B less A."""
    train_counts: Sequence[int]
    """[C], of A."""
    test_counts: Sequence[int]
    groups: int
    settings: Sequence[tuple[str, Any, Any]]
    """Key, its value in A and in B, where they differ."""


def compare_runs(a: str, b: str) -> Comparison:
    """Compare the models of two finished runs on their common test set.

    The bootstrap's settings and the tiers (many, medium, few) are those of A.

    Args:
        a: Run folder, a path or `s3://` URI.
        b: Another one.

    Raises:
        UserError: One is no finished run, or they were not tested on the same images.
    """
    ours, theirs = (_read_side(uri) for uri in (a, b))
    _check_same_test_set(ours, theirs)
    classes = list(ours.probabilities)
    number_of = {name: number for number, name in enumerate(classes)}
    labels = np.array([number_of[name] for name in ours.labels], dtype=np.int64)
    train_counts = np.array([ours.train_counts[name] for name in classes])
    test = HeldOutSet(
        labels,
        ours.groups,
        class_tiers(train_counts, ours.config.get("evaluation.many_above"), ours.config.get("evaluation.few_below")),
        samples=ours.config.get("evaluation.bootstrap_samples", 1000),
        seed=ours.config.get("seed", 0),
    )
    judged = [
        Judged(side.name, side.described, np.stack([side.probabilities[name] for name in classes], axis=1))
        for side in (ours, theirs)
    ]
    return Comparison(
        a=ours,
        b=theirs,
        classes=classes,
        rows=result_rows(judged, test),
        figures=difference(judged[1], judged[0], test)["figures"],
        recall=[per_class_recall(labels, model.predictions, len(classes)).tolist() for model in judged],
        recall_intervals=[recall_intervals(model, test) for model in judged],
        recall_differences=recall_differences(judged[1], judged[0], test),
        train_counts=train_counts.tolist(),
        test_counts=np.bincount(labels, minlength=len(classes)).tolist(),
        groups=len(np.unique(ours.groups)),
        settings=different_settings(ours.config, theirs.config),
    )


def different_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys of two flat configurations whose values differ, in A's order; what one lacks is `(not set)` there."""
    keys = [*a, *(key for key in b if key not in a)]
    pairs = [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys if key not in FREE_OF_RESULT]
    return [pair for pair in pairs if pair[1] != pair[2]]


def is_run_folder(uri: str) -> bool:
    """Whether a path or URI names a run folder rather than a configuration file."""
    if Path(uri).is_file() or uri.endswith((".yaml", ".yml")):
        return False
    return RunFolder(uri).storage.exists(CONFIG_FILE)


def _read_side(uri: str) -> Side:
    run = RunFolder(uri)
    if not run.storage.exists(CONFIG_FILE):
        raise UserError(
            f"{uri} is no run folder, it holds no {CONFIG_FILE}; give one's path or URI, e.g. runs/ham10000"
        )
    metrics = run.need_json(METRICS_FILE, f"rarelens train {uri}/{CONFIG_FILE}")
    model = run.need_json(f"{MODEL_FOLDER}/{DESCRIPTION_FILE}", "rarelens evaluate")
    evidence = run.need_json(EVIDENCE_FILE, "rarelens evaluate")["dataset"]
    predictions = pq.read_table(run.fetch(PREDICTIONS_FILE)).sort_by("image")
    columns = {
        name: predictions[name].to_numpy()
        for name in ("image", "label", "group", *(f"p_{c}" for c in model["classes"]))
    }
    config = flatten(read_yaml(run.storage.read(CONFIG_FILE), f"{uri}/{CONFIG_FILE}"))
    return Side(
        name=Path(run.uri).name,
        uri=uri,
        config=config,
        described=next(row["description"] for row in metrics["rows"] if row["name"] == metrics["model"]),
        fingerprint=model["provenance"]["dataset"]["fingerprint"],
        test_reads=metrics["test"]["reads"],
        train_counts=dict(zip(evidence["classes"], evidence["class_counts"]["train"], strict=True)),
        keys=columns["image"],
        labels=columns["label"],
        groups=columns["group"],
        probabilities={name: columns[f"p_{name}"] for name in model["classes"]},
    )


def _check_same_test_set(a: Side, b: Side) -> None:
    remedy = "evaluate both on one packed dataset (data.packed=...) to compare them"
    only = [sorted(set(x.probabilities) - set(y.probabilities)) for x, y in ((a, b), (b, a))]
    if any(only):
        raise UserError(
            f"{a.uri} and {b.uri} have different classes ({_named(only[0] + only[1])} only in one of them); {remedy}"
        )
    missing = [sorted(set(x.keys.tolist()) - set(y.keys.tolist())) for x, y in ((a, b), (b, a))]
    if any(missing):
        counts = " and ".join(
            f"{len(keys)} of {len(side.keys)} test images only in {side.uri} ({_named(keys)})"
            for side, keys in zip((a, b), missing, strict=True)
            if keys
        )
        raise UserError(f"{a.uri} and {b.uri} were tested on different images: {counts}; {remedy}")
    for what, ours, theirs in (("labels", a.labels, b.labels), ("groups", a.groups, b.groups)):
        unlike = np.flatnonzero(ours != theirs)
        if len(unlike):
            raise UserError(
                f"{a.uri} and {b.uri} give {len(unlike)} test images other {what}, "
                f"{a.keys[unlike[0]]} the first: {ours[unlike[0]]} and {theirs[unlike[0]]}; {remedy}"
            )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
