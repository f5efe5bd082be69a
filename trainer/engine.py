"""DeepSpeed behind one door: configuration -> engine; step, save, load. Nothing else imports deepspeed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config import OptimiserConfig, StageOneConfig

CHECKPOINT_TAG = "engine"


def deepspeed_settings(config: StageOneConfig, world: int) -> dict[str, Any]:
    """The settings that DeepSpeed is given: a pure function of ours, the raw `deepspeed` section merged last."""
    settings: dict[str, Any] = {
        # Only bookkeeping for DeepSpeed: ranks may hold batches of different size, `global_mean` weighs them.
        "train_micro_batch_size_per_gpu": max(1, config.batch_size // world),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimiser.clip_norm,
        # Autocast, not DeepSpeed's "bf16": that turns batch norm's weights to bf16 beside float32 statistics, which
        # torch refuses, and at ZeRO 0 its empty first step shrinks Adam's first real one to 0.74 (seen with 0.19.8).
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,  # SGD is not on DeepSpeed's list; our tests hold it to ZeRO 0
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    return _merge(settings, config.deepspeed)


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW or SGD; biases and the one-dimensional weights of normalisation layers are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups, lr=config.lr)


def learning_rate(config: OptimiserConfig, progress_epochs: float, epochs: int) -> float:
    """Linear warm-up over `warmup_epochs`, then a cosine to zero at `epochs` (Loshchilov and Hutter, 2017)."""
    if progress_epochs < config.warmup_epochs:
        return config.lr * progress_epochs / config.warmup_epochs
    rest = max(epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress_epochs - config.warmup_epochs) / rest))


class Engine:
    """A model under DeepSpeed: forward, backward with the gradient averaged over ranks, step, save, load."""

    def __init__(self, model: nn.Module, config: StageOneConfig, world: int, device: str):
        import deepspeed

        # Ray Train has made the process group; DeepSpeed takes it over.
        deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
        self._engine, self._optimiser, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimiser(model, config.optimiser),
            config=deepspeed_settings(config, world),
            dist_init_required=False,
        )

    @property
    def module(self) -> nn.Module:
        """The model itself, its weights in float32 whatever the precision of the arithmetic."""
        return self._engine.module

    def __call__(self, images: torch.Tensor) -> Any:
        """The model's output for images [B, 3, px, px]."""
        return self._engine(images)

    def step(self, loss: torch.Tensor, lr: float) -> None:
        """Backward, average the gradient over ranks, update at learning rate `lr`. Every rank takes part."""
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._engine.backward(loss)
        self._engine.step()

    def save(self, folder: Path) -> None:
        """Write this rank's share of the checkpoint below `folder`. Every rank takes part."""
        self._engine.save_checkpoint(str(folder), tag=CHECKPOINT_TAG)

    def load(self, folder: Path) -> None:
        """Go on from a verified checkpoint. Every rank takes part."""
        self._engine.load_checkpoint(str(folder), tag=CHECKPOINT_TAG)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
