"""A run small enough for tests: a few drawn images, the smallest network, two epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.config import parse_config
from tuning.config import Config

IMAGE_PX = 32


def tiny_config(images: Path, run: Path | str, **sections: dict[str, Any]) -> Config:
    """The quickstart cut down; `sections` are laid over it, one level deep."""
    values: dict[str, Any] = {
        "run": str(run),
        "source": {"path": str(images), "labels": "labels.csv", "group_column": "group"},
        "data": {"name": "tiny", "image_px": IMAGE_PX, "resize_ratio": 1.0, "decode_threads": 1},
        "model": {"backbone": "test_resnet", "hidden_dim": 16, "embedding_dim": 8},
        "stage_one": {"epochs": 2, "batch_size": 16, "log_every_steps": 1, "optimiser": {"warmup_epochs": 0.5}},
        "features": {"batch_size": 32},
        "stage_two": {
            "heads": 24,
            "heads_per_trial": 12,
            "families": ["crt", "logit_adjustment", "tau_norm"],
            "seeds": 1,
        },
        "evaluation": {"bootstrap_samples": 100},
        "cluster": {"workers": 2, "device": "cpu", "cpus_per_worker": 0.5},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(Config, values, "tests/tiny.py")
