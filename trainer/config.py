"""Configuration of the network, of stage one, of the features, of the evaluation and of the report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from cluster.config import ClusterConfig, Section, flatten
from data_pipeline.config import DataConfig, SamplingConfig, SourceConfig
from trainer.fine_tune_config import FineTuneConfig
from trainer.loss_config import SAMPLES_PER_CLASS_LOSSES, ClassificationConfig, LossConfig, check_losses
from trainer.tracking import TrackingConfig

HUB = "hf-hub:"
"""How `model.weights` names a model on the Hugging Face hub."""


class ModelConfig(Section):
    """Backbone, embedding head and classifier."""

    backbone: str = Field("resnet50", description="Name of a timm network")
    weights: str | None = Field(
        None,
        description="Starting weights: path or URI of a .safetensors file, folder with config.json and "
        "model.safetensors, 'hf-hub:OWNER/NAME' for such a model on the hub, 'timm' for timm's own; none = random",
    )
    hidden_dim: int = Field(512, ge=1, description="Width of the embedding head's hidden layer")
    embedding_dim: int = Field(128, ge=2, description="D of the embedding that the metric loss sees")
    drop_rate: float = Field(0.0, ge=0, lt=1, description="Dropout before the classifier")
    freeze_batch_norm: bool = Field(False, description="Keep batch-norm statistics of the starting weights")
    sync_batch_norm: bool = Field(
        False, description="Batch norm over the images of all workers instead of each worker's own"
    )
    cosine_scale: float | None = Field(
        None, gt=0, description="Cosine classifier: logits are this times the cosine; none = linear classifier"
    )
    mirrors: Literal["none", "horizontal", "both"] = Field(
        "none",
        description="Outside training, features are the mean over an image and its mirror images: horizontal = left to "
        "right, two forward passes an image; both = top to bottom too, four. For images that have no side",
    )
    checkpoint_activations: bool = Field(
        False, description="Recompute the backbone's activations in backward: less memory, about a third more time"
    )


LAYERWISE_OPTIMISERS = ("lamb",)
"""Optimisers that look at each tensor's norm; ZeRO flattens the tensors into one and cuts that over the workers."""


DEEPSPEED_KEYS_OF_OURS = {
    "zero_optimization.stage": "zero_stage",
    "gradient_accumulation_steps": "micro_batch_size",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
    "torch_autocast.enabled": "precision",
}
"""Raw DeepSpeed settings on which the loop itself depends."""


class OptimiserConfig(Section):
    """The optimiser and its learning-rate schedule: linear warm-up, then the schedule's own course."""

    name: Literal["adamw", "sgd", "lamb", "deepspeed"] = Field(
        "adamw", description="deepspeed = the one that stage_one.deepspeed.optimizer names"
    )
    options: dict[str, Any] = Field({}, description="Further arguments of the optimiser, e.g. {betas: [0.9, 0.95]}")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate")
    weight_decay: float = Field(0.05, ge=0, description="Of weights; biases and batch norm have none")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD (Nesterov)")
    warmup_epochs: float = Field(1.0, ge=0, description="Epochs over which the rate grows from 0 to lr, linearly")
    schedule: Literal["cosine", "linear", "step", "multi_step", "constant"] = Field(
        "cosine", description="Course of the learning rate after the warm-up"
    )
    final_lr_share: float = Field(
        0.0, ge=0, le=1, description="cosine, linear: learning rate at the end of the run, in units of lr"
    )
    step_epochs: float = Field(30.0, gt=0, description="step: epochs, counted from the start, between two steps")
    milestones_epochs: tuple[float, ...] = Field((), description="multi_step: epochs at which the rate steps down")
    step_factor: float = Field(0.1, gt=0, le=1, description="step, multi_step: factor of each step")
    clip_norm: float = Field(0.0, ge=0, description="Bound of the gradient's norm; 0 = none")

    @model_validator(mode="after")
    def _milestones_belong_to_multi_step(self) -> OptimiserConfig:
        if bool(self.milestones_epochs) != (self.schedule == "multi_step"):
            raise ValueError(
                f"schedule = {self.schedule!r} and milestones_epochs = {list(self.milestones_epochs)} do not go "
                f"together; milestones are what multi_step needs, and nothing else does"
            )
        return self


