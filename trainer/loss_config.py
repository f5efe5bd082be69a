"""Configuration of the losses of stage one, and which of them ask what of the batches and of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config import Section
from data_pipeline.config import SamplingConfig

MetricLossName = Literal[
    "supervised_contrastive",
    "balanced_contrastive",
    "batch_hard_triplet",
    "semi_hard_triplet",
    "all_triplet",
    "class_centre_triplet",
    "progressive_class_centre_triplet",
    "centre",
    "multi_similarity",
    "proxy_anchor",
    "none",
]
ClassificationLossName = Literal[
    "cross_entropy", "balanced_softmax", "logit_adjusted", "focal", "ldam", "cosface", "arcface"
]

UNIT_LENGTH_REASONS = {
    "supervised_contrastive": "its temperature is made for the unit sphere",
    "balanced_contrastive": "its temperature is made for the unit sphere",
    "multi_similarity": "its similarity_base is a cosine",
    "proxy_anchor": "its proxy_margin is a cosine",
}
"""Losses of embeddings of unit length, and why."""

SAMPLES_PER_CLASS_LOSSES = ("semi_hard_triplet", "class_centre_triplet", "progressive_class_centre_triplet")
"""Losses that their papers define on batches of P classes x K samples: semi-hard negatives are chosen by the distances
to several positives (FaceNet, section 3.2), and the centre of a class is no centre where one sample stands for it."""

COSINE_LOSSES = ("ldam", "cosface", "arcface")
"""Classification losses whose margin is one of the cosine: the logits are scale * cosine."""

PRIOR_AWARE_LOSSES = ("balanced_softmax", "logit_adjusted")
"""Classification losses that make up for the class frequencies of natural sampling."""


class LossConfig(Section):
    """The metric loss: L = classification loss + weight * metric loss."""

    name: MetricLossName = Field(
        "supervised_contrastive",
        description="Metric loss over the embeddings of all workers; none = the classification loss alone",
    )
    weight: float = Field(1.0, ge=0, description="lambda")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs over which lambda grows from 0 to weight, linearly")
    compare: Literal["embedding", "feature"] = Field(  # not `on`: that is a boolean in YAML
        "embedding", description="What is compared: outputs of the embedding head, or the backbone's pooled features"
    )
    normalise: bool = Field(True, description="Compared on the unit sphere; false = raw, for triplets and centres only")
    temperature: float = Field(0.1, gt=0, description="Contrastive losses: softmax temperature")
    class_complement: bool = Field(
        True, description="Balanced contrastive: a learnt prototype stands in every batch for each class"
    )
    margin: float = Field(0.2, description="Triplets: margin in units of the distance")
    triplet_mean: Literal["active", "all"] = Field(
        "active", description="All triplets: mean over those with a loss above zero, or over all"
    )
    centres_from: float = Field(
        0.5, ge=0, le=1, description="Progressive class-centre triplet: share of the run after which centres come in"
    )
    positive_scale: float = Field(2.0, gt=0, description="Multi-similarity: alpha")
    negative_scale: float = Field(50.0, gt=0, description="Multi-similarity: beta")
    similarity_base: float = Field(0.5, ge=-1, le=1, description="Multi-similarity: lambda, a cosine")
    mining_margin: float = Field(0.1, ge=0, description="Multi-similarity: epsilon of its pair mining, a cosine")
    proxy_scale: float = Field(32.0, gt=0, description="Proxy-anchor: alpha")
    proxy_margin: float = Field(0.1, ge=0, le=1, description="Proxy-anchor: delta, a cosine")
    lr_ratio: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the loss's own centres, proxies or prototypes, in units of optimiser.lr",
    )

    @model_validator(mode="after")
    def _unit_length_where_needed(self) -> LossConfig:
        if self.name in UNIT_LENGTH_REASONS and not self.normalise:
            raise ValueError(f"{self.name} needs normalise: true, {UNIT_LENGTH_REASONS[self.name]}")
        return self

    def weight_at(self, epoch: float) -> float:
        """Lambda after `epoch` epochs, of which `warmup_epochs` raise it from 0."""
        return self.weight * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs > 0 else self.weight


class ClassificationConfig(Section):
    """The loss of stage one's own classifier."""

    name: ClassificationLossName = Field("cross_entropy", description="Loss of the logits")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over all classes")
    tau: float = Field(1.0, ge=0, description="Logit-adjusted: strength of the prior; 1 = balanced softmax")
    gamma: float = Field(2.0, ge=0, description="Focal: exponent; 0 = cross-entropy")
    margin: float | None = Field(
        None,
        ge=0,
        le=3,
        description="Largest margin; none = the paper's: ldam .5 and cosface .35 of the cosine, arcface .5 radians",
    )
    margin_by_frequency: bool = Field(
        False, description="CosFace, ArcFace: margins ~ n_c^(-1/4) as LDAM's always are, the rarest class has `margin`"
    )
    reweight_from: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the run after which samples weigh by class (LDAM-DRW: .8); 0 = always, none = never",
    )
    beta: float = Field(
        0.9999, ge=0, le=1, description="Class weights (1 - beta) / (1 - beta^n_c); 1 = their limit, 1 / n_c"
    )
    double_correction: bool = Field(
        False, description="Allow a loss that makes up for class frequencies on top of rebalanced sampling"
    )

    @model_validator(mode="after")
    def _focal_has_one_class(self) -> ClassificationConfig:
        if self.name == "focal" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g} does not go with focal, whose factor is that of one "
                f"class; set label_smoothing: 0"
            )
        return self

    @property
    def corrects_frequencies(self) -> bool:
        """Whether the loss makes up for the class frequencies that natural sampling has."""
        return self.name in PRIOR_AWARE_LOSSES or self.reweight_from is not None


def check_losses(
    metric: LossConfig, classification: ClassificationConfig, sampling: SamplingConfig, cosine_scale: float | None
) -> None:
    """Refuse losses that the sampling or the classifier does not suit.

    Raises:
        ValueError: The metric loss is defined on P x K batches and these are none; the classification loss has a margin
            between cosines and the classifier is linear; or the class frequencies would be corrected twice, by the
            sampling and by the classification loss (a mistake that BALMS's author names).
    """
    if metric.name in SAMPLES_PER_CLASS_LOSSES and not sampling.samples_per_class:
        raise ValueError(
            f"stage_one.loss.name = {metric.name!r} needs batches of P classes x K samples; set "
            f"stage_one.sampling.classes_per_batch and samples_per_class"
        )
    if classification.name in COSINE_LOSSES and cosine_scale is None:
        raise ValueError(linear_classifier_message(classification.name))
    if classification.corrects_frequencies and not classification.double_correction and sampling != SamplingConfig():
        what = f"name = {classification.name!r}" if classification.name in PRIOR_AWARE_LOSSES else "reweight_from"
        raise ValueError(
            f"stage_one.classification.{what} makes up for the class frequencies, and stage_one.sampling does so too; "
            f"leave the sampling natural, or set stage_one.classification.double_correction: true if that is wanted"
        )


def linear_classifier_message(name: str) -> str:
    """What is said where a loss of `COSINE_LOSSES` meets a linear classifier."""
    return (
        f"stage_one.classification.name = {name!r} has a margin between cosines, and the classifier is linear; set "
        f"model.cosine_scale, e.g. to 30"
    )
