"""What evaluation keeps for the report, so that the page can be made again from the run folder alone.

    evidence/evidence.json      the data and its audit, chosen images, map, calibration, operating points
    evidence/pictures.parquet   key, jpeg: small copies of those images

Shapes: N test samples, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.run import RunFolder
from data_pipeline.audit import audit
from data_pipeline.config import SplitConfig
from data_pipeline.dataset import SPLITS, Dataset
from trainer.calibration import Bins, Calibration, calibration_bins
from trainer.features import Features
from trainer.findings import Confused, LookAlike, Mistake, commonest_first, most_confused
from trainer.metrics import confusion
from trainer.operating_points import OperatingPoints, operating_points
from trainer.projection import EmbeddingMap, embedding_map
from trainer.result_table import RANKING_BUDGET, HeldOutSet, Judged, recall_intervals
from trainer.thumbnails import thumbnails

EVIDENCE_FILE = "evidence/evidence.json"
PICTURES_FILE = "evidence/pictures.parquet"
EXAMPLES_PER_CLASS = 4
CLASSES_SHOWN = 60
"""Of more classes, the rarest have example pictures."""
PAIR_PICTURES = 4
MISTAKES = 24
MISTAKES_PER_CLASS = 4


def keep_evidence(
    dataset: Dataset, run: RunFolder, test: Features, held_out: HeldOutSet, own: Judged, model: Judged
) -> None:
    """Leave in the run folder what the report tells beside `metrics.json`.

    Args:
        dataset: The packed dataset.
        run: The run folder.
        test: The features on which the model works.
        held_out: The same test set, as it is judged.
        own: Stage one's own classifier on it.
        model: The model.
    """
    labels, probabilities = held_out.labels, model.probabilities
    counts: list[Any] = [confusion(labels, judged.predictions, len(held_out.tiers)) for judged in (model, own)]
    examples = example_rows(dataset, held_out.seed)
    alike = look_alikes(most_confused(*counts), test.keys, labels, probabilities)
    mistakes = worst_mistakes(test.keys, labels, probabilities)
    resampling: dict[str, Any] = {"groups": held_out.groups, "samples": held_out.samples, "seed": held_out.seed}
    assert model.uncalibrated is not None
    before, after = (calibration_bins(labels, p, **resampling) for p in (model.uncalibrated, probabilities))
    if held_out.samples * probabilities.size > RANKING_BUDGET:
        resampling["samples"] = 0
    _keep_pictures(dataset, run, test, examples, alike, mistakes)
    train_keys = dataset.index("train").key
    run.write_json(
        EVIDENCE_FILE,
        {
            "dataset": {
                "name": dataset.name,
                "classes": dataset.classes,
                "class_counts": {split: dataset.class_counts(split).tolist() for split in SPLITS},
            },
            "audit": audit_as_packed(dataset),
            "examples": [train_keys[rows].tolist() for rows in examples],
            "look_alikes": [asdict(pair) for pair in alike],
            "mistakes": [asdict(mistake) for mistake in mistakes],
            "recall_intervals": recall_intervals(model, held_out),
            "embedding_map": asdict(embedding_map(test.x, labels, model.predictions, held_out.seed)),
            "calibration": asdict(Calibration(before, after)),
            "operating_points": asdict(operating_points(labels, probabilities, **resampling)),
        },
    )


def audit_as_packed(dataset: Dataset) -> dict[str, Any]:
    """`AuditReport.to_json()` by the near-duplicates that the dataset was packed with; -1 = none were looked for."""
    split = (dataset.made.get("data") or {}).get("split") or {}
    bits = int(split.get("near_duplicate_bits", SplitConfig().near_duplicate_bits))
    return audit(dataset.uri, near_duplicate_bits=bits).to_json()


def read_evidence(run: RunFolder) -> dict[str, Any]:
    """What `keep_evidence` has left, as fields of `ReportInputs`.

    Raises:
        UserError: It is not there.
    """
    values = run.read_json(EVIDENCE_FILE)
    if values is None:
        raise UserError(
            f"{run.uri}/{EVIDENCE_FILE} does not exist, so an earlier version has evaluated this run; delete "
            "model/metrics.json there and run `rarelens evaluate CONFIG` again"
        )
    calibration = {name: Bins(**bins) for name, bins in values["calibration"].items()}
    pictures = pq.read_table(run.fetch(PICTURES_FILE)).to_pydict()
    return {
        "dataset": values["dataset"]["name"],
        "classes": values["dataset"]["classes"],
        "class_counts": values["dataset"]["class_counts"],
        "audit": values["audit"],
        "pictures": dict(zip(pictures["key"], pictures["jpeg"], strict=True)),
        "examples": values["examples"],
        "look_alikes": [LookAlike(**pair) for pair in values["look_alikes"]],
        "mistakes": [Mistake(**mistake) for mistake in values["mistakes"]],
        "recall_intervals": values["recall_intervals"],
        "embedding_map": EmbeddingMap(**values["embedding_map"]),
        "calibration": Calibration(**calibration),
        "operating_points": OperatingPoints(**values["operating_points"]),
    }


def example_rows(dataset: Dataset, seed: int) -> list[np.ndarray]:
    """Rows of some training images of each class, drawn at random; none of the commonest beyond `CLASSES_SHOWN`."""
    labels, rng = dataset.index("train").label, np.random.default_rng(seed)
    shown = commonest_first(dataset.class_counts("train").tolist())[-CLASSES_SHOWN:]
    chosen = []
    for label in range(len(dataset.classes)):
        rows = np.flatnonzero(labels == label) if label in shown else np.empty(0, dtype=np.int64)
        chosen.append(rng.choice(rows, size=min(EXAMPLES_PER_CLASS, len(rows)), replace=False))
    return chosen


def look_alikes(
    pairs: Sequence[Confused], keys: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> list[LookAlike]:
    """Pictures of each confused pair, the surest decisions first.

    Args:
        pairs: Of `most_confused`.
        keys: [N].
        labels: [N].
        probabilities: [N, C].
    """
    predicted = probabilities.argmax(axis=1)

    def surest(true: int, taken_for: int) -> list[str]:
        rows = np.flatnonzero((labels == true) & (predicted == taken_for))
        by_sureness = rows[np.argsort(-probabilities[rows, taken_for], kind="stable")]
        return keys[by_sureness[:PAIR_PICTURES]].tolist()

    return [
        LookAlike(p.true, p.predicted, surest(p.true, p.predicted), surest(p.predicted, p.predicted)) for p in pairs
    ]


def worst_mistakes(keys: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> list[Mistake]:
    """Test images whose true class got the least probability, at most `MISTAKES_PER_CLASS` of a class.

    Arguments as in `look_alikes`.
    """
    predicted, p_true = probabilities.argmax(axis=1), probabilities[np.arange(len(labels)), labels]
    wrong = np.flatnonzero(predicted != labels)
    found: list[Mistake] = []
    of_class = dict.fromkeys(range(probabilities.shape[1]), 0)
    for row in wrong[np.argsort(p_true[wrong], kind="stable")].tolist():
        true, taken_for = int(labels[row]), int(predicted[row])
        if of_class[true] < MISTAKES_PER_CLASS and len(found) < MISTAKES:
            of_class[true] += 1
            found.append(
                Mistake(str(keys[row]), true, taken_for, float(p_true[row]), float(probabilities[row, taken_for]))
            )
    return found


def _keep_pictures(
    dataset: Dataset,
    run: RunFolder,
    test: Features,
    examples: Sequence[np.ndarray],
    alike: Sequence[LookAlike],
    mistakes: Sequence[Mistake],
) -> None:
    named = [key for pair in alike for key in (*pair.taken, *pair.rightly)] + [mistake.key for mistake in mistakes]
    row_of: Mapping[str, int] = dict(zip(test.keys.tolist(), test.rows.tolist(), strict=True))
    wanted = {
        "train": np.concatenate(examples),
        "test": np.array([row_of[key] for key in dict.fromkeys(named)], dtype=np.int64),
    }
    pictures = thumbnails(dataset, wanted, shown=len(wanted["train"]) + len(named))
    table = pa.table(
        {"key": pa.array(list(pictures), pa.string()), "jpeg": pa.array(list(pictures.values()), pa.binary())}
    )
    pq.write_table(table, run.path(PICTURES_FILE))
    run.publish(PICTURES_FILE)
