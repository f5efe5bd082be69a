"""Cross-validation as a normal run: `folds: 5` does all of it once with each fifth of train and val as val.

Test is the same for all folds. Train and val are cut together, by groups and class by class (`data_pipeline.splits`),
and each fold is an ordinary run in RUN/folds/NUMBER, whose backbone and heads were chosen on its own val. Nothing is
chosen between the folds: together they tell how much a result owes to the images that happened to be trained on.

Shapes: K folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.run import RunFolder
from trainer.metrics import TIERS
from trainer.summary import TABLE_COLUMNS
from trainer.usage import predict_command
from tuning.config import Config

RESULT_FILE = "cross_validation.json"
TWO_SIDED_95 = 1.96


def fold_configs(config: Config) -> list[Config]:
    """The configuration of each fold's run."""
    configs = []
    for fold in range(config.folds):
        split = config.data.split.model_copy(update={"folds": config.folds, "fold": fold})
        data = config.data.model_copy(update={"split": split})
        configs.append(config.model_copy(update={"run": f"{config.run}/folds/{fold}", "folds": 1, "data": data}))
    return configs


def cross_validate(run: RunFolder, folds: Sequence[RunFolder]) -> dict[str, Any]:
    """Put the results of finished folds together, and leave them in `cross_validation.json` of the run.

    Args:
        run: Of all of them.
        folds: The run of each, with its `model/metrics.json`.

    Returns:
        `rows`: of each model that all folds have, `name`, `description` and its figures on test; `differences`: the
        paired ones of balanced accuracy; each figure is what `over_folds` returns. `val`: `mean`, `sd` and `folds` of
        the winner's score, by `select_by`. `winners`: its family in each fold. `test`: `samples`, `groups`, `reads`.
    """
    metrics = [fold.need_json("model/metrics.json", "rarelens train") for fold in folds]
    winners = [fold.need_json("stage_two/winner.json", "rarelens train") for fold in folds]
    scores, differences = [winner["score"] for winner in winners], [found["differences"] for found in metrics]
    result = {
        "test": {**metrics[0]["test"], "reads": [found["test"]["reads"] for found in metrics]},
        "select_by": winners[0]["select_by"],
        "val": {"mean": float(np.mean(scores)), "sd": float(np.std(scores, ddof=1)), "folds": scores},
        "winners": [winner["winner"] for winner in winners],
        "rows": _rows([{row["name"]: row for row in found["rows"]} for found in metrics]),
        "differences": {
            title: over_folds([d[title]["value"] for d in differences], [d[title]["interval"] for d in differences])
            for title in _in_all(differences)
        },
    }
    run.write_json(RESULT_FILE, result)
    return result


def over_folds(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> dict[str, Any]:
    """A figure over folds: mean, standard deviation between folds, 95 % interval of the mean, and that of each fold.

    All folds' models are judged on the same test images. So what these add to a figure does not average out: its
    variance, which each fold's bootstrap tells, is counted in full, and the variance between folds is divided by K. Two
    folds share most of what they are trained on, so that the latter is less than that of independent training sets.

    Args:
        values: [K].
        intervals: 95 %, [K, 2].
    """
    low, high = np.asarray(intervals, dtype=np.float64).T
    of_test = np.mean(((high - low) / (2 * TWO_SIDED_95)) ** 2)
    mean, variance = float(np.mean(values)), float(np.var(values, ddof=1))
    half = TWO_SIDED_95 * float(np.sqrt(of_test + variance / len(values)))
    return {"mean": mean, "sd": variance**0.5, "interval": [mean - half, mean + half], "folds": list(values)}


def print_cross_validation(run: RunFolder) -> None:
    """Print `cross_validation.json` as a table, where the folds' reports and models lie, and how one is used."""
    result = run.need_json(RESULT_FILE, "rarelens train")
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)  # a file or a job's log has no width; 80 would cut the table
    console.print(_table(result))
    for name, difference in result["differences"].items():
        low, high = difference["interval"]
        console.print(f"{name}: {difference['mean']:+.3f} ({low:+.3f} to {high:+.3f})", highlight=False)
    last = len(result["winners"]) - 1
    ends = (
        f"reports: {run.uri}/folds/*/model/report.html",
        f"models:  {run.uri}/folds/0 to {last}, each in model; none of them was chosen",
        f"use one: {predict_command(f'{run.uri}/folds/0/model')}",
    )
    console.print("\n".join(ends), highlight=False, markup=False, soft_wrap=True)


def _table(result: Mapping[str, Any]) -> Table:
    test, folds, val = result["test"], len(result["winners"]), result["val"]
    metric = result["select_by"].replace("_", " ")
    table = Table(
        title=f"{folds} folds, each on the same test: {test['samples']} images, {test['groups']} groups; mean and sd",
        caption=f"winner on val: {metric} {val['mean']:.3f}, sd {val['sd']:.3f}; heads: {', '.join(result['winners'])}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("model", no_wrap=True)
    for heading in ("balanced", "sd", "95 % interval", "macro F1", "worst", *TIERS):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["rows"]:
        balanced = row["balanced_accuracy"]
        low, high = balanced["interval"]
        others = [f"{row[name]['mean']:.3f}" if name in row else "-" for name in ("macro_f1", "worst_recall", *TIERS)]
        table.add_row(
            row["description"], f"{balanced['mean']:.3f}", f"{balanced['sd']:.3f}", f"{low:.3f} - {high:.3f}", *others
        )
    return table


def _rows(tables: list[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The models that all folds have, with the figures that all of them have an interval of."""
    rows = []
    for name in _in_all(tables):
        ours = [table[name] for table in tables]
        described = {row["description"] for row in ours}
        figures = {
            figure: over_folds([row[figure] for row in ours], [row["intervals"][figure] for row in ours])
            for figure in _in_all([row["intervals"] for row in ours])
            if all(row[figure] is not None for row in ours)
        }
        # The winner may be of another family in each fold.
        rows.append({"name": name, "description": described.pop() if len(described) == 1 else name, **figures})
    return rows


def _in_all(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that all have, in the order of the first."""
    return [key for key in mappings[0] if all(key in other for other in mappings)]
