"""Stage two's search: three rounds of heads, chosen on val alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.errors import UserError
from cluster.progress import console
from trainer.closed_forms import fit_temperature
from trainer.feature_mirror import fetch_features
from trainer.features import MANIFEST_FILE, read_features
from trainer.heads import KNOBS, Head, HeadSpec, save_heads
from trainer.stage_two import predict
from tuning.block import BlockTrial, Job, fill_scores
from tuning.choice import Judge, finalists, lower_bound, luck
from tuning.config import StageTwoConfig
from tuning.folds import number_of_folds
from tuning.results import (
    OWN,
    WINNER_FILE,
    Row,
    SearchResult,
    choose,
    head_row,
    merit,
    read_results,
    said_of_choice,
    write_results,
)
from tuning.rounds import Round, run_round
from tuning.space import blocks_of, draw_specs

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset
    from tuning.config import Config

FOLDER = "stage_two"
LOGITS_BYTES = 2 * 2**30
"""What a trial's kept heads may say about val in all, in float32; a single head may say more."""


def search_stage_two(config: Config, dataset: Dataset, run: RunFolder) -> SearchResult:
    """Search the heads on the run's features and leave the outcome in `stage_two/` of the run folder; done once.

    Args:
        config: The whole configuration.
        dataset: The packed dataset.
        run: The run folder; it holds stage one's checkpoint and the features of train and val.
    """
    from cluster.launch import resolve_workers, start_ray
    from trainer.extraction import TRAIN_AND_VAL, fetch_checkpoint
    from trainer.stage_checkpoint import load_classifier

    if run.storage.exists(f"{FOLDER}/{WINNER_FILE}"):
        return read_results(run.fetch(FOLDER))
    trained = run.read_json("stage_one/result.json")
    assert trained is not None, "stage one comes first"
    checkpoint = fetch_checkpoint(run, trained["checkpoint"])
    own = load_classifier(checkpoint, config, len(dataset.classes)).own_head()
    start_ray(config.cluster)
    _, device = resolve_workers(config.cluster)
    result = search_heads(
        f"{run.uri}/{TRAIN_AND_VAL.folder}",
        own,
        len(dataset.classes),
        config.stage_two,
        config.seed,
        f"{run.uri}/{FOLDER}",
        gpus_per_trial=0.25 if device == "cuda" else 0.0,
    )
    write_results(run.path(f"{FOLDER}/{WINNER_FILE}").parent, result)
    run.publish(FOLDER)
    console.print(f"stage two: {said_of_choice(result)}", highlight=False, soft_wrap=True)
    return result


def search_heads(
    features: str | Path,
    own: Head,
    num_classes: int,
    config: StageTwoConfig,
    seed: int,
    storage_uri: str,
    *,
    gpus_per_trial: float = 0.0,
    trial: type[BlockTrial] = BlockTrial,
) -> SearchResult:
    """Make and score the heads that `config` asks for, and choose on val.

    Three rounds: all heads once; the best of them again with other seeds, from which one is chosen by a lower bound;
    the chosen head of each family on all that may be trained on. Finished blocks lie below `storage_uri`, in folders
    named after everything that decides their content: the same search goes on where it was stopped, another one never
    meets its files. Ray must be initialised.

    Args:
        features: Of train and val: a path that every trial reaches, or an s3:// URI.
        own: Stage one's classifier, on raw features.
        num_classes: C.
        config: Families, budget, ranges, metric, folds, finalists.
        seed: The run's seed.
        storage_uri: Folder or s3:// URI for the blocks.
        gpus_per_trial: Share of a GPU for each trial; 0 = one core.
        trial: What a Tune trial runs.

    Returns:
        A row for every head, the chosen head of each family, the winner. Heads of trials that failed have no score;
        a family whose chosen head could not be made once more has none.

    Raises:
        UserError: The features are missing, every trial of the first round failed, or the winner's of the last.
    """
    rounds = _Rounds(features, own, num_classes, config, storage_uri, gpus_per_trial, trial)
    specs = [HeadSpec(OWN), *draw_specs(config, seed)]
    rows, predictions, _ = rounds.run("heads", specs[1:])
    own_row, own_says = rounds.judge_own()
    rows, predictions = [own_row, *rows], np.concatenate([own_says, predictions])
    if config.seeds > 1:
        _repeat_finalists(rounds, rows, predictions, specs, seed)

    # --- the chosen head of each family, on all that may be trained on
    chosen = choose(rows)
    kept = {family: row for family, row in chosen.items() if family != OWN}
    winner = max(chosen.values(), key=merit)["family"]
    heads = {OWN: rounds.own}
    remade = _make_chosen(rounds, [specs[row["head"]] for row in kept.values()])
    for (family, row), (again, head) in zip(kept.items(), remade, strict=True):
        if head is not None and again["status"] == "done":
            row["temperature"], heads[family] = again["temperature"], head
            continue
        row["error"] = again["error"] or again["status"]
        if family == winner:
            raise UserError(
                f"the chosen {family} head could not be made once more: {row['error']}; mend that and run again"
            )
    done = [row["head"] for row in rows if row["status"] == "done"]
    return SearchResult(
        rows=rows,
        heads={family: heads[family] for family in chosen if family in heads},
        winner=winner,
        select_by=config.select_by,
        folds=rounds.folds,
        luck=luck(rounds.judge, predictions[done]),
    )


