"""What a report may be made of, for tests: hostile names, every kind of evidence, and a strict reader of the page."""

from __future__ import annotations

import io
import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from data_pipeline.audit import AuditReport, ClassAudit
from trainer.calibration import Calibration, calibration_bins
from trainer.compare import Comparison, compare_runs
from trainer.findings import LookAlike, Mistake, row_shares
from trainer.operating_points import operating_points
from trainer.projection import MAX_POINTS, EmbeddingMap
from trainer.report import Gain, ReportInputs, ResultRow

HOSTILE = ("<script>alert(1)</script>", '" onload="alert(1)', "$x_1$ & co", "--> ]]> </svg>", "#0072b2 'naevus'")
VOID = {"meta", "img", "br", "link", "input", "hr"}
COUNTS = {"train": [900, 30, 210, 8, 90], "val": [190, 7, 45, 2, 20], "test": [190, 7, 45, 0, 20]}


def row(name: str, confusion: np.ndarray, **changes) -> ResultRow:
    recall = np.diag(row_shares(confusion))
    mean = float(np.nanmean(recall))
    values = {
        "name": name,
        "description": f"model {name}",
        "balanced_accuracy": mean,
        "interval": (mean - 0.04, mean + 0.03),
        "macro_f1": mean - 0.02,
        "worst_recall": float(np.nanmin(recall)),
        "many": 0.9,
        "medium": 0.6,
        "few": None,
        "ece": 0.05,
        "per_class_recall": [None if math.isnan(share) else float(share) for share in recall],
    }
    return ResultRow(**{**values, **changes})


def confusion(seed: int, classes: int = 5, test: list[int] | None = None) -> np.ndarray:
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.ones(classes), classes) * 0.4 + 0.6 * np.eye(classes)
    return np.array([draw.multinomial(n, p) for n, p in zip(test or COUNTS["test"], shares, strict=True)])


