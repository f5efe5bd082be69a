"""Configuration of the network, of stage one, of the features and of the evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config import ClusterConfig, Section
from data_pipeline.config import DataConfig, SamplingConfig, SourceConfig


class ModelConfig(Section):
    """Backbone, embedding head and classifier."""

    backbone: str = Field("resnet50", description="Name of a timm model")
    weights: str | None = Field(
        None,
        description="Starting weights: path or URI of a .safetensors file, 'timm' to download timm's, none = random",
    )
    hidden_dim: int = Field(512, ge=1, description="Width of the embedding head's hidden layer")
    embedding_dim: int = Field(128, ge=2, description="D of the embedding that the metric loss sees")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="Dropout before the classifier")
    freeze_batch_norm: bool = Field(False, description="Keep batch-norm statistics of the starting weights")


class LossConfig(Section):
    """L = cross-entropy + weight * metric loss."""

    name: Literal["supervised_contrastive", "batch_hard_triplet", "none"] = Field(
        "supervised_contrastive",
        description="Metric loss over the embeddings of all workers; none = plain cross-entropy",
    )
    weight: float = Field(1.0, ge=0, description="lambda")
    temperature: float = Field(0.1, gt=0, description="Supervised contrastive: softmax temperature")
    margin: float = Field(0.2, description="Triplet: margin in units of the embedding's distance")
    normalise: bool = Field(True, description="Embeddings on the unit sphere; false = raw, for the triplet loss only")

    @model_validator(mode="after")
    def _contrastive_is_normalised(self) -> LossConfig:
        if self.name == "supervised_contrastive" and not self.normalise:
            raise ValueError(
                "supervised_contrastive needs normalise: true, its temperature is made for the unit sphere"
            )
        return self


class OptimiserConfig(Section):
    """The optimiser and its learning-rate schedule: linear warm-up, then a cosine to zero."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="Peak learning rate")
    weight_decay: float = Field(0.05, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD (Nesterov)")
    warmup_epochs: float = Field(1.0, ge=0)
    clip_norm: float = Field(0.0, ge=0, description="Bound of the gradient's norm; 0 = none")


class StageOneConfig(Section):
    """Metric learning with cross-entropy."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=2, description="Images a step over all workers, views not counted")
    views: Literal[1, 2] = Field(2, description="Augmented views of each image in a step")
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = Field(0, description="DeepSpeed ZeRO stage")
    select_by: Literal["balanced_accuracy", "macro_f1", "worst_recall"] = Field(
        "balanced_accuracy", description="Metric on val by which the best epoch is chosen"
    )
    keep_checkpoints: int = Field(2, ge=1, description="How many of the newest checkpoints stay beside the best one")
    log_every_steps: int = Field(10, ge=1)
    deepspeed: dict[str, Any] = Field({}, description="Raw DeepSpeed settings, merged last")


class FeaturesConfig(Section):
    """Backbone outputs for stage two."""

    batch_size: int = Field(128, ge=1, description="Images a batch and worker")


class EvaluationConfig(Section):
    """What is reported about the test set."""

    baseline: bool = Field(False, description="Also train plain cross-entropy with the same budget, for the report")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples of the groups for the 95 % intervals")
    many_above: int | None = Field(
        None,
        ge=1,
        description="Classes with more training images than this are 'many'; none = thirds of the classes",
    )
    few_below: int | None = Field(
        None,
        ge=1,
        description="Classes with fewer training images than this are 'few'; none = thirds of the classes",
    )


class TrainerConfig(Section):
    """Everything up to the features, and the evaluation."""

    run: str = Field("runs/default", description="Run folder: a path or s3://bucket/prefix")
    seed: int = Field(0, ge=0)
    source: SourceConfig = SourceConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stage_one: StageOneConfig = StageOneConfig()
    features: FeaturesConfig = FeaturesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _batch_is_cut_evenly(self) -> TrainerConfig:
        batch, streams, sampling = self.stage_one.batch_size, self.data.streams, self.stage_one.sampling
        if batch % streams:
            raise ValueError(f"stage_one.batch_size = {batch} must be a multiple of data.streams = {streams}")
        if isinstance(self.cluster.workers, int) and self.cluster.workers > streams:
            raise ValueError(
                f"cluster.workers = {self.cluster.workers} is more than data.streams = {streams}; raise data.streams"
            )
        if sampling.classes_per_batch and sampling.samples_per_class:
            wanted = sampling.classes_per_batch * sampling.samples_per_class
            if wanted != batch:
                raise ValueError(
                    f"stage_one.batch_size = {batch} must be classes_per_batch x samples_per_class = {wanted}"
                )
        return self