def _make_chosen(rounds: _Rounds, specs: list[HeadSpec]) -> list[tuple[Row, Head | None]]:
    """Rows and heads of the last round; what a trial has lost is made once more, each head in a trial of its own."""
    if not specs:  # every head diverged
        return []
    rows, _, heads = rounds.run("chosen", specs, keep=True)
    lost = [i for i, row in enumerate(rows) if row["status"] == "failed"]
    if lost and len(specs) > 1:
        again, _, made = rounds.run("chosen", [specs[i] for i in lost], keep=True, alone=True)
        for i, row, head in zip(lost, again, made, strict=True):
            rows[i], heads[i] = row, head
    return list(zip(rows, heads, strict=True))


def _repeat_finalists(
    rounds: _Rounds, rows: list[Row], predictions: np.ndarray, specs: list[HeadSpec], seed: int
) -> None:
    """Train the best heads again with other seeds, and fill their rows' lower bounds."""
    final, more = finalists(rows, rounds.config.finalists), rounds.config.seeds - 1
    again = [row["head"] for row in final if "seed" in KNOBS[row["family"]]]
    repeats = [replace(specs[head], seed=seed + 1 + s) for head in again for s in range(more)]
    others, said, _ = rounds.run("finalists", repeats) if repeats else ([], predictions[:0], [])
    sound = np.array([other["status"] == "done" for other in others], dtype=bool)
    for row in final:
        ours = predictions[row["head"]][None]
        if row["head"] in again:
            mine = slice(again.index(row["head"]) * more, (again.index(row["head"]) + 1) * more)
            ours = np.concatenate([ours, said[mine][sound[mine]]])
        row["seeds"] = len(ours)
        row["seeds_score"], row["lower_bound"] = lower_bound(rounds.judge, ours)


class _Rounds:
    """What the rounds of one search share."""

    def __init__(
        self,
        features: str | Path,
        own: Head,
        num_classes: int,
        config: StageTwoConfig,
        storage_uri: str,
        gpus_per_trial: float,
        trial: type[BlockTrial],
    ):
        self._features_uri, self._storage_uri = _absolute(features), _absolute(storage_uri)
        self._features = fetch_features(features)
        self.config, self._gpus, self._trial = config, gpus_per_trial, trial
        self.own = Head(own.weight.float().cpu(), own.bias.float().cpu(), own.normalise)
        self._val = read_features(self._features, "val")
        self._num_classes = num_classes
        self.folds = number_of_folds(config.folds, self._val.labels, self._val.groups)
        self.judge = Judge(self._val.labels, self._val.groups, num_classes, config.select_by)

    def run(self, name: str, specs: list[HeadSpec], *, keep: bool = False, alone: bool = False) -> Round:
        """Rows, predictions on val and, with `keep`, the heads; `alone` = each in a trial of its own.

        The later rounds are few trials, often one: that all of them fail ends only the first.
        """
        heads_per_trial = 1 if alone else self.config.heads_per_trial
        if keep:  # their logits on val are held, for the temperature
            heads_per_trial = min(heads_per_trial, max(1, LOGITS_BYTES // (4 * len(self._val) * self._num_classes)))
        settings = [name, self.folds, self.config.select_by, heads_per_trial]
        job = Job(
            features_uri=self._features_uri,
            blocks=blocks_of(specs, heads_per_trial),
            own=self.own,
            num_classes=self._num_classes,
            select_by=self.config.select_by,
            folds=self.folds,
            storage_uri=f"{self._storage_uri}/{name}-{fingerprint(self._features, self.own, settings, specs)}",
            device="cuda" if self._gpus else "cpu",
            keep=keep,
        )
        return run_round(job, self._gpus, self._trial, all_may_fail=name != "heads")

    def judge_own(self) -> tuple[Row, np.ndarray]:
        """Row and predictions [1, N] of stage one's own classifier."""
        row, says = head_row(0, HeadSpec(OWN), None), predict([self.own], self._val.x)
        fill_scores([row], says, np.ones(1, dtype=bool), self.judge)
        logits = self.own.logits(torch.from_numpy(np.array(self._val.x)))
        row["temperature"] = fit_temperature(logits, torch.from_numpy(self._val.labels))
        return row, says


def _absolute(place: str | Path) -> str:
    """Trials work in folders of their own, where a relative path would mean another place."""
    return str(place) if "://" in str(place) else str(Path(place).resolve())


def fingerprint(features_folder: str | Path, own: Head, settings: list[Any], specs: list[HeadSpec]) -> str:
    """Short hash of everything that decides what the blocks contain."""
    parts = [
        (Path(features_folder) / MANIFEST_FILE).read_bytes(),
        save_heads({OWN: own}),
        json.dumps([settings, *map(asdict, specs)]).encode(),
    ]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]
