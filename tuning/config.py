"""Configuration of the searches, and the whole configuration of a run."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from cluster.config import Section, nearest
from trainer.config import TrainerConfig

HeadFamily = Literal[
    "crt",
    "progressive",
    "reweighted",
    "balanced_softmax",
    "logit_adjusted",
    "label_aware_smoothing",
    "over_smoothing",
    "lws",
    "cosine",
    "ldam_drw",
    "logit_adjustment",
    "tau_norm",
    "nearest_class_mean",
]
ALL_FAMILIES: tuple[HeadFamily, ...] = get_args(HeadFamily)


class SpaceConfig(Section):
    """Ranges of the knobs; [low, high]. A family that has no such knob passes it over."""

    power: tuple[float, float] = Field((0.0, 1.0), description="q of the sampling p_c ~ n_c^q, uniform")
    tau: tuple[float, float] = Field((0.0, 2.0), description="tau-norm and logit adjustment, uniform")
    lr: tuple[float, float] = Field(
        (0.1, 30.0), description="SGD on features standardised to a mean squared length of 1, log-uniform"
    )
    weight_decay: tuple[float, float] = Field((1e-6, 1e-2), description="On the same features, log-uniform")
    epochs: tuple[int, int] = Field((5, 30), description="uniform")
    beta: tuple[float, float] = Field(
        (0.9, 1.0),
        description="Class weights (1 - beta) / (1 - beta^n), log-uniform in 1 - beta; 1 = their limit, 1 / n",
    )
    smoothing: tuple[float, float] = Field(
        (0.1, 0.5), description="Label-aware smoothing of the commonest class, uniform"
    )
    smoothing_tail: tuple[float, float] = Field((0.0, 0.1), description="And of the rarest, uniform")
    over_smoothing: tuple[float, float] = Field((0.9, 0.99), description="Smoothing of label over-smoothing, uniform")
    margin: tuple[float, float] = Field((0.1, 0.5), description="LDAM's largest margin, uniform")
    scale: tuple[float, float] = Field((8.0, 40.0), description="Scale of cosine heads, log-uniform")

    @model_validator(mode="after")
    def _ranges_make_sense(self) -> SpaceConfig:
        for name, (lowest, highest) in _BOUNDS.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} = [{low:g}, {high:g}] must be [low, high] within [{lowest:g}, {highest:g}]")
        return self


_BOUNDS = {
    "power": (0.0, 1.0),
    "tau": (0.0, 100.0),
    "lr": (1e-9, 1e9),
    "weight_decay": (1e-12, 1.0),
    "epochs": (1, 10_000),
    "beta": (0.0, 1.0),
    "smoothing": (0.0, 0.999),
    "smoothing_tail": (0.0, 0.999),
    "over_smoothing": (0.0, 0.999),
    "margin": (0.0, 2.0),
    "scale": (0.01, 1000.0),
}


class StageTwoConfig(Section):
    """The search over heads. Choices are made on val; test is not touched."""

    families: tuple[HeadFamily, ...] = Field(ALL_FAMILIES, min_length=1, description="Kinds of heads that are tried")
    heads: int = Field(512, ge=1, description="Head configurations tried in all")
    heads_per_trial: int = Field(32, ge=1, description="Heads trained together in one Ray Tune trial")
    batch_size: int = Field(256, ge=1, description="Features a step")
    space: SpaceConfig = SpaceConfig()
    select_by: Literal["balanced_accuracy", "macro_f1", "worst_recall"] = Field(
        "balanced_accuracy", description="Metric on val by which heads are compared"
    )
    folds: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="Folds of val by groups: heads are trained on train and the other folds; 1 = on train alone; "
        "auto = 5 where some class has fewer than 50 images in val",
    )
    finalists: int = Field(
        8, ge=1, description="Best heads that are trained again with other seeds; then one is chosen"
    )
    seeds: int = Field(3, ge=1, description="Seeds of each finalist; 1 = the choice is made at once")
    double_correction: bool = Field(
        False, description="Let families whose loss makes up for the class frequencies draw by space.power as well"
    )


class Range(Section):
    """What a searched setting may be: exactly one of the four."""

    uniform: tuple[float, float] | None = Field(None, description="[low, high]")
    log_uniform: tuple[float, float] | None = Field(None, description="[low, high], both above 0")
    integers: tuple[int, int] | None = Field(None, description="[low, high], both included")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="The values themselves")

    @model_validator(mode="after")
    def _one_of_them(self) -> Range:
        given = [name for name in ("uniform", "log_uniform", "integers", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            kinds = " and ".join(given) or "no range"
            raise ValueError(f"{kinds} given; give exactly one of uniform, log_uniform, integers, choice")
        bounds = self.uniform or self.log_uniform or self.integers
        if bounds and (bounds[0] > bounds[1] or (self.log_uniform and bounds[0] <= 0)):
            raise ValueError(
                f"{given[0]} = [{bounds[0]:g}, {bounds[1]:g}] must be [low, high], and above 0 for log_uniform"
            )
        return self


class SearchConfig(Section):
    """The search over stage one, each trial judged by what a small stage two makes of its features."""

    trials: int = Field(24, ge=1, description="Settings tried in all")
    space: dict[str, Range] = Field({}, description="Setting, e.g. stage_one.loss.margin -> range; {} = by the loss")
    sampler: Literal["optuna", "random"] = Field("optuna", description="optuna = its TPE sampler")
    scheduler: Literal["asha", "none"] = Field("asha", description="asha stops trials that fall behind")
    first_epochs: int = Field(2, ge=1, description="Epochs before the first comparison")
    reduction: int = Field(3, ge=2, description="Of so many trials one goes on, to so many times the epochs")
    heads: int = Field(48, ge=1, description="Heads of the small stage two")
    finalists: int = Field(2, ge=1, description="Best settings that are trained again with other seeds")
    seeds: int = Field(2, ge=1, description="Seeds of each finalist; 1 = the choice is made at once")
    cpus_per_trial: float = Field(1.0, gt=0, description="Cores reserved for each trial")
    gpus_per_trial: float = Field(0.5, gt=0, description="Share of a GPU, where there is one")


_ONE_STAGE = {"stage_one.loss.name": "none", "stage_one.memory.rows": 0}
_RAW_FEATURES = {"stage_one.loss.compare": "feature", "stage_one.loss.normalise": False}
STANDARD_TRAININGS: dict[str, dict[str, Any]] = {
    "cross_entropy": _ONE_STAGE,
    "balanced_sampling": {**_ONE_STAGE, "stage_one.sampling.power": 0.0},
    "balanced_softmax": {**_ONE_STAGE, "stage_one.classification.name": "balanced_softmax"},
    "focal": {**_ONE_STAGE, "stage_one.classification.name": "focal"},
    "ldam_drw": {
        **_ONE_STAGE,
        "stage_one.classification.name": "ldam",
        "stage_one.classification.reweight_from": 0.8,
        "model.cosine_scale": 30.0,
    },
    # The metric losses of arXiv 2207.06975 with the settings of its code, see configs/paper_*.yaml.
    "batch_hard_triplet": {
        **_RAW_FEATURES,
        "stage_one.loss.name": "batch_hard_triplet",
        "stage_one.loss.margin": 50.0,
        "stage_one.loss.weight": 0.03,
    },
    "centre": {
        **_RAW_FEATURES,
        "stage_one.loss.name": "centre",
        "stage_one.loss.weight": 0.07,
        "stage_one.loss.lr_ratio": 10.0,  # AdamW takes steps of lr whatever lambda is; 71 is of the code's SGD
    },
    "supervised_contrastive": {
        "stage_one.loss.name": "supervised_contrastive",
        "stage_one.loss.temperature": 0.05,
        "stage_one.loss.weight": 1.0,
    },
}
"""What a study trains by default, as settings laid over its configuration."""


class StudyConfig(Section):
    """A table of methods x seeds on one packed dataset: `rarelens study`. Each training with each seed is a cell."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="One column of cells each"
    )
    trainings: dict[str, dict[str, Any]] = Field(
        {},
        description="Name -> settings laid over the configuration, beside the standard trainings; under the name of "
        "one of these they are laid over it",
    )
    only: tuple[str, ...] = Field((), description="Trainings of the table; () = all")
    baseline: str = Field("cross_entropy", description="Training whose own classifier every method is compared with")
    rows: Literal["main", "all"] = Field(
        "main",
        description="main = each training as it is, the well-known heads on the baseline's features and the "
        "searched head on those of metric losses; all = each training with each head",
    )
    search: tuple[str, ...] = Field(
        (), description="Trainings whose settings the section `search` finds first, once for all seeds"
    )
    chosen_from: tuple[str, ...] = Field(
        (),
        description="Trainings among which the searched two-stage chooses, with the head, on val; () = those with a "
        "metric loss",
    )

    @property
    def all_trainings(self) -> dict[str, dict[str, Any]]:
        """The table's trainings by name, with their settings as they are written."""
        settings = {
            name: {**STANDARD_TRAININGS.get(name, {}), **self.trainings.get(name, {})}
            for name in (*STANDARD_TRAININGS, *self.trainings)
        }
        return {name: settings[name] for name in self.only or settings}

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ, not {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _names_are_known(self) -> StudyConfig:
        odd = [name for name in self.trainings if not re.fullmatch(r"[A-Za-z0-9_]+", name)]
        if odd:
            raise ValueError(f"trainings: {odd[0]!r} names a folder; use letters, digits and _")
        known = [*STANDARD_TRAININGS, *self.trainings]
        for field in ("only", "search", "chosen_from", "baseline"):
            names = (self.baseline,) if field == "baseline" else getattr(self, field)
            trainings = known if field == "only" else list(self.all_trainings)
            for name in names:
                if name not in trainings:
                    raise ValueError(f"{field}: {name!r} is none of the trainings; {nearest(name, trainings)}")
        return self


class Config(TrainerConfig):
    """A whole run: what `rarelens train` reads."""

    folds: int = Field(
        1,
        ge=1,
        description="Cross-validation: train and val are cut together into so many parts, by groups, and all is done "
        "once with each of them as val, in RUN/folds/NUMBER; 1 = one run",
    )
    stage_two: StageTwoConfig = StageTwoConfig()
    search: SearchConfig = SearchConfig()
    study: StudyConfig = StudyConfig()

    @model_validator(mode="after")
    def _folds_are_cut_at_packing(self) -> Config:
        if self.folds > 1 and self.data.packed is not None:
            raise ValueError(
                f"folds = {self.folds} cuts train and val anew, and data.packed = {self.data.packed} is cut already; "
                "give source.path and leave data.packed out"
            )
        return self
