"""What a search leaves in the run folder: the table of all heads, the winner and why, the best heads themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from trainer.heads import FAMILY_NAMES, Head, HeadSpec, load_heads, save_heads

TABLE_FILE = "results.parquet"
WINNER_FILE = "winner.json"
HEADS_FILE = "heads.safetensors"
SCORES = ("balanced_accuracy", "macro_f1", "worst_recall")
OWN = "own"
KNOB_TYPES = {
    field.name: str(field.type) for field in fields(HeadSpec) if field.name not in ("family", "double_correction")
}
"""Every knob of every family, in HeadSpec's order, with its type."""

Row = dict[str, Any]


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search over heads; every score is on val.

    Attributes:
        rows: A row a head, in the order in which they were drawn, stage one's own classifier first: `head`, `family`,
            the knobs (None where the family has no such knob), `trial` (None for `own`), `status` ("done", "diverged"
            or "failed"), `score` (the metric by which heads are compared), all of `SCORES`, `error`. Scores are None
            unless the head is done. Finalists also have `seeds`, `seeds_score` (mean over them) and `lower_bound`;
            the head of each family that is kept has `temperature`.
        heads: The chosen head of every family that has one, by family, and `own`.
        winner: Family of the chosen head.
        select_by: The metric by which heads are compared.
        folds: Folds of val in which heads were scored; 1 = they were trained on train alone.
        luck: By how much the best of so many heads seems better than it is, if all were equally good.
    """

    rows: list[Row]
    heads: dict[str, Head]
    winner: str
    select_by: str
    folds: int = 1
    luck: float = 0.0

    def best_row(self, family: str) -> Row:
        """The row of a family's chosen head."""
        return choose(row for row in self.rows if row["family"] == family)[family]


def rank(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Sort key of a head, larger is better: its score, then the other scores, then the one that was drawn first.

    Validation sets are small and ties common; without a fixed rule the winner would depend on which trial came first.
    """
    if row["status"] != "done":
        return (-math.inf,)
    return (row["score"], *(row[name] for name in SCORES), -row["head"])


def merit(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Sort key for the choice: a finalist's lower bound comes before any score."""
    bound = row["lower_bound"]
    return (-math.inf if bound is None else bound, *rank(row))


def head_row(number: int, spec: HeadSpec, trial: int | None) -> Row:
    """The row of a head that has not been scored."""
    knobs = spec.knobs()
    return {
        "head": number,
        "family": spec.family,
        **{name: knobs.get(name) for name in KNOB_TYPES},
        "trial": trial,
        "status": "failed",
        "score": None,
        **dict.fromkeys(SCORES),
        **dict.fromkeys(("seeds", "seeds_score", "lower_bound", "temperature", "error")),
    }


def said_of_choice(result: SearchResult) -> str:
    """The winner, its lower bound, and how much of its lead is luck, for the terminal."""
    best, own, heads = result.best_row(result.winner), result.best_row(OWN), len(result.rows) - 1
    metric = result.select_by.replace("_", " ")
    said = f"{FAMILY_NAMES[result.winner]} is the winner: {metric} on val {best['score']:.3f}"
    if best["lower_bound"] is not None:
        seeds = f"{best['seeds']} seeds" if best["seeds"] > 1 else "one seed"
        said += f", {best['seeds_score']:.3f} over {seeds}, at least {best['lower_bound']:.3f} (one-sided 95 %)"
    if result.winner != OWN:
        lead = 100 * (best["score"] - own["score"])
        said += f". It leads stage one's own classifier by {lead:.1f} points"
    luck = f"if all {heads} heads were equally good, the best of them would lead by {100 * result.luck:.1f} points"
    return f"{said}; {luck} by luck alone."


def write_results(folder: str | Path, result: SearchResult) -> None:
    """Write `results.parquet`, `heads.safetensors` and, last, `winner.json`: where it is, the search is done."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(result.rows, schema=_schema()), folder / TABLE_FILE)
    (folder / HEADS_FILE).write_bytes(save_heads(result.heads, {"winner": result.winner}))
    best = result.best_row(result.winner)
    summary = {
        "winner": result.winner,
        "select_by": result.select_by,
        **{key: value for key, value in best.items() if key not in ("status", "error") and value is not None},
        "folds": result.folds,
        "luck": result.luck,
        "heads": len(result.rows) - 1,
        "failed": sum(row["status"] == "failed" for row in result.rows),
        "diverged": sum(row["status"] == "diverged" for row in result.rows),
        "temperatures": {family: result.best_row(family)["temperature"] for family in result.heads},
        "families": {family: result.best_row(family)["score"] for family in result.heads},
    }
    unfinished = folder / f"{WINNER_FILE}.partial"
    unfinished.write_text(json.dumps(summary, indent=2))
    unfinished.replace(folder / WINNER_FILE)


def read_results(folder: str | Path) -> SearchResult:
    """What `write_results` wrote.

    Raises:
        UserError: The search is not finished, or a file of it is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    if not (folder / WINNER_FILE).is_file():
        raise UserError(f"search {folder} holds no {WINNER_FILE}, so it is not finished; run `rarelens stage-two`")
    try:
        rows = pq.read_table(folder / TABLE_FILE).to_pylist()
        summary = json.loads((folder / WINNER_FILE).read_text())
    except (OSError, pa.ArrowInvalid, json.JSONDecodeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"search {folder} cannot be read ({message}); delete it and run `rarelens stage-two`") from None
    heads = load_heads(folder / HEADS_FILE)
    return SearchResult(
        rows, heads, summary["winner"], summary["select_by"], summary.get("folds", 1), summary.get("luck", 0.0)
    )


def choose(rows: Iterable[Row]) -> dict[str, Row]:
    """The chosen row of each family: of its finalists the one with the highest lower bound, else the best score.

    Families without a scored head are left out.
    """
    best: dict[str, Row] = {}
    for row in rows:
        family = row["family"]
        if row["status"] == "done" and (family not in best or merit(row) > merit(best[family])):
            best[family] = row
    return best


def _schema() -> Any:
    import pyarrow as pa

    arrow = {"float": pa.float64(), "int": pa.int64(), "bool": pa.bool_()}
    return pa.schema(
        [
            ("head", pa.int32()),
            ("family", pa.string()),
            *((name, arrow[kind]) for name, kind in KNOB_TYPES.items()),
            ("trial", pa.int32()),
            ("status", pa.string()),
            ("score", pa.float64()),
            *((name, pa.float64()) for name in SCORES),
            ("seeds", pa.int32()),
            *((name, pa.float64()) for name in ("seeds_score", "lower_bound", "temperature")),
            ("error", pa.string()),
        ]
    )
