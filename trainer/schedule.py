"""The learning rate of a step: a pure function of how far the run is."""

from __future__ import annotations

import math

from trainer.config import OptimiserConfig


def learning_rate(config: OptimiserConfig, progress_epochs: float, epochs: int) -> float:
    """Linear warm-up over `warmup_epochs`, then the course that `schedule` names.

    `cosine` falls to `final_lr_share` at `epochs` (Loshchilov and Hutter, 2017), `linear` likewise in a straight line;
    `step` and `multi_step` fall by `step_factor` every `step_epochs` and at each of `milestones_epochs`, counted from
    the start of the run.

    Args:
        config: The schedule.
        progress_epochs: Epochs that are done when this step is, in (0, epochs].
        epochs: Of the run.

    Returns:
        The learning rate in its own unit; a step that ends on a milestone still has the rate before it.
    """
    if progress_epochs < config.warmup_epochs:
        return config.lr * progress_epochs / config.warmup_epochs
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.step_factor ** max(0, math.ceil(progress_epochs / config.step_epochs) - 1)
    if config.schedule == "multi_step":
        return config.lr * config.step_factor ** sum(progress_epochs > m for m in config.milestones_epochs)
    done, rest = progress_epochs - config.warmup_epochs, max(epochs - config.warmup_epochs, 1e-9)
    left = 0.5 * (1 + math.cos(math.pi * done / rest)) if config.schedule == "cosine" else 1 - done / rest
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * left)