class MemoryConfig(Section):
    """Cross-batch memory: embeddings of past batches as further rows of the pool, without gradient."""

    rows: int = Field(0, ge=0, description="Embeddings that it holds, the same ones on every worker; 0 = off")
    start_epoch: float = Field(
        1.0, ge=0, description="Epochs before the first batch is remembered: embeddings still change fast then"
    )
    eviction: Literal["oldest", "class_aware"] = Field(
        "class_aware",
        description="What goes when it is full: the oldest row, or the oldest of the class that has most rows, so that "
        "rare classes stay longer",
    )


class StageOneConfig(Section):
    """Metric learning with a classification loss."""

    epochs: int = Field(20, ge=1, description="Passes over as many images as train holds")
    batch_size: int = Field(64, ge=2, description="Images a step over all workers, views not counted")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="Images, each view counted, in a forward pass of a worker; the pool stays that of the whole batch. "
        "None = all at once",
    )
    views: Literal[1, 2] = Field(2, description="Augmented views of each image in a step")
    loss: LossConfig = LossConfig()
    memory: MemoryConfig = MemoryConfig()
    classification: ClassificationConfig = ClassificationConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Moving average of the weights, evaluated and exported in their place; none = off",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="Of the network's arithmetic; weights, optimiser and losses stay in float32"
    )
    compile: bool = Field(False, description="torch.compile the backbone: slower to start, then faster steps")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage")
    skip_nonfinite_steps: int = Field(
        0, ge=0, description="Steps with a loss or gradient that is not finite which a run leaves out before it stops"
    )
    select_by: Literal["balanced_accuracy", "macro_f1", "worst_recall"] = Field(
        "balanced_accuracy", description="Metric on val by which the best epoch is chosen"
    )
    keep_checkpoints: int = Field(
        2, ge=1, description="Checkpoints of how many best epochs stay; beside them always the two newest of all"
    )
    checkpoint_every_steps: int | None = Field(
        None, ge=1, description="Also save in the middle of an epoch, to go on from; none = by time alone"
    )
    checkpoint_every_minutes: float | None = Field(
        10.0, gt=0, description="Also save in the middle of an epoch; none = at the end of each epoch alone"
    )
    log_every_steps: int = Field(10, ge=1, description="Steps between two lines of log.jsonl and TensorBoard")
    deepspeed: dict[str, Any] = Field({}, description="Raw DeepSpeed settings, merged last")

    @model_validator(mode="after")
    def _memory_is_used(self) -> StageOneConfig:
        rows, start = self.memory.rows, self.memory.start_epoch
        if rows and self.loss.name == "none":
            raise ValueError(f"memory.rows = {rows} serves a metric loss and loss.name is 'none'; set memory.rows: 0")
        if rows and start >= self.epochs:
            raise ValueError(
                f"memory.start_epoch = {start:g} is not before the end of epochs = {self.epochs}, and the memory would "
                f"stay empty; lower it, or set memory.rows: 0"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_can_do_it(self) -> StageOneConfig:
        if self.ema_decay is not None and self.zero_stage == 3:
            raise ValueError(
                f"ema_decay = {self.ema_decay:g} needs the whole weights on every worker and zero_stage = 3 splits "
                f"them; set zero_stage: 2 or ema_decay: null"
            )
        if (self.optimiser.name == "deepspeed") != ("optimizer" in self.deepspeed):
            raise ValueError(
                f"optimiser.name = {self.optimiser.name!r} and deepspeed.optimizer = {self.deepspeed.get('optimizer')} "
                f"do not go together; set optimiser.name: deepspeed and name the optimiser in deepspeed.optimizer.type"
            )
        for key, remedy in DEEPSPEED_KEYS_OF_OURS.items():
            if key in flatten(self.deepspeed):
                raise ValueError(f"deepspeed.{key} is for this program to set; set stage_one.{remedy} instead")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile = True and zero_stage = 3 do not go together, DeepSpeed's hooks cut the graph at every layer; "
                "set zero_stage: 2 or compile: false"
            )
        if self.optimiser.name in LAYERWISE_OPTIMISERS and self.zero_stage > 0:
            raise ValueError(
                f"optimiser.name = {self.optimiser.name!r} scales each layer by its own norm and zero_stage = "
                f"{self.zero_stage} flattens the layers into one; set zero_stage: 0"
            )
        return self


