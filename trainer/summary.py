"""What a run ends with in the terminal: the table of results and where report and model lie."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.run import RunFolder
from trainer.metrics import TIERS
from trainer.usage import predict_command

TABLE_COLUMNS = 110


def print_summary(run: RunFolder) -> None:
    """Print `model/metrics.json` as a table, the paths of the report and of the model, and the command that uses it."""
    metrics = run.need_json("model/metrics.json", "rarelens evaluate")
    test = metrics["test"]
    table = Table(
        title=f"Test: {test['samples']} images, {test['groups']} groups; balanced accuracy and recalls",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("model", no_wrap=True)
    for name in ("balanced", "95 % interval", "macro F1", "worst", *TIERS):
        table.add_column(name, justify="right", no_wrap=True)
    for row in metrics["rows"]:
        low, high = row["interval"]
        table.add_row(
            row["description"],
            f"{row['balanced_accuracy']:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{row['macro_f1']:.3f}",
            f"{row['worst_recall']:.3f}",
            *("-" if row[tier] is None else f"{row[tier]:.3f}" for tier in TIERS),
            style="bold" if row["name"] == metrics["model"] else None,
        )
    console = Console()
    console.width = max(console.width, TABLE_COLUMNS)  # a file or a job's log has no width; 80 would cut the table
    console.print(table)
    for name, difference in metrics["differences"].items():
        low, high = difference["interval"]
        console.print(f"{name}: {difference['value']:+.3f} ({low:+.3f} to {high:+.3f})", highlight=False)
    if metrics["fine_tuning"]:
        console.print(metrics["fine_tuning"], highlight=False, soft_wrap=True)
    model = f"{run.uri}/model"
    ends = (f"report: {model}/report.html", f"model:  {model}", f"use it: {predict_command(model)}")
    console.print("\n".join(ends), highlight=False, markup=False, soft_wrap=True)
