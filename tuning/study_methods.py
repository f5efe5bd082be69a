"""The rows of a study's table: which head on which training's features."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.heads import FAMILY_NAMES
from tuning.config import Config
from tuning.results import OWN
from tuning.study_cells import training_config

SEARCHED = "searched"
"""The head that the search over all families chose on val; as a training, the one that was chosen with it."""
WELL_KNOWN_HEADS = ("logit_adjustment", "crt", "lws", "tau_norm", "nearest_class_mean")
TRAINING_NAMES = {
    "cross_entropy": "cross-entropy",
    "balanced_sampling": "cross-entropy, class-balanced sampling",
    "ldam_drw": "LDAM-DRW",
    "batch_hard_triplet": "batch-hard triplet",
    "centre": "centre loss",
}
"""Of standard trainings, where the name with spaces is not the usual one."""
ONE_STAGE, TWO_STAGE, METRIC, METRIC_TWO_STAGE, OURS = KINDS = (
    "one-stage",
    "two-stage",
    "metric loss",
    "metric loss, two-stage",
    "searched two-stage",
)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        training: Its name; `SEARCHED` = of each seed the one that scored best on val.
        head: `own`, a family of heads, or `SEARCHED`.
        kind: One of `KINDS`.
    """

    training: str
    head: str
    kind: str

    @property
    def name(self) -> str:
        """Unique in the table."""
        return SEARCHED if self.training == SEARCHED else f"{self.training}/{self.head}"

    @property
    def description(self) -> str:
        """For people."""
        if self.training == SEARCHED:
            return "searched two-stage (training and head by val)"
        trained = training_name(self.training)
        if self.head == OWN:
            return trained
        return f"{trained} + {'searched head' if self.head == SEARCHED else FAMILY_NAMES[self.head]}"


def training_name(training: str) -> str:
    """A training's name for people."""
    return TRAINING_NAMES.get(training, training.replace("_", " "))


def methods_of(config: Config) -> list[Method]:
    """All rows, kind by kind; the baseline first."""
    wanted = config.study
    trainings = sorted(wanted.all_trainings, key=lambda name: name != wanted.baseline)
    methods = [
        Method(training, head, _kind(training, head, has_metric_loss(config, training), wanted.baseline))
        for training in trainings
        for head in _heads(config, training)
    ]
    if chosen_from(config):
        methods.append(Method(SEARCHED, SEARCHED, OURS))
    return sorted(methods, key=lambda method: KINDS.index(method.kind))


def chosen_from(config: Config) -> tuple[str, ...]:
    """Trainings among which the searched two-stage chooses; by default all of the table with a metric loss."""
    trainings = config.study.all_trainings
    return config.study.chosen_from or tuple(name for name in trainings if has_metric_loss(config, name))


def has_metric_loss(config: Config, training: str) -> bool:
    """Whether a training compares images."""
    return training_config(config, training, "").stage_one.loss.name != "none"


def _heads(config: Config, training: str) -> tuple[str, ...]:
    families = config.stage_two.families
    if config.study.rows == "all":
        return (OWN, *families, SEARCHED)
    if training == config.study.baseline:
        return (OWN, *(head for head in WELL_KNOWN_HEADS if head in families), SEARCHED)
    return (OWN, SEARCHED) if has_metric_loss(config, training) else (OWN,)


def _kind(training: str, head: str, metric: bool, baseline: str) -> str:
    """Post-hoc logit adjustment of the baseline trains nothing: it counts as one stage."""
    if metric:
        return METRIC if head == OWN else METRIC_TWO_STAGE
    is_one_stage = head == OWN or (training == baseline and head == "logit_adjustment")
    return ONE_STAGE if is_one_stage else TWO_STAGE
