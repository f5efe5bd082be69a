"""Whether fine-tuning on images beats the search's winner: both are judged on val, by images that neither has seen.

The winner's head is made anew on train alone, since the search's has seen val where val is small; fine-tuning starts
from it. What it has to beat is the winner as the search scored it, each fold of val by a head that did not see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.errors import UserError
from trainer.closed_forms import fit_temperature
from trainer.evaluate import DESCRIPTIONS
from trainer.extraction import TRAIN_AND_VAL, extract_features, fetch_checkpoint
from trainer.feature_mirror import fetch_features
from trainer.features import Features, read_features
from trainer.finetune import CHOICE_FILE, NAME, VAL, fine_tuning
from trainer.heads import KNOBS, PRIOR_AWARE_FAMILIES, Head, HeadSpec
from trainer.stage_checkpoint import load_classifier
from trainer.stage_two import predict
from tuning.block import BlockTrial, Job
from tuning.choice import Judge, paired_lower_bound
from tuning.results import Row
from tuning.rounds import run_round
from tuning.stage_two import fingerprint

if TYPE_CHECKING:
    from cluster.run import RunFolder
    from data_pipeline.dataset import Dataset
    from tuning.config import Config

SCALELESS_FAMILIES = ("tau_norm", "nearest_class_mean")
"""Their logits are made without a loss and may be of any size."""


@dataclass(frozen=True)
class Winner:
    """The search's winner, made anew on train alone.

    Attributes:
        head: On raw features.
        says: What the search's winner says about val, [N]: of each fold, by a head that did not see it.
    """

    head: Head
    says: np.ndarray


def fine_tune(config: Config, dataset: Dataset, run: RunFolder) -> dict[str, Any] | None:
    """Fine-tune the winner on images and say on val whether that is the model; done once.

    Args:
        config: The whole configuration.
        dataset: The packed dataset.
        run: The run folder, with stage one, the features of train and val, and stage two.

    Returns:
        What `fine_tuned/choice.json` holds: `chosen` (it becomes the model), `winner` (family), `select_by`, `score`
        and `winner_score` on val, their `difference` and its one-sided 95 % `lower_bound`, `epoch`, `temperature`,
        `says` in words. None where fine-tuning is off.

    Raises:
        UserError: The winner's head could not be made anew, or training failed.
    """
    if not config.fine_tune.epochs:
        return None
    done = run.read_json(CHOICE_FILE)
    if done is not None:
        return done
    chosen = run.need_json("stage_two/winner.json", "rarelens stage-two")
    val, classes = read_features(fetch_features(_features_of(run)), "val"), len(dataset.classes)
    winner = _winner_anew(config, dataset, run, chosen)

    tuning = fine_tuning(config, chosen, winner.head, config.stage_two.select_by)
    trained = tuning.train(dataset, run)
    (folder,) = extract_features(tuning.config, dataset, run, VAL)
    seen = read_features(folder, "val")
    assert np.array_equal(seen.rows, val.rows), "the same images can be read"
    _, head = tuning.outcome(dataset, run)

    judge = Judge(val.labels, val.groups, classes, config.stage_two.select_by)
    choice = {
        **_compare(judge, predict([head], seen.x)[0], winner.says),
        "winner": chosen["winner"],
        "epoch": trained["epoch"],
        "temperature": _temperature(head, seen),
    }
    choice["says"] = _in_words(config, choice)
    run.write_json(CHOICE_FILE, choice)
    return choice


def spec_of(chosen: Row) -> HeadSpec:
    """The winning head's family and knobs, from `winner.json`."""
    family = chosen["winner"]
    names = (*KNOBS[family], "power") if family in PRIOR_AWARE_FAMILIES else KNOBS[family]
    knobs = {name: chosen[name] for name in names if name in chosen}
    return HeadSpec(family, **knobs, double_correction=family in PRIOR_AWARE_FAMILIES and "power" in knobs)


def _winner_anew(config: Config, dataset: Dataset, run: RunFolder, chosen: Row) -> Winner:
    from cluster.launch import resolve_workers, start_ray

    start_ray(config.cluster)
    device = resolve_workers(config.cluster)[1]
    checkpoint = run.need_json("stage_one/result.json", "rarelens stage-one")["checkpoint"]
    own = load_classifier(fetch_checkpoint(run, checkpoint), config, len(dataset.classes)).own_head()
    spec, select_by = spec_of(chosen), config.stage_two.select_by

    def make(folds: int, keep: bool) -> tuple[Row, np.ndarray, Head | None]:
        decides = fingerprint(fetch_features(_features_of(run)), own, [NAME, folds, select_by, keep], [spec])
        job = Job(
            features_uri=_features_of(run),
            blocks=[[spec]],
            own=own,
            num_classes=len(dataset.classes),
            select_by=select_by,
            folds=folds,
            storage_uri=f"{run.uri}/{NAME}/heads-{decides}",
            device=device,
            keep=keep,
        )
        rows, says, heads = run_round(job, 0.25 if device == "cuda" else 0.0, BlockTrial)
        if rows[0]["status"] != "done":
            reason = rows[0]["error"] or "it diverged"
            raise UserError(
                f"the winning {spec.family} head could not be made on train alone: {reason}; set fine_tune.epochs=0 to "
                "do without fine-tuning, and give another run=..."
            )
        return rows[0], says[0], heads[0]

    row, says, head = make(folds=1, keep=True)
    assert head is not None
    if chosen["folds"] > 1:
        says = make(chosen["folds"], keep=False)[1]
    if spec.family in SCALELESS_FAMILIES:  # no decision changes, and the loss begins with probabilities
        head = Head(head.weight / row["temperature"], head.bias / row["temperature"], head.normalise)
    return Winner(head, says)


def _features_of(run: RunFolder) -> str:
    return f"{run.uri}/{TRAIN_AND_VAL.folder}"


def _compare(judge: Judge, ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    score, winner_score = judge.scores(np.stack([ours, theirs])).tolist()
    difference, bound = paired_lower_bound(judge, ours, theirs)
    return {
        "chosen": bound > 0,
        "select_by": judge.select_by,
        "score": score,
        "winner_score": winner_score,
        "difference": difference,
        "lower_bound": bound,
    }


def _temperature(head: Head, seen: Features) -> float:
    logits = head.logits(torch.from_numpy(np.asarray(seen.x, dtype=np.float32)))
    return fit_temperature(logits, torch.from_numpy(seen.labels))


def _in_words(config: Config, choice: dict[str, Any]) -> str:
    blocks = config.fine_tune.blocks
    names = {"all": "the whole network", 0: "the head", 1: "the last block"}
    what = names.get(blocks, f"the last {blocks} blocks")
    verdict = "so it is the model" if choice["chosen"] else "so the search's winner stays the model"
    return (
        f"Fine-tuning {what} from {DESCRIPTIONS[choice['winner']]} for {config.fine_tune.epochs} epochs changed "
        f"{choice['select_by'].replace('_', ' ')} on val by {100 * choice['difference']:+.1f} points, at least "
        f"{100 * choice['lower_bound']:+.1f} (one-sided 95 %), {verdict}."
    )
