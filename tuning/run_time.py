"""Hours that a whole run takes, on paper: stage one by `trainer.plan`, the steps after it by what was counted.

N images in all, D width of the feature, C classes, K folds, E epochs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.machine import CPU, TRAINING_FLOP_FACTOR, Machine
from trainer.network_size import NetworkSize
from trainer.plan import START_S, DataSize, kept_bytes, predict
from tuning.config import Config
from tuning.folds import AUTO_FOLDS

HEAD_FLOP_SHARE = 0.55
"""Of a core's rate in stage one: 4,200 heads of 1.5 GFLOP a minute on two cores (docs/log.md)."""
EVALUATION_S = 20.0
"""Metrics, intervals and report, after test is read; 18 s in the demo (docs/log.md)."""


@dataclass(frozen=True)
class RunTime:
    """Of a run's steps, in seconds; `stage_one_s` is of one training, the baseline is another of the kind."""

    stage_one_s: float
    epoch_s: float
    baseline: bool
    features_s: float
    stage_two_s: float

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return (self.stage_one_s * (2 if self.baseline else 1) + self.features_s + self.stage_two_s) / 3600

    @property
    def other_hours(self) -> float:
        """Of all but the epochs of stage one."""
        return (self.features_s + self.stage_two_s + START_S * (2 if self.baseline else 1)) / 3600


def run_time(config: Config, data: DataSize, network: NetworkSize, images: int, machine: Machine) -> RunTime:
    """What a configuration takes on one machine, with a worker a device.

    Args:
        config: The configuration.
        data: Of the packed dataset.
        network: Of the configured network.
        images: N, of all splits.
        machine: The machine.
    """
    workers = machine.devices
    stage = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"baseline": False})})
    planned = predict(stage, data, network, machine, workers, machines=1)
    epoch_s = planned.epoch_s + planned.validation_s + planned.snapshot_s
    image_s = machine.image_s(network.forward_flop, kept_bytes(network, config.stage_one), config.stage_one.precision)
    read_s = image_s / TRAINING_FLOP_FACTOR + machine.decode_s(config.data.image_px)
    features_s = 2 * START_S + images * read_s / workers / machine.rate_share(workers) + EVALUATION_S
    return RunTime(
        stage_one_s=planned.wall_h * 3600,
        epoch_s=epoch_s,
        baseline=config.evaluation.baseline,
        features_s=features_s,
        stage_two_s=START_S + heads_s(config, data, network.feature_dim, machine),
    )


def heads_s(config: Config, data: DataSize, feature_dim: int, machine: Machine) -> float:
    """Seconds of the search over heads: 4 N D C E operations a head and fold, on the machine's cores."""
    epochs = sum(config.stage_two.space.epochs) / 2
    images = data.train_images + data.val_images
    flop = 4 * images * feature_dim * data.num_classes * epochs * AUTO_FOLDS * config.stage_two.heads
    return flop / (CPU.flop_per_s["fp32"] * HEAD_FLOP_SHARE * machine.cores)
