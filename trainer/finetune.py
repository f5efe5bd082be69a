"""Stage one's network and the search's winning head, trained on together on images: the search proposes, this confirms.

The loop, the loader and the engine are stage one's; what differs is where the training begins (`StartingPoint`) and the
settings that follow from the winner.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.run import RunFolder
from data_pipeline.config import SamplingConfig
from data_pipeline.dataset import Dataset
from trainer.classifiers import CosineLinear, classifier_of
from trainer.config import MemoryConfig, OptimiserConfig, StageOneConfig, TrainerConfig
from trainer.extraction import Extraction, fetch_checkpoint
from trainer.head_objectives import DRW_FROM
from trainer.heads import Head, load_heads, save_heads
from trainer.loss_config import ClassificationConfig, LossConfig
from trainer.model import Classifier
from trainer.stage_checkpoint import load_classifier
from trainer.stage_one import train_stage_one
from trainer.starting_point import HEAD, StartingPoint

NAME = "fine_tuned"
"""Folder of the training below the run folder, and name of the row in the result table."""
START_FILE = f"{NAME}/start.safetensors"
CHOICE_FILE = f"{NAME}/choice.json"
VAL = Extraction(NAME, ("val",), f"features/{NAME}")
TEST = Extraction(NAME, ("test",), f"features/{NAME}_test")
TRAIN = Extraction(NAME, ("train",), f"features/{NAME}_train")

SHARE_OF_STAGE_ONES_LR = 0.1


@dataclass(frozen=True)
class FineTuning:
    """The fine-tuning of a winner.

    Attributes:
        config: The run's configuration with stage one's section changed into that of the fine-tuning.
        start: The head that it starts from, which has not seen val.
    """

    config: TrainerConfig
    start: Head

    @classmethod
    def of(cls, config: TrainerConfig, run: RunFolder, winner: Mapping[str, Any]) -> FineTuning:
        """The one that a run holds.

        Args:
            config: The run's.
            run: The run folder.
            winner: `stage_two/winner.json`.
        """
        return fine_tuning(config, winner, load_heads(run.fetch(START_FILE))[HEAD], winner["select_by"])

    def train(self, dataset: Dataset, run: RunFolder) -> dict[str, Any]:
        """Train on all workers; done once, and taken up again where it was stopped.

        Returns:
            What `train_stage_one` returns: checkpoint, epoch and metrics on val of the best epoch.
        """
        run.storage.write(START_FILE, save_heads({HEAD: self.start}))
        begun_with = run.need_json("stage_one/result.json", "rarelens stage-one")["checkpoint"]
        wanted = self.config.fine_tune
        start = StartingPoint(run.uri, begun_with, START_FILE, wanted.blocks, wanted.batch_norm == "reestimated")
        return train_stage_one(self.config, dataset, run, NAME, start)

    def outcome(self, dataset: Dataset, run: RunFolder) -> tuple[Classifier, Head]:
        """The network of the best epoch, and its classifier as a head on raw features."""
        trained = run.need_json(f"{NAME}/result.json", "rarelens train")
        checkpoint = fetch_checkpoint(run, trained["checkpoint"])
        model = load_classifier(checkpoint, self.config, len(dataset.classes))
        # A bias on features of unit length is stored as one on features as they are.
        return model, replace(model.own_head(), normalise=self.start.normalise)


def fine_tuning(config: TrainerConfig, winner: Mapping[str, Any], start: Head, select_by: str) -> FineTuning:
    """The settings under which a winner is fine-tuned.

    Args:
        config: The run's.
        winner: Family and knobs of the winning head, as in `winner.json`.
        start: That head.
        select_by: Metric on val by which the best epoch is chosen.
    """
    wanted, stage = config.fine_tune, config.stage_one
    sampling, classification = _follows_from(config, winner)
    optimiser = {
        **stage.optimiser.model_dump(),
        "lr": wanted.lr or SHARE_OF_STAGE_ONES_LR * stage.optimiser.lr,
        "warmup_epochs": wanted.warmup_epochs,
        "schedule": "cosine",
        "final_lr_share": 0.0,
        "milestones_epochs": (),
    }
    changes: dict[str, Any] = {
        "epochs": wanted.epochs,
        "views": 1,
        "loss": LossConfig(name="none", normalise=stage.loss.normalise),
        "memory": MemoryConfig(),
        "classification": classification,
        "sampling": sampling,
        "optimiser": OptimiserConfig(**optimiser),
        "select_by": select_by,
    }
    classifier = classifier_of(start)
    network = {
        "weights": None,  # they are stage one's
        "cosine_scale": classifier.scale if isinstance(classifier, CosineLinear) else None,
        "freeze_batch_norm": wanted.batch_norm == "frozen",
    }
    sections = {
        "stage_one": StageOneConfig(**{name: getattr(stage, name) for name in StageOneConfig.model_fields} | changes),
        "model": config.model.model_copy(update=network),
    }
    return FineTuning(config.model_copy(update=sections), start)


def _follows_from(config: TrainerConfig, winner: Mapping[str, Any]) -> tuple[SamplingConfig, ClassificationConfig]:
    """Sampling and loss: as configured, else the winner's own, so that nothing is corrected twice.

    Tau-norm and nearest class mean were not trained and hold no prior: sampling is balanced, which keeps it so.
    """
    sampling, loss = config.fine_tune.sampling, config.fine_tune.classification
    if winner["winner"] == "own":
        own_sampling, own_loss = config.stage_one.sampling, config.stage_one.classification
    else:
        own_loss = _loss_of(winner)
        own_sampling = SamplingConfig() if own_loss.corrects_frequencies else _sampling_of(winner)
    natural = SamplingConfig()
    if sampling is None and loss is not None and loss.corrects_frequencies and not loss.double_correction:
        return natural, loss
    if loss is None and sampling not in (None, natural) and own_loss.corrects_frequencies:
        return sampling or natural, ClassificationConfig()
    return sampling or own_sampling, loss or own_loss


def _loss_of(winner: Mapping[str, Any]) -> ClassificationConfig:
    family = winner["winner"]
    if family == "balanced_softmax":
        return ClassificationConfig(name="balanced_softmax")
    if family in ("logit_adjusted", "logit_adjustment"):
        return ClassificationConfig(name="logit_adjusted", tau=winner["tau"])
    if family == "reweighted":
        return ClassificationConfig(reweight_from=0.0, beta=winner["beta"])
    if family == "ldam_drw":
        return ClassificationConfig(name="ldam", margin=winner["margin"], reweight_from=DRW_FROM, beta=winner["beta"])
    if family == "over_smoothing":
        return ClassificationConfig(label_smoothing=winner["smoothing"])
    return ClassificationConfig()


def _sampling_of(winner: Mapping[str, Any]) -> SamplingConfig:
    family = winner["winner"]
    if family == "progressive":
        return SamplingConfig(power=1.0, power_last=winner["power"])
    return SamplingConfig(power=winner.get("power", 0.0))