class FeaturesConfig(Section):
    """Backbone outputs for stage two."""

    batch_size: int = Field(128, ge=1, description="Images a batch and worker")
    views: int = Field(
        1,
        ge=1,
        le=127,
        description="Views of each training image on which heads are trained: as it is evaluated, and others augmented",
    )


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
    examples_mib: float = Field(
        64.0,
        ge=0,
        description="Room in the model folder for training images as features, with their names, which new images are "
        "compared with; where they are more, large classes keep some. 0 = none are kept",
    )


class ReportConfig(Section):
    """What only its makers know about a model; it changes no result, and may be changed after a run."""

    intended_use: str | None = Field(None, description="Who is to use the model for what, in the model card's words")
    data_licence: str | None = Field(None, description="Terms of the images, e.g. CC BY-NC 4.0")
    model_licence: str | None = Field(None, description="Terms under which the model is passed on")
    pictures: bool = Field(
        True, description="Show small copies of images in the report; false = it may be shown where the images may not"
    )


class TrainerConfig(Section):
    """Everything up to the features, and the evaluation."""

    run: str = Field("runs/default", description="Run folder: a path or s3://bucket/prefix")
    seed: int = Field(0, ge=0, description="Draws splits, order, augmentation, random weights and heads")
    source: SourceConfig = SourceConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stage_one: StageOneConfig = StageOneConfig()
    features: FeaturesConfig = FeaturesConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _losses_suit_the_sampling(self) -> TrainerConfig:
        stage = self.stage_one
        check_losses(stage.loss, stage.classification, stage.sampling, self.model.cosine_scale)
        return self

    @model_validator(mode="after")
    def _some_images_can_be_compared(self) -> TrainerConfig:
        mix, loss = self.data.mix, self.stage_one.loss
        if not (mix.mixup_alpha or mix.cutmix_alpha) or loss.name == "none":
            return self
        if loss.name in SAMPLES_PER_CLASS_LOSSES:
            raise ValueError(
                f"data.mix takes images out of the batches of P classes x K samples that stage_one.loss.name = "
                f"{loss.name!r} needs; set both alphas of data.mix to 0, or another loss"
            )
        if mix.probability == 1:
            raise ValueError(
                f"data.mix.probability = 1 gives every image two classes and stage_one.loss.name = {loss.name!r} "
                f"compares images of one class; set data.mix.probability to 0.5, or stage_one.loss.name: none"
            )
        return self

    @model_validator(mode="after")
    def _batch_is_cut_evenly(self) -> TrainerConfig:
        batch, streams, sampling = self.stage_one.batch_size, self.data.streams, self.stage_one.sampling
        if batch % streams:
            raise ValueError(f"stage_one.batch_size = {batch} must be a multiple of data.streams = {streams}")
        most = self.cluster.worker_range[1] if self.cluster.worker_range else 1
        if most > streams:
            raise ValueError(f"cluster.workers = {most} is more than data.streams = {streams}; raise data.streams")
        if sampling.classes_per_batch and sampling.samples_per_class:
            wanted = sampling.classes_per_batch * sampling.samples_per_class
            if wanted != batch:
                raise ValueError(
                    f"stage_one.batch_size = {batch} must be classes_per_batch x samples_per_class = {wanted}"
                )
        return self

    @model_validator(mode="after")
    def _fine_tuning_has_stage_one_s_batches(self) -> TrainerConfig:
        batch, sampling = self.stage_one.batch_size, self.fine_tune.sampling
        if sampling and sampling.classes_per_batch and sampling.samples_per_class:
            wanted = sampling.classes_per_batch * sampling.samples_per_class
            if wanted != batch:
                raise ValueError(
                    f"fine_tune.sampling: classes_per_batch x samples_per_class = {wanted} must be "
                    f"stage_one.batch_size = {batch}"
                )
        return self
