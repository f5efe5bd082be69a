"""What a run ends with in the terminal: the table of results and where report and model lie."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.run import RunFolder


def print_summary(run: RunFolder) -> None:
    """Print `model/metrics.json` as a table, and the paths of the report and of the model."""
    metrics = run.read_json("model/metrics.json")
    test = metrics["test"]
    table = Table(title=f"Test: {test['samples']} images, {test['groups']} groups", title_justify="left")
    table.add_column("model")
    for name in ("balanced accuracy", "95 % interval", "macro F1", "worst class", "many / medium / few"):
        table.add_column(name, justify="right")
    for row in metrics["rows"]:
        low, high = row["interval"]
        shares = " / ".join("-" if row[part] is None else f"{row[part]:.3f}" for part in ("many", "medium", "few"))
        table.add_row(
            row["description"],
            f"{row['balanced_accuracy']:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{row['macro_f1']:.3f}",
            f"{row['worst_recall']:.3f}",
            shares,
            style="bold" if row["name"] == "winner" else None,
        )
    console = Console()
    console.print(table)
    for name, difference in metrics["differences"].items():
        low, high = difference["interval"]
        console.print(f"{name}: {difference['value']:+.3f} ({low:+.3f} to {high:+.3f})", highlight=False)
    console.print(f"report: {run.uri}/model/report.html\nmodel:  {run.uri}/model", highlight=False, soft_wrap=True)
