"""What a run folder says about a run, put together for the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.run import TIMINGS_FILE, RunFolder
from data_pipeline.audit import audit
from data_pipeline.dataset import SPLITS, Dataset
from trainer.config import TrainerConfig
from trainer.evaluate import DESCRIPTIONS, METRICS_FILE, MODEL_FOLDER, MODEL_NAMES
from trainer.export import library_versions
from trainer.findings import Gain, ReportInputs, ResultRow
from trainer.heads import KNOBS
from trainer.report import write_report

REPORT_FILE = f"{MODEL_FOLDER}/report.html"
EXAMPLES_PER_CLASS = 4


def report_run(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> Path:
    """Write `model/report.html` from the files of the run folder.

    Args:
        config: The configuration as used.
        dataset: The packed dataset, for its audit and its example pictures.
        run: The run folder, with `model/metrics.json` and `stage_two/`.

    Returns:
        The local path of the report.
    """
    path = run.path(REPORT_FILE)
    if not run.storage.exists(REPORT_FILE):
        write_report(report_inputs(config, dataset, run), path)
        run.publish(REPORT_FILE)
    return path


def report_inputs(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> ReportInputs:
    """The report's inputs, read from the run folder."""
    metrics = run.need_json(METRICS_FILE, "rarelens evaluate")
    stage_two = run.fetch("stage_two")
    search = pq.read_table(stage_two / "results.parquet").to_pylist()
    winner = run.need_json("stage_two/winner.json", "rarelens stage-two")
    knobs = KNOBS[winner["family"]]
    detail = ", ".join(f"{name} {_short(winner[name])}" for name in knobs if name not in ("batch_size", "seed"))
    rows = [ResultRow.read(row) for row in metrics["rows"]]
    return ReportInputs(
        name=Path(run.uri).name,
        dataset=dataset.name,
        config=config.model_dump(mode="json"),
        classes=dataset.classes,
        class_counts={split: dataset.class_counts(split).tolist() for split in SPLITS},
        rows=[replace(row, detail=detail) if row.name == "winner" else row for row in rows],
        own_confusion=metrics["confusion"]["own"],
        winner_confusion=metrics["confusion"][metrics["model"]],
        test_groups=metrics["test"]["groups"],
        history=run.read_log(),
        search=search,
        choice={**winner, "fine_tuning": metrics["fine_tuning"]},
        winner=metrics["model"],
        gain=_gain(metrics, "own"),
        gain_over_baseline=_gain(metrics, "baseline"),
        select_by=winner["select_by"],
        audit=audit(dataset.uri).to_json(),
        test_reads=metrics["test"]["reads"],
        timings=run.read_json(TIMINGS_FILE) or {},
        versions=library_versions(),
        hashes=_hashes(dataset, run),
        examples=example_images(dataset, config.seed),
    )


def example_images(dataset: Dataset, seed: int) -> list[list[bytes]]:
    """A few encoded training images of each class."""
    index, rng = dataset.index("train"), np.random.default_rng(seed)
    examples = []
    for label in range(len(dataset.classes)):
        rows = np.flatnonzero(index.label == label)
        chosen = rng.choice(rows, size=min(EXAMPLES_PER_CLASS, len(rows)), replace=False)
        examples.append(
            [
                dataset.storage.read_range(
                    dataset.shards[index.shard[row]].path, int(index.offset[row]), int(index.length[row])
                )
                for row in chosen
            ]
        )
    return examples


def _gain(metrics: dict[str, Any], over: str) -> Gain | None:
    found = metrics["differences"].get(f"{MODEL_NAMES[metrics['model']]} - {DESCRIPTIONS[over]}")
    return Gain(found["value"], tuple(found["interval"])) if found else None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _hashes(dataset: Dataset, run: RunFolder) -> dict[str, str]:
    description = run.need_json(f"{MODEL_FOLDER}/model.json", "rarelens evaluate")
    return {
        "dataset": dataset.fingerprint,
        "checkpoint": description["provenance"]["checkpoint_sha256"],
        "model.safetensors": description["sha256"]["model.safetensors"],
    }
