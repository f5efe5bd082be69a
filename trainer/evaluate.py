"""The one reading of test: figures of every row of the result table, the model folder, the predictions.

Everything was chosen on val before. Each reading is counted in `test_reads.json`, and the report tells a second one.

Shapes: N test samples, C classes, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.checkpoint import sha256_of
from cluster.run import RunFolder
from data_pipeline.dataset import Dataset
from trainer import metrics
from trainer.closed_forms import fit_temperature
from trainer.config import TrainerConfig
from trainer.export import ModelDescription, save_model
from trainer.extraction import BASELINE, TEST, TRAIN_AND_VAL, extract_features, fetch_checkpoint
from trainer.features import Features, read_features
from trainer.heads import FAMILY_NAMES, Head, load_heads
from trainer.result_table import HeldOutSet, Judged, difference, result_rows
from trainer.retrieval import retrieval
from trainer.stage_checkpoint import WEIGHTS_FILE, load_classifier

MODEL_FOLDER = "model"
METRICS_FILE = f"{MODEL_FOLDER}/metrics.json"
PREDICTIONS_FILE = f"{MODEL_FOLDER}/predictions.parquet"
READS_FILE = "test_reads.json"
DESCRIPTIONS = {"baseline": "plain cross-entropy", **FAMILY_NAMES}


@dataclass(frozen=True)
class Candidate:
    """One row of the result table before its figures: a head, its temperature, the features that it works on."""

    name: str
    description: str
    head: Head
    temperature: float
    test: Features


def evaluate(config: TrainerConfig, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
    """Read test once, and leave `model/` with weights, description, predictions and, written last, `metrics.json`.

    Args:
        config: The configuration.
        dataset: The packed dataset.
        run: The run folder, with stage one's checkpoint, its features and the heads of stage two.

    Returns:
        What `metrics.json` holds: `test` (samples, groups, reads), `rows` (the table), `confusion` [C, C] of `own` and
        `winner`, `differences` of balanced accuracy with paired 95 % intervals, `temperature`.
    """
    done = run.read_json(METRICS_FILE)
    if done is not None:
        return done
    chosen = run.need_json("stage_two/winner.json", "rarelens stage-two")
    heads = load_heads(run.fetch("stage_two") / "heads.safetensors")
    reads = (run.read_json(READS_FILE) or 0) + 1
    run.write_json(READS_FILE, reads)
    candidates = _candidates(config, dataset, run, heads, chosen)

    test = candidates[0].test
    tiers = metrics.class_tiers(
        dataset.class_counts("train"), config.evaluation.many_above, config.evaluation.few_below
    )
    temperature = next(c.temperature for c in candidates if c.name == "winner")
    judged = {c.name: _judged(c) for c in candidates}
    held_out = HeldOutSet(test.labels, test.groups, tiers, config.evaluation.bootstrap_samples, config.seed)
    result = {
        "test": {"samples": len(test), "groups": len(np.unique(test.groups)), "reads": reads},
        "rows": result_rows(list(judged.values()), held_out),
        "confusion": {
            name: metrics.confusion(test.labels, judged[name].predictions, len(tiers)).tolist()
            for name in ("own", "winner")
        },
        "differences": {
            f"winner - {DESCRIPTIONS[other]}": difference(judged["winner"], judged[other], held_out)
            for other in ("baseline", "own")
            if other in judged
        },
        "temperature": temperature,
    }
    _write_predictions(run.path(PREDICTIONS_FILE), test, dataset.classes, judged["winner"].probabilities)
    _write_model(config, dataset, run, heads[chosen["winner"]], temperature)
    run.publish(MODEL_FOLDER)
    run.write_json(METRICS_FILE, result)
    return result


def _candidates(
    config: TrainerConfig, dataset: Dataset, run: RunFolder, heads: dict[str, Head], chosen: dict[str, Any]
) -> list[Candidate]:
    """The rows of the table, in order: the baseline, stage one's own classifier, a head of each family, the winner."""
    candidates = []
    wanted = (TRAIN_AND_VAL, TEST, BASELINE) if config.evaluation.baseline else (TRAIN_AND_VAL, TEST)
    _, tested_on, *baseline = extract_features(config, dataset, run, *wanted)
    if baseline:
        val, test = read_features(baseline[0], "val"), read_features(baseline[0], "test")
        trained = run.need_json("baseline/result.json", "rarelens stage-one")
        head = own_head(fetch_checkpoint(run, trained["checkpoint"]), config, dataset)
        temperature = fit_temperature(head.logits(_float32(val)), torch.from_numpy(val.labels))
        candidates.append(Candidate("baseline", DESCRIPTIONS["baseline"], head, temperature, test))
    test, temperatures, winner = read_features(tested_on, "test"), chosen["temperatures"], chosen["winner"]
    # The table's order is the order of DESCRIPTIONS, whatever the order in the file.
    for name in sorted(heads, key=list(DESCRIPTIONS).index):
        candidates.append(Candidate(name, DESCRIPTIONS[name], heads[name], temperatures[name], test))
    described = f"winner: {DESCRIPTIONS[winner]}"
    candidates.append(Candidate("winner", described, heads[winner], temperatures[winner], test))
    return candidates


def own_head(checkpoint: Path, config: TrainerConfig, dataset: Dataset) -> Head:
    """The classifier that a training learnt by itself, as a head on its raw features."""
    return load_classifier(checkpoint, config, len(dataset.classes)).own_head()


def _judged(candidate: Candidate) -> Judged:
    logits = candidate.head.logits(_float32(candidate.test))
    return Judged(
        candidate.name,
        candidate.description,
        probabilities=_probabilities(logits, candidate.temperature),
        uncalibrated=_probabilities(logits, 1.0),
        found=retrieval(candidate.test.x, candidate.test.labels),
    )


def _write_predictions(path: Path, test: Features, classes: tuple[str, ...], probabilities: np.ndarray) -> None:
    """`image, label, predicted, p_CLASS ...`, so that anyone can score the model again."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"image": test.keys, "label": [classes[i] for i in test.labels]}
    columns["predicted"] = [classes[i] for i in probabilities.argmax(1)]
    columns |= {f"p_{name}": probabilities[:, i] for i, name in enumerate(classes)}
    pq.write_table(pa.table(columns), path)


def _write_model(config: TrainerConfig, dataset: Dataset, run: RunFolder, head: Head, temperature: float) -> None:
    checkpoint = fetch_checkpoint(run, run.need_json("stage_one/result.json", "rarelens stage-one")["checkpoint"])
    description = ModelDescription(
        model=config.model,
        classes=dataset.classes,
        image_px=config.data.image_px,
        resize_ratio=config.data.resize_ratio,
        mean=dataset.mean,
        std=dataset.std,
        temperature=temperature,
        provenance={
            "run": Path(run.uri).name,
            "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
            "checkpoint_sha256": sha256_of(checkpoint / WEIGHTS_FILE),
            "config": config.model_dump(mode="json"),
        },
    )
    save_model(run.path(MODEL_FOLDER), load_classifier(checkpoint, config, len(dataset.classes)), head, description)


def _probabilities(logits: Tensor, temperature: float) -> np.ndarray:
    return (logits.double() / temperature).softmax(dim=1).float().numpy()


def _float32(features: Features) -> Tensor:
    return torch.from_numpy(features.x.astype(np.float32))
