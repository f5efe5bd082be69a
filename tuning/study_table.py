"""The figures of a study, from its cells' prediction files: values, intervals, paired differences, spread over seeds.

A method's figure is the mean over its seeds. Its 95 % interval is over resampled groups of test, the same resamples for
all methods and all seeds: it says what another test set would have shown of these very models. What other seeds would
have shown is the spread, told beside it. Nothing is chosen here by test: the best one-stage row, with which others are
compared, is the one with the best mean score on val, and so is what the searched two-stage chose in each seed.

Shapes: N test samples, C classes, R seeds, S resamples, F figures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from cluster.errors import UserError
from cluster.run import RunFolder
from trainer.bootstrap import Measure, bootstrap, interval
from trainer.metrics import COUNT_METRICS, class_tiers, mean_recall_of, weighted_counts
from tuning.config import Config
from tuning.study_layout import PREDICTIONS, ROWS_FILE, Cell, cells_of
from tuning.study_methods import ONE_STAGE, SEARCHED, Method, chosen_from, methods_of

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

FIGURES = ("balanced_accuracy", "macro_f1", "few_recall")
BASELINE, BEST_ONE_STAGE = "baseline", "best_one_stage"


@dataclass(frozen=True)
class StudyTable:
    """What a study has found.

    Attributes:
        rows: A row a method: `name`, `description`, `kind`, `val` (mean score on val), and of each of `FIGURES` its
            mean `FIGURE`, the interval `FIGURE_low`, `FIGURE_high`, its standard deviation over seeds `FIGURE_sd`
            (None of one seed), and likewise `FIGURE_minus_X`, `..._low`, `..._high` where X is `baseline` and
            `best_one_stage`.
        seeds: A row a method and seed: `name`, `seed`, `training`, `head`, `knobs`, `val`, `FIGURES`, `file` (its
            predictions, below the study's run folder).
        baseline: Description of the row that is the baseline.
        best_one_stage: Description of the one-stage row with the best mean score on val.
        samples: Test images.
        groups: Groups of them.
        reads: How often each cell read test, by its name.
        left_out: Descriptions of methods that some cell has no head for: all of its family had diverged.
    """

    rows: list[dict[str, Any]]
    seeds: list[dict[str, Any]]
    baseline: str
    best_one_stage: str
    samples: int
    groups: int
    reads: dict[str, int]
    left_out: list[str]


def study_table(config: Config, dataset: Dataset, run: RunFolder) -> StudyTable:
    """The table of a study whose cells are all done.

    Args:
        config: The study's.
        dataset: The packed dataset.
        run: The study's run folder.

    Raises:
        UserError: A cell lacks predictions, or they are of other images than the first cell's.
    """
    cells = _Cells(config, dataset.classes, run)
    told = {method: cells.told(method) for method in methods_of(config)}
    methods = [method for method, lines in told.items() if len(lines) == len(config.study.seeds)]
    val = {method: float(np.mean([line["val"] for line in told[method]])) for method in methods}
    baseline = next(method for method in methods if method.training == config.study.baseline)
    one_stage = [method for method in methods if method.kind == ONE_STAGE]
    best = max(one_stage, key=val.__getitem__, default=baseline)

    wanted = config.evaluation
    tiers = class_tiers(dataset.class_counts("train"), wanted.many_above, wanted.few_below)
    says = {method: np.stack([cells.says(line["file"]) for line in told[method]]) for method in methods}
    measures = {method.name: _figures_of(cells.labels, says[method], tiers) for method in methods}
    resampled = bootstrap(measures, cells.groups, wanted.bootstrap_samples, config.seed)
    rows, seeds = [], []
    for method in methods:
        by_seed = np.stack([_once(_figures_of(cells.labels, one[None], tiers), cells.labels) for one in says[method]])
        rows.append(
            {"name": method.name, "description": method.description, "kind": method.kind, "val": val[method]}
            | _spread(by_seed)
            | _with_interval("", by_seed.mean(axis=0), resampled[method.name])
        )
        for title, other in ((BASELINE, baseline), (BEST_ONE_STAGE, best)):
            theirs = _once(measures[other.name], cells.labels)
            difference = by_seed.mean(axis=0) - theirs, resampled[method.name] - resampled[other.name]
            rows[-1] |= _with_interval(f"_minus_{title}", *difference)
        for line, figures in zip(told[method], by_seed.tolist(), strict=True):
            seeds.append({"name": method.name, **line, **dict(zip(FIGURES, figures, strict=True))})
    return StudyTable(
        rows,
        seeds,
        baseline.description,
        best.description,
        samples=len(cells.labels),
        groups=len(np.unique(cells.groups)),
        reads=cells.reads,
        left_out=[method.description for method in told if method not in methods],
    )


class _Cells:
    """What the cells have left: which head scored what on val, and what each said about test."""

    def __init__(self, config: Config, classes: Sequence[str], run: RunFolder):
        self._config, self._classes, self._run = config, classes, run
        self._records = {cell: run.need_json(cell.path(ROWS_FILE), "rarelens study") for cell in cells_of(config.study)}
        self.reads = {cell.name: int(record["reads"]) for cell, record in self._records.items()}
        self._images: list[str] = []
        self._said: dict[str, np.ndarray] = {}
        self.labels = self.groups = np.empty(0)

    def told(self, method: Method) -> list[dict[str, Any]]:
        """A line a seed: seed, training, head, knobs, val, file; seeds without such a head are left out."""
        lines = []
        for seed in self._config.study.seeds:
            training = method.training
            if training == SEARCHED:
                training = max(chosen_from(self._config), key=lambda name: self._model_on_val(name, seed))
            cell = Cell(training, seed)
            record = self._records[cell]
            head = record["model"] if method.head == SEARCHED else method.head
            if head in record["rows"]:
                row, file = record["rows"][head], cell.path(f"{PREDICTIONS}/{head}.parquet")
                line = {"seed": seed, "training": training, "head": head, "knobs": row.get("knobs", {})}
                lines.append({**line, "val": row["val"], "file": file})
        return lines

    def says(self, file: str) -> np.ndarray:
        """Predicted class of each test image, int64 [N]."""
        if file not in self._said:
            table = pq.read_table(io.BytesIO(self._run.storage.read(file)))
            images = table["image"].to_pylist()
            if not self._said:
                number = {name: label for label, name in enumerate(self._classes)}
                self._images = images
                self.labels = np.array([number[name] for name in table["label"].to_pylist()])
                self.groups = np.array(table["group"].to_pylist(), dtype=object)
            if images != self._images:
                cell = file.removesuffix(f"/{PREDICTIONS}/{file.rpartition('/')[2]}")
                raise UserError(
                    f"{self._run.uri}/{file} is about other test images than the predictions of the first cell; delete "
                    f"{self._run.uri}/{cell} and run `rarelens study` again"
                )
            columns = [table[f"p_{name}"].to_numpy() for name in self._classes]
            self._said[file] = np.stack(columns, axis=1).argmax(axis=1)
        return self._said[file]

    def _model_on_val(self, training: str, seed: int) -> float:
        record = self._records[Cell(training, seed)]
        return float(record["rows"][record["model"]]["val"])


def _figures_of(labels: np.ndarray, predictions: np.ndarray, tiers: np.ndarray) -> Measure:
    """Weights [s, N] -> figures [s, F], each the mean over seeds of what predictions [R, N] get."""
    metrics = (COUNT_METRICS["balanced_accuracy"], COUNT_METRICS["macro_f1"], mean_recall_of(tiers == "few"))

    def of_weights(weights: np.ndarray) -> np.ndarray:
        counts = [weighted_counts(labels, one, len(tiers), weights) for one in predictions]
        return np.mean([np.stack([metric(of_seed) for metric in metrics], axis=1) for of_seed in counts], axis=0)

    return of_weights


def _once(measure: Measure, labels: np.ndarray) -> np.ndarray:
    """The figures [F] of test as it is."""
    return measure(np.ones((1, len(labels)), dtype=np.int64))[0]


def _spread(by_seed: np.ndarray) -> dict[str, float | None]:
    """Standard deviation over seeds of figures [R, F]."""
    if len(by_seed) < 2:
        return dict.fromkeys(f"{name}_sd" for name in FIGURES)
    return {f"{name}_sd": float(sd) for name, sd in zip(FIGURES, by_seed.std(axis=0, ddof=1), strict=True)}


def _with_interval(suffix: str, values: np.ndarray, resampled: np.ndarray) -> dict[str, float]:
    """Figures [F] by name, with the 95 % intervals of their resamples [S, F]."""
    row: dict[str, float] = {}
    for i, name in enumerate(FIGURES):
        low, high = interval(resampled[:, i])
        title = f"{name}{suffix}"
        row |= {title: float(values[i]), f"{title}_low": low, f"{title}_high": high}
    return row