def jpeg(colour: tuple[int, int, int], **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), colour).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def history() -> list[dict]:
    steps = [
        {"stage": "stage_one", "kind": "step", "step": s, "epoch": s // 30, "loss": 5 / s, "cross_entropy": 2 / s}
        | {"metric_loss": 3 / s, "images_per_s": 100.0}
        for s in range(1, 61)
    ]
    epochs = [
        {"stage": stage, "kind": "epoch", "step": 30 * e, "epoch": e, "balanced_accuracy": 0.4 + 0.1 * e}
        | {"macro_f1": 0.4, "worst_recall": math.nan}
        for stage in ("stage_one", "baseline")
        for e in range(2)
    ]
    return steps + epochs


def search() -> list[dict]:
    draw = np.random.default_rng(0)
    own = {"head": 0, "family": "own", "power": None, "tau": None, "lr": None, "score": 0.5}
    heads = [
        {"head": i, "family": "crt", "power": draw.uniform(), "tau": None, "lr": 10 ** draw.uniform(-3, 0)}
        | {"score": draw.uniform(0.4, 0.7)}
        for i in range(1, 9)
    ]
    heads += [{"head": i, "family": "tau_norm", "tau": 0.1 * i, "score": 0.5} for i in range(9, 12)]
    return [own, *heads, {"head": 12, "family": "crt", "power": 0.5, "lr": 1.0, "score": None}]


def some_audit(leaked: int) -> dict:
    splits = ("train", "val", "test")
    none = dict.fromkeys(splits, 0)
    classes = [
        ClassAudit(
            name,
            {split: COUNTS[split][i] for split in splits},
            {split: COUNTS[split][i] - i for split in splits},
            {**none, "test": leaked * (i == 1)},
            none,
            {**none, "test": leaked * (i == 1)},
            conflicts=0,
            unreadable=0,
        )
        for i, name in enumerate(HOSTILE)
    ]
    conflicts = (("a_1", HOSTILE[0], "b_2", HOSTILE[1]),)
    return AuditReport(("skin",), splits, 2, tuple(classes), 3, conflicts, (("a.jpg", "the file is empty"),)).to_json()


def decisions(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels [N] and probabilities [N, C] of which the confusion matrix is made."""
    labels, predicted = (np.repeat(index, counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1))
    scores = np.random.default_rng(3).dirichlet(np.ones(len(counts)), len(labels)) + np.eye(len(counts))[predicted]
    return labels, scores / scores.sum(axis=1, keepdims=True)


def evidence(counts: np.ndarray, classes: int = 5, samples: int = 100) -> dict:
    """What `trainer.gather` reads back; intervals by so many resamples."""
    labels, probabilities = decisions(counts)
    groups, draw = np.arange(len(labels)) // 2, np.random.default_rng(4)
    bins = [calibration_bins(labels, p, groups, samples, 0) for p in (probabilities**2, probabilities)]
    shown = np.arange(len(labels))[:MAX_POINTS]
    places = draw.uniform(size=(2, len(shown))).round(4).tolist()
    keys = [f"train_{label}" for label in range(classes)] + ["test_0", "test_1", "test_2"]
    return {
        "pictures": {key: jpeg((9 * number, 90, 60)) for number, key in enumerate(keys)},
        "examples": [[f"train_{label}", "damaged"] for label in range(classes)],
        "look_alikes": [LookAlike(2, 0, ["test_0", "test_1"], ["test_2"])],
        "mistakes": [Mistake("test_0", 2, 0, 0.01, 0.9), Mistake("<i>key</i>", 1, 0, 0.02, 0.8)],
        "recall_intervals": [[0.1, 0.9]] * 3 + [[None, None]] + [[0.2, 0.8]] * (classes - 4),
        "embedding_map": EmbeddingMap(
            *places, labels[shown].tolist(), probabilities[shown].argmax(axis=1).tolist(), "t-SNE", 0.934, 5000
        ),
        "calibration": Calibration(*bins),
        "operating_points": operating_points(labels, probabilities, groups, samples, 0),
    }


@cache
def _evidence_of_five() -> dict:
    return evidence(confusion(2))


def some_inputs(**changes) -> ReportInputs:
    own, winner = confusion(1), confusion(2)
    figures = {"balanced_accuracy": {"value": 0.031, "interval": [0.012, 0.05]}, "few": {"value": None, "interval": []}}
    intervals = {"balanced_accuracy": [0.5, 0.6], "ece": [0.03, 0.07], "few": [None, None]}
    values = {
        "name": "run <b>1</b>",
        "dataset": "skin & co",
        "config": {
            "model": {"backbone": "resnet50"},
            "data": {"image_px": 128, "name": "<img src=x>"},
            "stage_one": {"epochs": 2, "loss": {"name": "supervised_contrastive"}},
            "stage_two": {"families": ("crt", "tau_norm")},
        },
        "classes": HOSTILE,
        "class_counts": COUNTS,
        "rows": [
            row("own", own),
            row("crt", winner),
            row("winner", winner, detail="q 0.1, <i>lr</i> 0.3", intervals=intervals, per_class_auc=[0.9] * 5),
        ],
        "own_confusion": own.tolist(),
        "winner_confusion": winner.tolist(),
        "test_groups": 240,
        "history": history(),
        "kept_epoch": 0,
        "search": search(),
        "gain": Gain(0.031, (0.012, 0.05), figures),
        "gain_over_baseline": Gain(-0.005, (-0.02, 0.01)),
        "audit": some_audit(leaked=0),
        "timings": {"pack": 4.21, "stage one": 754.0},
        "versions": {"rarelens": "0.1.0", "torch": "2.15.0"},
        "hashes": {"dataset": "ab" * 32},
        "provenance": {"created": "2026-11-30T01:02:03+00:00", "versions": {"rarelens": "0.1.0"}},
        "preprocessing": {"image_px": 160, "resize_ratio": 1.143, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3]},
        "temperature": 1.7,
        **_evidence_of_five(),
    }
    return ReportInputs(**{**values, **changes})


def finished_run(folder: Path, counts: np.ndarray, classes: tuple[str, ...] = HOSTILE, **changes) -> str:
    """What `rarelens report A B` reads of a run whose model has that confusion matrix; groups are pairs of images.

    Args:
        folder: The run folder.
        counts: Test images [C, C].
        classes: Names.
        changes: `config` (flat), `keys`, `labels`, `groups`, `fingerprint`, `reads`.
    """
    labels, probabilities = decisions(counts)
    keys = changes.get("keys", [f"test_{row:04d}" for row in range(len(labels))])
    columns = {
        "image": keys,
        "label": changes.get("labels", [classes[label] for label in labels]),
        "group": changes.get("groups", [f"group {row // 2}" for row in range(len(labels))]),
        **{f"p_{name}": probabilities[:, label].astype(np.float32) for label, name in enumerate(classes)},
    }
    (folder / "model").mkdir(parents=True)
    (folder / "evidence").mkdir()
    shuffled = np.random.default_rng(len(str(folder))).permutation(len(keys))  # the order in a file says nothing
    pq.write_table(pa.table(columns).take(shuffled), folder / "model/predictions.parquet")
    config = {"seed": 0, "evaluation": {"bootstrap_samples": 200}, "stage_one": {"epochs": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "run": str(folder), **changes.get("config", {})}))
    described = {"classes": classes, "provenance": {"dataset": {"fingerprint": changes.get("fingerprint", "ab" * 32)}}}
    evidence = {"dataset": {"classes": classes, "class_counts": {"train": COUNTS["train"][: len(classes)]}}}
    rows = [{"name": "own", "description": "own"}, {"name": "winner", "description": "winner: <b>cRT</b>"}]
    metrics = {"test": {"reads": changes.get("reads", 1)}, "model": "winner", "rows": rows}
    for name, value in (("model/model", described), ("evidence/evidence", evidence), ("model/metrics", metrics)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    return str(folder)


def comparison_of_two(folder: Path) -> Comparison:
    """Two runs with hostile names and long settings, compared."""
    uris = [
        finished_run(folder / name, confusion(seed), config={"model": {"weights": "x" * weights}}, reads=seed)
        for name, seed, weights in (("a <b>run</b>", 1, 9), ("another", 2, 300))
    ]
    return compare_runs(*uris)


class Reader(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page.replace("<wbr>", ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))
