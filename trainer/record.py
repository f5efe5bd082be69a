"""What a run folder says about a run, put together for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.run import TIMINGS_FILE, RunFolder
from trainer.config import TrainerConfig
from trainer.confusions import read_confusion
from trainer.evaluate import DESCRIPTIONS, METRICS_FILE, MODEL_FOLDER, MODEL_NAMES
from trainer.export import DESCRIPTION_FILE, WEIGHTS_FILE
from trainer.findings import Gain, ReportInputs, ResultRow
from trainer.gather import read_evidence
from trainer.heads import KNOBS
from trainer.report import write_report

REPORT_FILE = f"{MODEL_FOLDER}/report.html"


def report_run(config: TrainerConfig, run: RunFolder, again: bool = False) -> Path:
    """Write `model/report.html` from the files of the run folder: neither images nor checkpoints are needed.

    Args:
        config: The configuration as used.
        run: The run folder, with `model/`, `evidence/` and `stage_two/`.
        again: Also where there is one.

    Returns:
        The local path of the report.
    """
    path = run.path(REPORT_FILE)
    if again or not run.storage.exists(REPORT_FILE):
        write_report(report_inputs(config, run), path)
        run.publish(REPORT_FILE)
    return path


def report_inputs(config: TrainerConfig, run: RunFolder) -> ReportInputs:
    """The report's inputs, read from the run folder."""
    metrics = run.need_json(METRICS_FILE, "rarelens evaluate")
    model = run.need_json(f"{MODEL_FOLDER}/{DESCRIPTION_FILE}", "rarelens evaluate")
    winner = run.need_json("stage_two/winner.json", "rarelens stage-two")
    search = pq.read_table(run.fetch("stage_two/results.parquet")).to_pylist()
    knobs = KNOBS[winner["family"]]
    detail = ", ".join(f"{name} {_short(winner[name])}" for name in knobs if name not in ("batch_size", "seed"))
    rows = [ResultRow.read(row) for row in metrics["rows"]]
    evidence = read_evidence(run)
    if not config.report.pictures:
        evidence["pictures"] = {}
    return ReportInputs(
        **evidence,
        name=Path(run.uri).name,
        config=config.model_dump(mode="json"),
        rows=[replace(row, detail=detail) if row.name == "winner" else row for row in rows],
        own_confusion=read_confusion(metrics["confusion"]["own"]),
        winner_confusion=read_confusion(metrics["confusion"][metrics["model"]]),
        test_groups=metrics["test"]["groups"],
        history=run.read_log(),
        kept_epoch=(run.read_json("stage_one/result.json") or {}).get("epoch"),
        search=search,
        choice={**winner, "fine_tuning": metrics["fine_tuning"]},
        winner=metrics["model"],
        gain=_gain(metrics, "own"),
        gain_over_baseline=_gain(metrics, "baseline"),
        select_by=winner["select_by"],
        test_reads=metrics["test"]["reads"],
        timings=run.read_json(TIMINGS_FILE) or {},
        versions=model["provenance"]["versions"],
        hashes=_hashes(model),
        provenance=model["provenance"],
        preprocessing=model["preprocessing"],
        temperature=metrics["temperature"],
    )


def _gain(metrics: Mapping[str, Any], over: str) -> Gain | None:
    found = metrics["differences"].get(f"{MODEL_NAMES[metrics['model']]} - {DESCRIPTIONS[over]}")
    return Gain(found["value"], tuple(found["interval"]), found["figures"]) if found else None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _hashes(model: Mapping[str, Any]) -> dict[str, str]:
    """What the model was made from and what it is, out of `model.json`."""
    return {
        "dataset": model["provenance"]["dataset"]["fingerprint"],
        "checkpoint": model["provenance"]["checkpoint_sha256"],
        WEIGHTS_FILE: model["sha256"][WEIGHTS_FILE],
    }
