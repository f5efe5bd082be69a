"""What the search over stage one leaves: a row a trial, the configuration that won, the page with the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from tuning.choice import ONE_SIDED_95, expected_lead
from tuning.settings import short_value

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from tuning.config import Config

FOLDER = "search"
RESULTS_FILE = f"{FOLDER}/results.parquet"
BEST_FILE = f"{FOLDER}/best.yaml"
PAGE_FILE = f"{FOLDER}/search.html"
TERMINAL_ROWS = 12
ENDED = ("done", "stopped")
"""Trials with these are not run again."""


@dataclass
class TrialRow:
    """One trial.

    Attributes:
        trial: Its name, and that of its folder.
        round: `settings` or `seeds`.
        choices: Setting -> value.
        status: `done` (trained to the end), `stopped` (fell behind) or `failed`; in the live table also `under way`.
        epochs: After so many it was last judged.
        score: Then, of the best head of its small stage two on val; None where it was never judged.
        sd: Standard deviation of that score over resamples of val's groups.
        own: Then, of its own classifier.
        family: Then, of the best head.
        ended_s: Seconds from the search's start until then.
        error: Why it failed.
        seeds: How many seeds a finalist was trained with.
        seeds_score: Mean score over them.
        lower_bound: One-sided 95 % bound of that mean.
        lines: All that it said, by epoch.
    """

    trial: str
    round: str
    choices: dict[str, Any]
    status: str
    epochs: int = 0
    score: float | None = None
    sd: float | None = None
    own: float | None = None
    family: str | None = None
    ended_s: float | None = None
    error: str | None = None
    seeds: int | None = None
    seeds_score: float | None = None
    lower_bound: float | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, trial: str, choices: dict[str, Any], lines: list[dict[str, Any]], status: str) -> TrialRow:
        """A row from what a trial has said so far."""
        row = cls(trial, "seeds" if "seed" in choices else "settings", choices, status, lines=lines)
        if lines:
            last = lines[-1]
            row.epochs, row.score, row.own, row.family = last["epochs"], last["score"], last["own"], last["family"]
            row.sd, row.ended_s = last["sd"], last["at_s"]
        return row

    def judge(self, scores: Sequence[float]) -> None:
        """Fill in what training with several seeds gave; `scores` are of each of them, this trial's own first."""
        of_seeds = np.var(scores, ddof=1) / len(scores) if len(scores) > 1 else 0.0
        self.seeds, self.seeds_score = len(scores), float(np.mean(scores))
        self.lower_bound = self.seeds_score - ONE_SIDED_95 * math.sqrt((self.sd or 0.0) ** 2 + of_seeds)


def best_trial(rows: Sequence[TrialRow]) -> TrialRow:
    """Of the finalists the one with the highest lower bound, else the best of those that were trained to the end, else
    of those that were trained longest."""

    def merit(row: TrialRow) -> tuple[float, ...]:
        bound = -math.inf if row.lower_bound is None else row.lower_bound
        epochs = math.inf if row.status == "done" else row.epochs
        return bound, epochs, row.score if row.score is not None else -math.inf

    return max((row for row in rows if row.round == "settings"), key=merit)


def said_of_luck(rows: Sequence[TrialRow]) -> str:
    """How much of the winner's lead over the median trial is luck; empty where there is nothing to compare."""
    settings = [row for row in rows if row.round == "settings" and row.score is not None]
    noise = [row.lines[-1]["noise"] for row in settings if row.lines and "noise" in row.lines[-1]]
    if len(noise) < 2:
        return ""
    lead = (best_trial(rows).score or 0.0) - float(np.median([row.score for row in settings]))
    return (
        f"The winner leads the median trial by {100 * lead:.1f} points on val; if all {len(noise)} were equally good, "
        f"the best of them would lead by {100 * expected_lead(np.array(noise)):.1f} points by luck alone."
    )


def write_trials(run: RunFolder, config: Config, rows: Sequence[TrialRow], names: Sequence[str]) -> None:
    """Write `results.parquet`, `search.html` and, last, `best.yaml`.

    Args:
        run: The run folder.
        config: The configuration before any trial's choices.
        rows: All trials.
        names: The searched settings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tuning.pictures import search_page

    columns = []
    for row in rows:
        values = asdict(row)
        choices, lines = values.pop("choices"), values.pop("lines")
        values |= {name: _plain(choices.get(name)) for name in (*names, "seed")}
        columns.append({**values, "said": json.dumps(lines)})
    pq.write_table(pa.Table.from_pylist(columns), run.path(RESULTS_FILE))
    run.path(PAGE_FILE).write_text(search_page(config, rows, names), encoding="utf-8")
    for name in (RESULTS_FILE, PAGE_FILE):
        run.publish(name)
    run.storage.write(BEST_FILE, best_configuration(run, config, best_trial(rows)).encode())


def best_configuration(run: RunFolder, config: Config, best: TrialRow) -> str:
    """The winner's configuration as YAML that `rarelens train` takes as it is: a run of its own on the same dataset."""
    from tuning.settings import with_choices

    chosen = with_choices(config, best.choices)
    chosen = chosen.model_copy(update={"run": f"{run.uri}/best"})
    if config.folds == 1:  # folds are cut anew
        packed = config.data.packed or f"{run.uri}/dataset"
        chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"packed": packed})})
    bound = "" if best.lower_bound is None else f", at least {best.lower_bound:.3f} over {best.seeds} seeds (95 %)"
    said = f"# Trial {best.trial}: {config.stage_two.select_by} {best.score:.3f} on val{bound}.\n"
    return said + yaml.safe_dump(chosen.model_dump(mode="json"), sort_keys=False)


def trials_table(config: Config, rows: Sequence[TrialRow], names: Sequence[str]) -> Table:
    """The best trials, for the terminal."""
    title = f"Search: {len(rows)} trials, {config.stage_two.select_by.replace('_', ' ')} on val"
    caption = said_of_luck(rows)
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=SIMPLE_HEAD)
    for heading in ("trial", "status", "epochs", "score", "own", "lower bound", "head"):
        table.add_column(heading, justify="left" if heading in ("trial", "status", "head") else "right", no_wrap=True)
    for name in names:
        table.add_column(name.rpartition(".")[2], justify="right", no_wrap=True, max_width=24)
    shown = sorted((row for row in rows if row.round == "settings"), key=lambda row: -(row.score or -1.0))
    best = best_trial(rows) if shown else None
    for row in shown[:TERMINAL_ROWS]:
        figures = (row.score, row.own, row.lower_bound)
        table.add_row(
            row.trial,
            row.status,
            str(row.epochs),
            *("-" if value is None else f"{value:.3f}" for value in figures),
            row.family or "-",
            *(short_value(row.choices.get(name)) for name in names),
            style="bold" if row is best else "dim" if row.status == "failed" else None,
        )
    return table


def _plain(value: Any) -> Any:
    """A value that fits into a column: lists and mappings as JSON."""
    return json.dumps(value) if isinstance(value, (list, dict, tuple)) else value
