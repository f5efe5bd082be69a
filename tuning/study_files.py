"""What a study leaves for people and programs: Markdown, Parquet, a picture, the table in the terminal.

study/table.md           the table with all that is needed to read it
study/results.parquet    a row a method
study/seeds.parquet      a row a method and seed, with the file of its predictions
study/forest.svg         balanced accuracy with its intervals
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cluster.run import RunFolder
from trainer.metrics import class_tiers
from trainer.model import MIRRORED_DIMS
from tuning.config import Config
from tuning.study_cells import training_config
from tuning.study_layout import PICTURE_FILE, RESULTS_FILE, SEEDS_FILE, TABLE_FILE
from tuning.study_methods import OURS, training_name
from tuning.study_picture import forest
from tuning.study_table import BASELINE, BEST_ONE_STAGE, StudyTable

if TYPE_CHECKING:
    from data_pipeline.dataset import Dataset

COLUMNS = {
    "balanced accuracy": "balanced_accuracy",
    "sd": "balanced_accuracy_sd",
    "macro F1": "macro_f1",
    "few-shot recall": "few_recall",
    "less the baseline": f"balanced_accuracy_minus_{BASELINE}",
    "less the best one-stage": f"balanced_accuracy_minus_{BEST_ONE_STAGE}",
    "val": "val",
}


def write_study(config: Config, dataset: Dataset, run: RunFolder, table: StudyTable) -> None:
    """Write the table, the rows by method and by method and seed, and the picture below `study/` of the run folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seeds = [{**line, "knobs": json.dumps(line["knobs"])} for line in table.seeds]
    pq.write_table(pa.Table.from_pylist(table.rows), run.path(RESULTS_FILE))
    pq.write_table(pa.Table.from_pylist(seeds), run.path(SEEDS_FILE))
    run.path(PICTURE_FILE).write_text(forest(table, config.data.name), encoding="utf-8")
    run.path(TABLE_FILE).write_text(markdown(config, dataset, table), encoding="utf-8")
    for name in (RESULTS_FILE, SEEDS_FILE, PICTURE_FILE, TABLE_FILE):
        run.publish(name)


def markdown(config: Config, dataset: Dataset, table: StudyTable) -> str:
    """The table, with all that is needed to read it."""
    seeds = config.study.seeds
    again = {name: reads for name, reads in table.reads.items() if reads > 1}
    tested = "each cell read it once" if not again else f"read more than once by {_listed(again)}"
    counts = dataset.class_counts("train")
    wanted = config.evaluation
    tiers = class_tiers(counts, wanted.many_above, wanted.few_below)
    few = [name for name, tier in zip(dataset.classes, tiers, strict=True) if tier == "few"]
    said = [
        f"# {config.data.name}: {len(table.rows)} methods, {len(table.reads)} trainings",
        f"Test: {table.samples} images of {table.groups} groups; {tested}. Everything was chosen on val.",
        f"Training images: {_listed(dict(zip(dataset.classes, counts.tolist(), strict=True)))}; few-shot: "
        f"{', '.join(few)}.",
        *_budgets(config, dataset),
        f"Figures are means over the seeds {', '.join(map(str, seeds))}, sd their standard deviation. In brackets 95 % "
        f"intervals over {wanted.bootstrap_samples} resamples of test's groups, the same for all methods and seeds. "
        f"Differences are paired, of balanced accuracy; the baseline is {table.baseline}, the best one-stage method by "
        f"val {table.best_one_stage}.",
    ]
    if table.left_out:
        said.append(f"Left out, as every head of the family had diverged: {', '.join(table.left_out)}.")
    lines = [f"| method | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for row in table.rows:
        cells = _cells(row)
        strong = "**" if row["kind"] == OURS else ""
        lines.append(f"| {strong}{row['description']}{strong} | {' | '.join(cells)} |")
    return "\n\n".join([*said, "\n".join(lines)]) + "\n"


def terminal_table(table: StudyTable) -> Table:
    """The same for the terminal."""
    shown = Table(title=f"Test: {table.samples} images, 95 % intervals", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("method", *COLUMNS):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in table.rows:
        shown.add_row(row["description"], *_cells(row), style="bold" if row["kind"] == OURS else None)
    return shown


def _budgets(config: Config, dataset: Dataset) -> list[str]:
    """What each training was given; trainings with the same are told together."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in config.study.all_trainings:
        of = training_config(config, name, "")
        stage = of.stage_one
        given = (
            f"{of.model.backbone} at {of.data.image_px} px, {stage.epochs} epochs of {len(dataset.index('train'))} "
            f"images in {stage.views} view{'s' * (stage.views > 1)}, batch {stage.batch_size}"
        )
        if of.features.views > 1:
            given += f", heads on {of.features.views} views"
        if of.model.mirrors != "none":
            given += f", tested on the mean over {1 + len(MIRRORED_DIMS[of.model.mirrors])} mirror images"
        if name in config.study.search:
            given += f", settings found in {config.search.trials} trials"
        alike[given].append(training_name(name))
    heads = f"{config.stage_two.heads} heads of {len(config.stage_two.families)} families on the features of each."
    if len(alike) == 1:
        return [f"Each training: {next(iter(alike))}; {heads}"]
    return [*(f"{', '.join(names)}: {given}." for given, names in alike.items()), heads]


def _cells(row: dict[str, Any]) -> list[str]:
    """A row's figures in the order of the columns."""
    cells = []
    for name in COLUMNS.values():
        signed, keys = "_minus_" in name, (name, f"{name}_low", f"{name}_high")
        if keys[1] not in row:
            cells.append(_number(row[name]))
        elif signed and not any(row[key] for key in keys):  # from itself
            cells.append("-")
        else:
            value, low, high = (_number(row[key], signed) for key in keys)
            cells.append(f"{value} ({low} to {high})")
    return cells


def _number(value: float | None, signed: bool = False) -> str:
    """`.732`, and `+.144` of a difference."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("0.", ".", 1)


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())
